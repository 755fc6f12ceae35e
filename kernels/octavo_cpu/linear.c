/* y = x Wᵀ + b over weights that are packed once.
 *
 * The weights lie in tiles of TILE outputs: [tile, input, output within the tile], so that whatever the number of rows,
 * they are read from memory once, front to back. A panel of up to PANEL rows is multiplied by a tile at a time, its sums
 * in registers. In bfloat16 two inputs lie side by side, [tile, input / 2, output, 2], as the dot-product instruction takes
 * them. Every sum runs over the inputs in the same order, so a row's result does not depend on its neighbours.
 */
#include "pool.h"
#include "tile.h"

/* As in Python: octavo_cpu.linear.PackedLinear. */
typedef struct {
    const void *weights;
    const void *bias; /* [out_features] float32, or NULL */
    int64_t in_features, out_features;
    int32_t dtype;
} linear_t;

typedef struct {
    const linear_t *layer;
    const char *x;
    char *y;
    int64_t num_rows;
} product_t;

/* Whether this library multiplies in `dtype`. */
int32_t linear_supports(int32_t dtype) {
#if defined(__AVX512BF16__)
    return dtype == FLOAT32 || dtype == BFLOAT16;
#else
    return dtype == FLOAT32;
#endif
}

/* Outputs are padded to whole tiles with zeros. */
int64_t linear_padded(int64_t out_features) { return padded_to_tiles(out_features); }

/* weight [out_features, in_features] -> packed, `linear_padded(out_features) * in_features` elements. */
void linear_pack(void *packed, const void *weight, int64_t out_features, int64_t in_features, int32_t dtype) {
    const int64_t pair = dtype == BFLOAT16 ? 2 : 1, padded = linear_padded(out_features);
    for (int64_t tile = 0; tile < padded; tile += TILE)
        for (int64_t input = 0; input < in_features; input++)
            for (int64_t output = 0; output < TILE; output++) {
                const int64_t to = tile * in_features + (input / pair * TILE + output) * pair + input % pair;
                const int64_t from = (tile + output) * in_features + input;
                const int inside = tile + output < out_features;
                if (dtype == FLOAT32)
                    ((float *)packed)[to] = inside ? ((const float *)weight)[from] : 0;
                else
                    ((uint16_t *)packed)[to] = inside ? ((const uint16_t *)weight)[from] : 0;
            }
}

INLINE void multiply_panel(const linear_t *layer, const char *x, char *y, int64_t tile, int num_rows,
                           dtype_t dtype) {
    const int64_t in_features = layer->in_features, out_features = layer->out_features;
    const int64_t size = size_of(dtype);
    const char *weights = (const char *)layer->weights + tile * in_features * size;
    const int64_t num_outputs = out_features - tile < TILE ? out_features - tile : TILE;
    vec sums[PANEL][TILE_VECTORS] = {{{0}}};
    multiply(sums, x, in_features * size, weights, in_features, num_rows, dtype);
    float bias[TILE] = {0};
    if (layer->bias) memcpy(bias, (const float *)layer->bias + tile, num_outputs * sizeof(float));
    for (int row = 0; row < num_rows; row++) {
        char whole[TILE * 4];
        char *to = y + (row * out_features + tile) * size;
        char *target = num_outputs == TILE ? to : whole;
        for (int v = 0; v < TILE_VECTORS; v++)
            store(target, v * LANES, sums[row][v] + load_float(bias + v * LANES), dtype);
        if (target != to) memcpy(to, whole, num_outputs * size);
    }
}

INLINE void multiply_rows(const product_t *product, int thread, int num_threads, dtype_t dtype) {
    const linear_t *layer = product->layer;
    const int64_t num_tiles = linear_padded(layer->out_features) / TILE;
    const int64_t first = num_tiles * thread / num_threads, last = num_tiles * (thread + 1) / num_threads;
    const int64_t num_panels = (product->num_rows + PANEL - 1) / PANEL;
    const int64_t row_bytes = layer->in_features * size_of(dtype);
    for (int64_t tile = first; tile < last; tile++)
        for (int64_t panel = 0; panel < num_panels; panel++) {
            /* as even as can be: 8 rows are 4 + 4, not 6 + 2 */
            const int64_t row = product->num_rows * panel / num_panels;
            const char *x = product->x + row * row_bytes;
            char *y = product->y + row * layer->out_features * size_of(dtype);
            switch (product->num_rows * (panel + 1) / num_panels - row) { /* a known number stays in registers */
            case 1: multiply_panel(layer, x, y, tile * TILE, 1, dtype); break;
            case 2: multiply_panel(layer, x, y, tile * TILE, 2, dtype); break;
            case 3: multiply_panel(layer, x, y, tile * TILE, 3, dtype); break;
            case 4: multiply_panel(layer, x, y, tile * TILE, 4, dtype); break;
            case 5: multiply_panel(layer, x, y, tile * TILE, 5, dtype); break;
            case 6: multiply_panel(layer, x, y, tile * TILE, 6, dtype); break;
            }
        }
}

static void multiply_share(void *work, int thread, int num_threads) {
    const product_t *product = work;
    if (product->layer->dtype == FLOAT32)
        multiply_rows(product, thread, num_threads, FLOAT32);
    else
        multiply_rows(product, thread, num_threads, BFLOAT16);
}

/* x [num_rows, in_features] -> y [num_rows, out_features], both of the layer's dtype. */
void linear(const linear_t *layer, const void *x, void *y, int64_t num_rows, int32_t num_threads) {
    product_t product = {layer, x, y, num_rows};
    const int64_t work = layer->in_features * layer->out_features * ((num_rows + PANEL - 1) / PANEL);
    run_shares(multiply_share, &product, work < SMALL ? 1 : num_threads);
}
