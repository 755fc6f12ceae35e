/* Vectors of floats as wide as the target has them, written with the vector extensions of GCC and Clang.
 *
 * The same source is compiled once per instruction set; which of the libraries is loaded is decided in Python.
 */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t vec_int __attribute__((vector_size(LANES * 4)));
typedef uint32_t vec_bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t vec_half __attribute__((vector_size(LANES * 2)));

/* As in Python: octavo_cpu.library.DTYPES. */
typedef enum { FLOAT32 = 0, BFLOAT16 = 1 } dtype_t;

INLINE size_t size_of(dtype_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE vec load_float(const float *from) {
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store_float(float *to, vec x) { memcpy(to, &x, sizeof x); }

/* Where compilers make too much of a plain expression, AVX-512's own instruction is named. */

INLINE vec_half to_bfloat16(vec x) {
#if defined(__AVX512BF16__)
    return (vec_half)_mm512_cvtneps_pbh((__m512)x);
#else
    vec_bits bits = (vec_bits)x;
    vec_bits rounded = bits + 0x7fff + ((bits >> 16) & 1); /* to nearest, ties to even */
    vec_bits not_a_number = (vec_bits)(x != x);
    rounded = (rounded & ~not_a_number) | (0x7fc00000 & not_a_number);
    return __builtin_convertvector(rounded >> 16, vec_half);
#endif
}

INLINE vec from_bfloat16(vec_half x) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#else
    return (vec)(__builtin_convertvector(x, vec_bits) << 16);
#endif
}

/* LANES elements of an array of `dtype`, from element `index`. */
INLINE vec load(const void *from, int64_t index, dtype_t dtype) {
    if (dtype == FLOAT32) return load_float((const float *)from + index);
    vec_half half;
    memcpy(&half, (const uint16_t *)from + index, sizeof half);
    return from_bfloat16(half);
}

INLINE float load_one(const void *from, int64_t index, dtype_t dtype) {
    if (dtype == FLOAT32) return ((const float *)from)[index];
    const uint32_t bits = (uint32_t)((const uint16_t *)from)[index] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE void store(void *to, int64_t index, vec x, dtype_t dtype) {
    if (dtype == FLOAT32) {
        store_float((float *)to + index, x);
    } else {
        vec_half half = to_bfloat16(x);
        memcpy((uint16_t *)to + index, &half, sizeof half);
    }
}

/* What `x` becomes when it is stored as `dtype`. */
INLINE vec rounded_to(vec x, dtype_t dtype) {
    if (dtype == FLOAT32) return x;
    return from_bfloat16(to_bfloat16(x));
}

INLINE vec maximum(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    vec_bits greater = (vec_bits)(a > b);
    return (vec)(((vec_bits)a & greater) | ((vec_bits)b & ~greater));
#endif
}

INLINE float sum(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
#endif
}

INLINE float largest(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int lane = 1; lane < LANES; lane++) most = x[lane] > most ? x[lane] : most;
    return most;
#endif
}

/* e^x to about one unit in the last place; 0 below -87, where float32 has no normal numbers left.
 * x = n ln 2 + f with |f| <= ln 2 / 2: 2^n goes into the exponent's bits, e^f is a polynomial (Cephes' expf). */
INLINE vec exponential(vec x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vec_bits vanishes = (vec_bits)(x < -87.0f);
    x = (vec)((vec_bits)x & ~vanishes);
    vec_bits overflows = (vec_bits)(x > 88.0f);
    x = (vec)(((vec_bits)x & ~overflows) | ((vec_bits)splat(88.0f) & overflows));
    vec n = (x * 1.44269504088896341f + shift) - shift;
    vec f = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    vec_bits power = (vec_bits)((__builtin_convertvector(n, vec_int) + 127) << 23);
    return (vec)((vec_bits)(p * (vec)power) & ~vanishes);
}
