/* y = x Wᵀ + b with W[n, k] = value[n, k] * scale[g, n] + offset[g, n], g = k / group_size: weights of 4 or 8 bits.
 *
 * They lie in tiles as in linear.c and are read from memory as the few bytes that they are. One panel of rows widens
 * them in registers; several share chunks that are widened into the first-level cache. bfloat16 holds the values
 * exactly. The scale goes on the sums in float32, and the offset on the sum of the group's inputs. The order of all that
 * is the layer's, so a row's result does not depend on its neighbours.
 */
#include "pool.h"
#include "tile.h"

#define ROWS (16 * PANEL)     /* that share a widened chunk */
#define CHUNK_BYTES (1 << 14) /* of widened weights: half of a small first-level cache */

/* As in Python: octavo_cpu.quantized.FORMATS. */
typedef enum { UNSIGNED4 = 0, SIGNED8 = 1, FLOAT8 = 2 } format_t;

/* As in Python: octavo_cpu.quantized.QuantizedStructure. */
typedef struct {
    const uint8_t *weights;
    const float *scales;  /* [num_groups, padded outputs] */
    const float *offsets; /* the same shape, or NULL */
    const float *bias;    /* [out_features], or NULL */
    int64_t in_features, out_features, group_size;
    int32_t format, dtype;
} quantized_t;

typedef struct {
    const quantized_t *layer;
    const char *x;
    char *y;
    int64_t num_rows;
    const float *input_sums; /* [num_rows, num_groups], if there are offsets */
} product_t;

/* Where a value lies: the byte within a tile of weights, and its lowest bit. */
typedef struct {
    int64_t byte;
    int bit;
} place_t;

/* A step is what lies side by side in a widened tile: one input, or two in bfloat16. Of a step of 8 bits each value has
 * its byte; integers of two inputs lie behind each other for each vector of outputs, as they are converted. Of 4 bits the
 * step is cut into parts, one above the other, so that a shift gives a part in order. */
static place_t place(int64_t input, int64_t output, int32_t format, int32_t dtype) {
    const int64_t per_step = dtype == BFLOAT16 ? 2 : 1, size = TILE * per_step;
    const int64_t step = input / per_step, index = output * per_step + input % per_step;
    if (format == SIGNED8 && dtype == BFLOAT16)
        return (place_t){step * size + output / LANES * 2 * LANES + input % 2 * LANES + output % LANES, 0};
    if (format != UNSIGNED4) return (place_t){step * size + index, 0};
    const int64_t element = dtype == BFLOAT16 ? 2 : 1, num_parts = 2 * element; /* bytes, values in an element */
    const int64_t part = index / (size / num_parts), within = index % (size / num_parts);
    const int bit = (int)part * 4;
    return (place_t){step * size / 2 + within * element + bit / 8, bit % 8};
}

/* Bytes of packed weights. */
int64_t quantized_bytes(int64_t out_features, int64_t in_features, int32_t format) {
    return padded_to_tiles(out_features) * in_features / (format == UNSIGNED4 ? 2 : 1);
}

/* values [out_features, in_features], a byte each -> packed, which must be zero before. */
void quantized_pack(uint8_t *packed, const uint8_t *values, int64_t out_features, int64_t in_features, int32_t format,
                    int32_t dtype) {
    for (int64_t output = 0; output < out_features; output++) {
        uint8_t *tile = packed + quantized_bytes(output / TILE * TILE, in_features, format);
        for (int64_t input = 0; input < in_features; input++) {
            const place_t where = place(input, output % TILE, format, dtype);
            tile[where.byte] |= (uint8_t)(values[output * in_features + input] << where.bit);
        }
    }
}

#if defined(__AVX512BF16__)
/* Pairs of integers, which bfloat16 holds exactly: the upper halves of float32. */
INLINE __m512i pair_up(__m512i even, __m512i odd) {
    even = _mm512_srli_epi32((__m512i)_mm512_cvtepi32_ps(even), 16);
    odd = (__m512i)_mm512_cvtepi32_ps(odd);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, even, odd);
}

/* For the widening of 4 bits, value - 8 for the low four bits of an index, whatever the fifth; of FP8, the numbers
 * below the smallest normal one for the low three bits. */
INLINE __m512i small_numbers(format_t format) {
    uint16_t numbers[32];
    for (int i = 0; i < 32; i++) {
        const float number = format == UNSIGNED4 ? (float)(i % 16 - 8) : (float)(i % 8) * 0x1p-9f;
        uint32_t bits;
        memcpy(&bits, &number, sizeof bits);
        numbers[i] = (uint16_t)(bits >> 16);
    }
    return _mm512_loadu_si512(numbers);
}

/* 32 values of FP8 (e4m3): the exponent of bfloat16 is 120 more. */
INLINE __m512i from_float8(__m512i words, __m512i subnormal) {
    const __m512i sign = _mm512_set1_epi16((short)0x8000), exponent = _mm512_set1_epi16(120 << 7);
    const __m512i moved = _mm512_and_si512(_mm512_slli_epi16(words, 4), _mm512_set1_epi16(0x07f0));
    const __mmask32 is_subnormal = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x78));
    const __m512i normal = _mm512_add_epi16(moved, exponent);
    const __m512i number = _mm512_mask_permutexvar_epi16(normal, is_subnormal, words, subnormal);
    return _mm512_or_si512(number, _mm512_and_si512(words, sign));
}

/* Vector v of a step, two inputs of LANES outputs; `small` as from `small_numbers`. */
INLINE __m512i widen(const uint8_t *step, int v, __m512i small, format_t format) {
    if (format == UNSIGNED4)
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_loadu_si512(step), 4 * v), small);
    const uint8_t *bytes = step + v * 2 * LANES;
    if (format == FLOAT8)
        return from_float8(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)bytes)), small);
    return pair_up(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)bytes)),
                   _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(bytes + LANES))));
}

/* Pairs of inputs of a tile, widened. */
INLINE void widen_pairs(uint8_t *to, const uint8_t *from, int64_t num_pairs, format_t format) {
    const __m512i small = small_numbers(format);
    const int64_t step = quantized_bytes(TILE, 2, format);
    for (int64_t pair = 0; pair < num_pairs; pair++)
        for (int v = 0; v < TILE_VECTORS; v++)
            _mm512_storeu_si512(to + (pair * TILE + v * LANES) * 4, widen(from + pair * step, v, small, format));
}

/* As `multiply`, with weights that are widened in registers. */
INLINE void multiply_pairs(vec sums[PANEL][TILE_VECTORS], const char *x, int64_t row_bytes, const uint8_t *weights,
                           int64_t num_pairs, int num_rows, format_t format) {
    const __m512i small = small_numbers(format);
    const int64_t step = quantized_bytes(TILE, 2, format);
    for (int64_t pair = 0; pair < num_pairs; pair++)
        for (int v = 0; v < TILE_VECTORS; v++) {
            const __m512bh weight = (__m512bh)widen(weights + pair * step, v, small, format);
            for (int row = 0; row < num_rows; row++) {
                int32_t two;
                memcpy(&two, x + row * row_bytes + pair * 4, 4);
                const __m512bh values = (__m512bh)_mm512_set1_epi32(two);
                sums[row][v] = (vec)_mm512_dpbf16_ps((__m512)sums[row][v], weight, values);
            }
        }
}
#endif

/* Inputs of a tile in float32. */
INLINE void widen_floats(float *to, const uint8_t *from, int64_t num_inputs, format_t format) {
    for (int64_t input = 0; input < num_inputs; input++, to += TILE) {
        if (format == UNSIGNED4) {
            for (int i = 0; i < TILE / 2; i++) to[i] = (float)((from[i] & 15) - 8);
            for (int i = 0; i < TILE / 2; i++) to[TILE / 2 + i] = (float)((from[i] >> 4) - 8);
            from += TILE / 2;
        } else if (format == SIGNED8) {
            for (int i = 0; i < TILE; i++) to[i] = (float)(int8_t)from[i];
            from += TILE;
        } else {
            for (int i = 0; i < TILE; i++) {
                /* the bits in the places of float32, whose exponent is 120 more */
                const uint32_t bits = (uint32_t)(from[i] & 0x80) << 24 | (uint32_t)(from[i] & 0x7f) << 20;
                float tiny;
                memcpy(&tiny, &bits, sizeof tiny);
                to[i] = tiny * 0x1p120f;
            }
            from += TILE;
        }
    }
}

/* totals[row] += scale * (x [num_rows, num_inputs] times a chunk of weights), which is widened already or not */
INLINE void add_chunk(vec totals[PANEL][TILE_VECTORS], const vec scale[TILE_VECTORS], const char *x, int64_t row_bytes,
                      const uint8_t *chunk, int is_wide, int64_t num_inputs, int num_rows, format_t format,
                      dtype_t dtype) {
    vec sums[PANEL][TILE_VECTORS] = {{{0}}};
#if defined(__AVX512BF16__)
    if (!is_wide) multiply_pairs(sums, x, row_bytes, chunk, num_inputs / 2, num_rows, format);
#endif
    if (is_wide) multiply(sums, x, row_bytes, (const char *)chunk, num_inputs, num_rows, dtype);
    for (int row = 0; row < num_rows; row++)
        for (int v = 0; v < TILE_VECTORS; v++) totals[row][v] += scale[v] * sums[row][v];
}

/* All panels of up to ROWS rows times inputs [begin, end) of a tile, which are of one group. */
INLINE void add_inputs(vec totals[ROWS][TILE_VECTORS], const vec scale[TILE_VECTORS], const char *x, int64_t row_bytes,
                       const uint8_t *weights, int64_t begin, int64_t end, int64_t num_rows, format_t format,
                       dtype_t dtype) {
    const int64_t num_panels = (num_rows + PANEL - 1) / PANEL, size = size_of(dtype);
    const int is_wide = dtype == FLOAT32 || num_panels > 1;
    const int64_t longest = is_wide ? CHUNK_BYTES / (TILE * size) : end - begin;
    uint8_t wide[CHUNK_BYTES] __attribute__((aligned(64)));
    for (int64_t input = begin, next; input < end; input = next) {
        next = input + longest < end ? input + longest : end;
        const uint8_t *chunk = weights + quantized_bytes(TILE, input, format);
#if defined(__AVX512BF16__)
        if (dtype == BFLOAT16 && is_wide) widen_pairs(wide, chunk, (next - input) / 2, format);
#endif
        if (dtype == FLOAT32) widen_floats((float *)wide, chunk, next - input, format);
        if (is_wide) chunk = wide;
        for (int64_t panel = 0; panel < num_panels; panel++) {
            const int64_t row = num_rows * panel / num_panels;
            const char *part = x + row * row_bytes + input * size;
            switch (num_rows * (panel + 1) / num_panels - row) { /* a known number stays in registers */
#define CASE(count) \
    case count: \
        if (is_wide) \
            add_chunk(totals + row, scale, part, row_bytes, chunk, 1, next - input, count, format, dtype); \
        else \
            add_chunk(totals + row, scale, part, row_bytes, chunk, 0, next - input, count, format, dtype); \
        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
            }
        }
    }
}

INLINE void multiply_tile(const product_t *product, int64_t tile, int64_t first_row, int64_t num_rows, format_t format,
                          dtype_t dtype) {
    const quantized_t *layer = product->layer;
    const int64_t size = size_of(dtype), in_features = layer->in_features, out_features = layer->out_features;
    const int64_t padded = padded_to_tiles(out_features);
    const int64_t num_groups = (in_features + layer->group_size - 1) / layer->group_size;
    const uint8_t *weights = layer->weights + quantized_bytes(tile, in_features, format);
    const char *x = product->x + first_row * in_features * size;
    vec totals[ROWS][TILE_VECTORS];
    memset(totals, 0, num_rows * sizeof totals[0]);
    for (int64_t group = 0; group < num_groups; group++) {
        const int64_t begin = group * layer->group_size;
        const int64_t end = begin + layer->group_size < in_features ? begin + layer->group_size : in_features;
        vec scale[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; v++)
            scale[v] = load_float(layer->scales + group * padded + tile + v * LANES);
        add_inputs(totals, scale, x, in_features * size, weights, begin, end, num_rows, format, dtype);
        if (layer->offsets)
            for (int64_t row = 0; row < num_rows; row++) {
                const float sum = product->input_sums[(first_row + row) * num_groups + group];
                for (int v = 0; v < TILE_VECTORS; v++)
                    totals[row][v] += sum * load_float(layer->offsets + group * padded + tile + v * LANES);
            }
    }

    const int64_t num_outputs = out_features - tile < TILE ? out_features - tile : TILE;
    float bias[TILE] = {0};
    if (layer->bias) memcpy(bias, layer->bias + tile, num_outputs * sizeof(float));
    for (int64_t row = 0; row < num_rows; row++) {
        char whole[TILE * 4];
        for (int v = 0; v < TILE_VECTORS; v++)
            store(whole, v * LANES, totals[row][v] + load_float(bias + v * LANES), dtype);
        memcpy(product->y + ((first_row + row) * out_features + tile) * size, whole, num_outputs * size);
    }
}

INLINE void multiply_tiles(const product_t *product, int thread, int num_threads, format_t format, dtype_t dtype) {
    const int64_t num_tiles = padded_to_tiles(product->layer->out_features) / TILE;
    const int64_t first = num_tiles * thread / num_threads, last = num_tiles * (thread + 1) / num_threads;
    for (int64_t tile = first; tile < last; tile++)
        for (int64_t row = 0; row < product->num_rows; row += ROWS) {
            const int64_t num_rows = product->num_rows - row < ROWS ? product->num_rows - row : ROWS;
            multiply_tile(product, tile * TILE, row, num_rows, format, dtype);
        }
}

static void multiply_share(void *work, int thread, int num_threads) {
    const product_t *product = work;
    const int is_float = product->layer->dtype == FLOAT32;
    switch (product->layer->format * 2 + is_float) { /* each its own code */
    case UNSIGNED4 * 2: multiply_tiles(product, thread, num_threads, UNSIGNED4, BFLOAT16); break;
    case UNSIGNED4 * 2 + 1: multiply_tiles(product, thread, num_threads, UNSIGNED4, FLOAT32); break;
    case SIGNED8 * 2: multiply_tiles(product, thread, num_threads, SIGNED8, BFLOAT16); break;
    case SIGNED8 * 2 + 1: multiply_tiles(product, thread, num_threads, SIGNED8, FLOAT32); break;
    case FLOAT8 * 2: multiply_tiles(product, thread, num_threads, FLOAT8, BFLOAT16); break;
    case FLOAT8 * 2 + 1: multiply_tiles(product, thread, num_threads, FLOAT8, FLOAT32); break;
    }
}

/* The sum of each group's inputs, [num_rows, num_groups]. */
static void sum_inputs(float *sums, const quantized_t *layer, const void *x, int64_t num_rows) {
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t begin = 0; begin < layer->in_features; begin += layer->group_size) {
            const int64_t first = row * layer->in_features + begin;
            const int64_t rest = layer->in_features - begin;
            const int64_t count = layer->group_size < rest ? layer->group_size : rest;
            vec total = {0};
            int64_t i = 0;
            for (; i + LANES <= count; i += LANES) total += load(x, first + i, layer->dtype);
            float whole = sum(total);
            for (; i < count; i++) whole += load_one(x, first + i, layer->dtype);
            *sums++ = whole;
        }
}

/* x [num_rows, in_features] -> y [num_rows, out_features], both of the layer's dtype. `input_sums` has room for
 * [num_rows, num_groups] floats, if there are offsets. */
void quantized(const quantized_t *layer, const void *x, void *y, float *input_sums, int64_t num_rows,
               int32_t num_threads) {
    product_t product = {layer, x, y, num_rows, input_sums};
    const int64_t work = layer->in_features * layer->out_features * ((num_rows + PANEL - 1) / PANEL);
    if (layer->offsets) sum_inputs(input_sums, layer, x, num_rows);
    run_shares(multiply_share, &product, work < SMALL ? 1 : num_threads);
}
