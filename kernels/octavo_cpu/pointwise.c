/* Norms and activations: one row at a time, computed in float32. Sizes are multiples of 16. */
#include "vectors.h"

INLINE void rms_norm_rows(void *y, const void *x, void *residual, const void *weight, float eps, int64_t num_rows,
                          int64_t size, dtype_t dtype) {
    for (int64_t row = 0; row < num_rows; row++) {
        const int64_t begin = row * size, end = begin + size;
        const void *normed = residual ? residual : x;
        vec squares = {0};
        for (int64_t i = begin; i < end; i += LANES) {
            vec value = load(x, i, dtype);
            if (residual) {
                value = rounded_to(value + load(residual, i, dtype), dtype);
                store(residual, i, value, dtype);
            }
            squares += value * value;
        }
        const float factor = 1.0f / sqrtf(sum(squares) / (float)size + eps);
        for (int64_t i = begin; i < end; i += LANES) {
            vec value = rounded_to(load(normed, i, dtype) * factor, dtype);
            store(y, i, value * load(weight, i - begin, dtype), dtype);
        }
    }
}

/* y = rms_norm(x) * weight; with `residual`, residual += x first and its norm is taken. y may be x. */
void rms_norm(void *y, const void *x, void *residual, const void *weight, float eps, int64_t num_rows, int64_t size,
              int32_t dtype) {
    if (dtype == FLOAT32)
        rms_norm_rows(y, x, residual, weight, eps, num_rows, size, FLOAT32);
    else
        rms_norm_rows(y, x, residual, weight, eps, num_rows, size, BFLOAT16);
}

INLINE void silu_and_mul_rows(void *y, const void *x, int64_t num_rows, int64_t size, dtype_t dtype) {
    for (int64_t row = 0; row < num_rows; row++) {
        const int64_t gate = 2 * row * size, up = gate + size;
        for (int64_t i = 0; i < size; i += LANES) {
            vec value = load(x, gate + i, dtype);
            vec silu = rounded_to(value / (1.0f + exponential(-value)), dtype);
            store(y, row * size + i, silu * load(x, up + i, dtype), dtype);
        }
    }
}

/* x [num_rows, 2 * size] = [gate | up] -> y [num_rows, size] = silu(gate) * up. */
void silu_and_mul(void *y, const void *x, int64_t num_rows, int64_t size, int32_t dtype) {
    if (dtype == FLOAT32)
        silu_and_mul_rows(y, x, num_rows, size, FLOAT32);
    else
        silu_and_mul_rows(y, x, num_rows, size, BFLOAT16);
}
