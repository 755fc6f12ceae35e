/* What every product is made of: a panel of rows times a tile of outputs, with the sums in registers. */
#pragma once

#include "vectors.h"

#define PANEL 6
#define TILE_VECTORS (LANES == 8 ? 2 : 4) /* PANEL * TILE_VECTORS sums fit into the registers */
#define TILE (TILE_VECTORS * LANES)
#define SMALL (1 << 19) /* weights times panels of rows: below, waking a thread takes longer than it helps */

/* Outputs are padded to whole tiles. */
INLINE int64_t padded_to_tiles(int64_t out_features) { return (out_features + TILE - 1) / TILE * TILE; }

/* sums[row][vector] += rows x [num_rows, in_features] times a tile of weights [in_features, TILE]. */
INLINE void multiply(vec sums[PANEL][TILE_VECTORS], const char *x, int64_t row_bytes, const char *weights,
                     int64_t in_features, int num_rows, dtype_t dtype) {
    if (dtype == FLOAT32) {
        for (int64_t input = 0; input < in_features; input++) {
            vec weight[TILE_VECTORS];
            for (int v = 0; v < TILE_VECTORS; v++)
                weight[v] = load_float((const float *)weights + input * TILE + v * LANES);
            for (int row = 0; row < num_rows; row++) {
                const float value = ((const float *)(x + row * row_bytes))[input];
                for (int v = 0; v < TILE_VECTORS; v++) sums[row][v] += value * weight[v];
            }
        }
    }
#if defined(__AVX512BF16__)
    if (dtype == BFLOAT16) {
        for (int64_t pair = 0; pair < in_features / 2; pair++) {
            __m512bh weight[TILE_VECTORS];
            for (int v = 0; v < TILE_VECTORS; v++)
                weight[v] = (__m512bh)_mm512_loadu_si512(weights + (pair * TILE + v * LANES) * 4);
            for (int row = 0; row < num_rows; row++) {
                int32_t two;
                memcpy(&two, x + row * row_bytes + pair * 4, 4);
                const __m512bh values = (__m512bh)_mm512_set1_epi32(two);
                for (int v = 0; v < TILE_VECTORS; v++)
                    sums[row][v] = (vec)_mm512_dpbf16_ps((__m512)sums[row][v], weight[v], values);
            }
        }
    }
#endif
}
