/* Paged attention for any mix of query lengths, straight from the fused projection.
 *
 * A layer's cache is [num_blocks, key or value, num_kv_heads, block_size * head_dim]. Within a block, values lie
 * [block_size, head_dim] and keys transposed, [head_dim, block_size]: then LANES keys are scored at once, one per lane,
 * with no sum across lanes. block_size and head_dim are multiples of 16.
 *
 * The queries of one sequence that share a key/value head (its tokens times the heads of the group) form one list of
 * rows; TILE_ROWS of them at a time walk the context in chunks of CHUNK keys with an online softmax (Milakov &
 * Gimelshein 2018; Dao et al. 2022), all in float32. Decoding and prefill are the same code. A chunk begins at the same
 * place whatever the tile, so a row's result does not depend on how its prompt was cut.
 */
#include "pool.h"
#include "vectors.h"

#define MAX_HEAD_DIM 256
#define TILE_ROWS 48
#define CHUNK 128     /* keys; a multiple of every vector, while a block may be longer or shorter */
#define PANEL 6       /* rows whose sums are in registers together */
#define DIM_VECTORS 4 /* vectors of a head's dimension that are summed together */
#define SMALL (1 << 21) /* multiplications: below, waking a thread takes longer than it helps */

/* As in Python: octavo_cpu.attention.LayerStructure. */
typedef struct {
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    int64_t window;       /* 0: none */
    float scale, soft_cap; /* soft_cap 0: none */
    const float *rotary;  /* [position, rotary_dim], cosines then sines; or NULL */
    int64_t rotary_dim;
    const void *query_norm, *key_norm; /* [head_dim] of `dtype`, or NULL */
    float query_eps, key_eps;
    int32_t dtype, kv_dtype;
} layer_t;

/* As in Python: octavo_cpu.attention.BatchStructure. */
typedef struct {
    const int64_t *positions, *slots; /* [num_tokens] */
    const int32_t *query_start;       /* [num_rows + 1] */
    const int32_t *seq_lens;          /* [num_rows] */
    const int32_t *block_tables;      /* [num_rows, table_stride] */
    int64_t num_tokens, num_rows, table_stride;
    int32_t num_threads;
} batch_t;

typedef struct {
    const layer_t *layer;
    const batch_t *batch;
    const char *query, *key, *value; /* [num_tokens, heads, head_dim] with the strides below, in bytes */
    int64_t query_stride, key_stride;
    char *kv, *output;
} call_t;

/* One head of one token in float32, normalized and rotated as the layer asks. */
INLINE void prepare_head(float *to, const char *from, const layer_t *layer, const void *norm, float eps,
                         int64_t position, float factor) {
    const int64_t dim = layer->head_dim;
    const dtype_t dtype = layer->dtype;
    for (int64_t d = 0; d < dim; d += LANES) store_float(to + d, load(from, d, dtype));
    if (norm) {
        vec squares = splat(0);
        for (int64_t d = 0; d < dim; d += LANES) squares += load_float(to + d) * load_float(to + d);
        const float inverse = 1.0f / sqrtf(sum(squares) / (float)dim + eps);
        for (int64_t d = 0; d < dim; d += LANES)
            store_float(to + d, load_float(to + d) * inverse * load(norm, d, dtype));
    }
    if (layer->rotary) {
        const int64_t half = layer->rotary_dim / 2;
        const float *cosine = layer->rotary + position * layer->rotary_dim, *sine = cosine + half;
        for (int64_t i = 0; i < half; i++) {
            const float first = to[i], second = to[i + half];
            to[i] = first * cosine[i] - second * sine[i];
            to[i + half] = second * cosine[i] + first * sine[i];
        }
    }
    if (factor != 1.0f)
        for (int64_t d = 0; d < dim; d += LANES) store_float(to + d, load_float(to + d) * factor);
}

INLINE char *block_of(const call_t *call, int64_t block, int64_t which, int64_t head) {
    const layer_t *layer = call->layer;
    const int64_t elements = layer->block_size * layer->head_dim;
    return call->kv + ((block * 2 + which) * layer->num_kv_heads + head) * elements * size_of(layer->kv_dtype);
}

/* Blocks lie anywhere in memory, and the hardware cannot guess where the next one is: few queries would wait for each.
 * Called at a block's first key; behind the first 4 KiB the hardware reads ahead by itself. */
INLINE void prefetch_block(const call_t *call, int64_t block, int64_t which, int64_t head) {
    const int64_t block_bytes = call->layer->block_size * call->layer->head_dim * size_of(call->layer->kv_dtype);
    const char *from = block_of(call, block, which, head);
    for (int64_t i = 0; i < block_bytes && i < 4096; i += 64) __builtin_prefetch(from + i, 0, 2);
}

INLINE void write_tokens(const call_t *call, int64_t first, int64_t last, dtype_t kv_dtype) {
    const layer_t *layer = call->layer;
    const int64_t dim = layer->head_dim, head_bytes = dim * size_of(layer->dtype);
    float key[MAX_HEAD_DIM];
    for (int64_t token = first; token < last; token++) {
        const int64_t block = call->batch->slots[token] / layer->block_size;
        const int64_t offset = call->batch->slots[token] % layer->block_size;
        for (int64_t head = 0; head < layer->num_kv_heads; head++) {
            const char *from = call->key + token * call->key_stride + head * head_bytes;
            prepare_head(key, from, layer, layer->key_norm, layer->key_eps, call->batch->positions[token], 1.0f);
            char *keys = block_of(call, block, 0, head);
            for (int64_t d = 0; d < dim; d += LANES) {
                const vec part = load_float(key + d);
                const vec_half half = to_bfloat16(part);
                for (int lane = 0; lane < LANES; lane++) {
                    const int64_t to = (d + lane) * layer->block_size + offset;
                    if (kv_dtype == FLOAT32)
                        ((float *)keys)[to] = part[lane];
                    else
                        ((uint16_t *)keys)[to] = half[lane];
                }
            }
            char *values = block_of(call, block, 1, head);
            from = call->value + token * call->key_stride + head * head_bytes;
            for (int64_t d = 0; d < dim; d += LANES)
                store(values, offset * dim + d, load(from, d, layer->dtype), kv_dtype);
        }
    }
}

static void write_share(void *work, int thread, int num_threads) {
    const call_t *call = work;
    const int64_t num_tokens = call->batch->num_tokens;
    const int64_t first = num_tokens * thread / num_threads, last = num_tokens * (thread + 1) / num_threads;
    if (call->layer->kv_dtype == FLOAT32)
        write_tokens(call, first, last, FLOAT32);
    else
        write_tokens(call, first, last, BFLOAT16);
}

/* scores[row][0 .. num_vectors * LANES] = queries · keys, for `num_vectors` vectors of transposed keys. */
INLINE void score(float *scores, const float *queries, const char *const *keys, int num_vectors, int64_t dim,
                  int64_t block_size, int num_rows, dtype_t kv_dtype) {
    vec sums[PANEL][2];
    for (int row = 0; row < num_rows; row++)
        for (int v = 0; v < num_vectors; v++) sums[row][v] = splat(0);
    for (int64_t d = 0; d < dim; d++) {
        vec key[2];
        for (int v = 0; v < num_vectors; v++) key[v] = load(keys[v], d * block_size, kv_dtype);
        for (int row = 0; row < num_rows; row++) {
            const float query = queries[row * dim + d];
            for (int v = 0; v < num_vectors; v++) sums[row][v] += query * key[v];
        }
    }
    for (int row = 0; row < num_rows; row++)
        for (int v = 0; v < num_vectors; v++) store_float(scores + row * CHUNK + v * LANES, sums[row][v]);
}

/* sums[row][0 .. num_vectors * LANES] += weights · values, over `num_keys` rows of values. */
INLINE void accumulate(float *sums, const float *weights, const char *values, int64_t num_keys, int num_vectors,
                       int64_t dim, int num_rows, dtype_t kv_dtype) {
    vec total[PANEL][DIM_VECTORS];
    for (int row = 0; row < num_rows; row++)
        for (int v = 0; v < num_vectors; v++) total[row][v] = load_float(sums + row * dim + v * LANES);
    for (int64_t key = 0; key < num_keys; key++) {
        vec value[DIM_VECTORS];
        for (int v = 0; v < num_vectors; v++) value[v] = load(values, key * dim + v * LANES, kv_dtype);
        for (int row = 0; row < num_rows; row++) {
            const float weight = weights[row * CHUNK + key];
            for (int v = 0; v < num_vectors; v++) total[row][v] += weight * value[v];
        }
    }
    for (int row = 0; row < num_rows; row++)
        for (int v = 0; v < num_vectors; v++) store_float(sums + row * dim + v * LANES, total[row][v]);
}

/* A chunk's keys, `LANES` at a time in one block each: where vector `index` of it begins. */
INLINE const char *key_vector(const call_t *call, const int32_t *table, int64_t head, int64_t key, dtype_t kv_dtype) {
    const int64_t block_size = call->layer->block_size;
    return block_of(call, table[key / block_size], 0, head) + key % block_size * size_of(kv_dtype);
}

INLINE void score_panel(const call_t *call, float *scores, const float *queries, const int32_t *table, int64_t head,
                        int64_t begin, int64_t end, int few, int num_rows, dtype_t kv_dtype) {
    const int64_t dim = call->layer->head_dim, block_size = call->layer->block_size;
    int64_t key = begin;
    for (; key + LANES < end; key += 2 * LANES) {
        if (few) /* their values are next */
            for (int64_t near = key; near < key + 2 * LANES; near += LANES)
                if (near % block_size == 0) prefetch_block(call, table[near / block_size], 1, head);
        const char *keys[2] = {key_vector(call, table, head, key, kv_dtype),
                               key_vector(call, table, head, key + LANES, kv_dtype)};
        score(scores + (key - begin), queries, keys, 2, dim, block_size, num_rows, kv_dtype);
    }
    if (key < end) {
        const char *keys[1] = {key_vector(call, table, head, key, kv_dtype)};
        score(scores + (key - begin), queries, keys, 1, dim, block_size, num_rows, kv_dtype);
    }
}

/* `next_table` and `next_head`: where the tile after this one will look for its keys; `next_table` may be NULL. */
INLINE void accumulate_panel(const call_t *call, float *sums, const float *weights, const int32_t *table, int64_t head,
                             int64_t begin, int64_t end, const int32_t *next_table, int64_t next_head, int num_rows,
                             dtype_t kv_dtype) {
    const int64_t dim = call->layer->head_dim, block_size = call->layer->block_size, step = DIM_VECTORS * LANES;
    for (int64_t key = begin; key < end;) {
        const int64_t offset = key % block_size, left = end - key;
        const int64_t num_keys = left < block_size - offset ? left : block_size - offset;
        const char *values = block_of(call, table[key / block_size], 1, head) + offset * dim * size_of(kv_dtype);
        const float *from = weights + (key - begin);
        if (next_table && offset == 0) prefetch_block(call, next_table[key / block_size], 0, next_head);
        int64_t d = 0;
        for (; d + step <= dim; d += step)
            accumulate(sums + d, from, values + d * size_of(kv_dtype), num_keys, DIM_VECTORS, dim, num_rows, kv_dtype);
        for (; d < dim; d += LANES)
            accumulate(sums + d, from, values + d * size_of(kv_dtype), num_keys, 1, dim, num_rows, kv_dtype);
        key += num_keys;
    }
}

typedef struct {
    float largest, total; /* of the exponentials so far */
} softmax_t;

/* Turns a row's scores into weights, keys outside [first, last) into zeros; rescales what was summed before. */
INLINE void soften(float *scores, softmax_t *state, float *sums, const layer_t *layer, int64_t num_keys, int64_t first,
                   int64_t last) {
    const int64_t padded = (num_keys + LANES - 1) / LANES * LANES;
    if (first >= last) {
        memset(scores, 0, padded * sizeof(float));
        return;
    }
    if (layer->soft_cap != 0) /* tanh(x) = 1 - 2 / (e^2x + 1) */
        for (int64_t i = 0; i < padded; i += LANES) {
            const vec twice = exponential(load_float(scores + i) * (2.0f / layer->soft_cap));
            store_float(scores + i, layer->soft_cap * (1.0f - 2.0f / (twice + 1.0f)));
        }
    for (int64_t i = 0; i < first; i++) scores[i] = -INFINITY;
    for (int64_t i = last; i < padded; i++) scores[i] = -INFINITY;
    vec most = splat(state->largest);
    for (int64_t i = 0; i < padded; i += LANES) most = maximum(most, load_float(scores + i));
    const float now = largest(most);
    vec total = splat(0);
    for (int64_t i = 0; i < padded; i += LANES) {
        const vec weight = exponential(load_float(scores + i) - now);
        store_float(scores + i, weight);
        total += weight;
    }
    if (now != state->largest && state->largest != -INFINITY) {
        const float factor = expf(state->largest - now);
        for (int64_t d = 0; d < layer->head_dim; d += LANES) store_float(sums + d, load_float(sums + d) * factor);
        state->total *= factor;
    }
    state->largest = now;
    state->total += sum(total);
}

/* Rows [first, last) of the list of (token, head of the group) of one sequence and one key/value head. */
INLINE void attend_tile(const call_t *call, int64_t row, int64_t head, int64_t first, int64_t last, dtype_t kv_dtype) {
    const layer_t *layer = call->layer;
    const batch_t *batch = call->batch;
    const int64_t dim = layer->head_dim, group = layer->num_heads / layer->num_kv_heads, num_rows = last - first;
    const int64_t query_begin = batch->query_start[row], query_len = batch->query_start[row + 1] - query_begin;
    const int64_t context_before = batch->seq_lens[row] - query_len;
    const int64_t size = size_of(layer->dtype);
    const int32_t *table = batch->block_tables + row * batch->table_stride;

    float queries[TILE_ROWS * MAX_HEAD_DIM], sums[TILE_ROWS * MAX_HEAD_DIM], scores[TILE_ROWS * CHUNK];
    softmax_t states[TILE_ROWS];
    for (int64_t i = 0; i < num_rows; i++) {
        const int64_t token = query_begin + (first + i) / group, query_head = head * group + (first + i) % group;
        prepare_head(queries + i * dim, call->query + token * call->query_stride + query_head * dim * size, layer,
                     layer->query_norm, layer->query_eps, batch->positions[token], layer->scale);
        states[i] = (softmax_t){-INFINITY, 0};
    }
    memset(sums, 0, num_rows * dim * sizeof(float));

    const int few = num_rows <= PANEL;
    const int64_t next_head = head + 1 < layer->num_kv_heads ? head + 1 : 0, next_row = next_head ? row : row + 1;
    const int32_t *next_table =
        few && next_row < batch->num_rows ? batch->block_tables + next_row * batch->table_stride : NULL;

    const int64_t end = context_before + (last - 1) / group + 1;
    const int64_t oldest = layer->window ? context_before + first / group - layer->window + 1 : 0;
    for (int64_t begin = oldest > 0 ? oldest / CHUNK * CHUNK : 0; begin < end; begin += CHUNK) {
        const int64_t num_keys = end - begin < CHUNK ? end - begin : CHUNK;
        for (int64_t i = 0; i < num_rows; i += PANEL) {
            const int64_t left = num_rows - i < PANEL ? num_rows - i : PANEL;
            float *panel_scores = scores + i * CHUNK, *panel_sums = sums + i * dim;
            const float *panel_queries = queries + i * dim;
#define WITH_ROWS(function, ...)                                      \
    switch (left) {                                                   \
    case 1: function(call, __VA_ARGS__, 1, kv_dtype); break;          \
    case 2: function(call, __VA_ARGS__, 2, kv_dtype); break;          \
    case 3: function(call, __VA_ARGS__, 3, kv_dtype); break;          \
    case 4: function(call, __VA_ARGS__, 4, kv_dtype); break;          \
    case 5: function(call, __VA_ARGS__, 5, kv_dtype); break;          \
    case 6: function(call, __VA_ARGS__, 6, kv_dtype); break;          \
    }
            WITH_ROWS(score_panel, panel_scores, panel_queries, table, head, begin, begin + num_keys, few)
            for (int64_t j = i; j < i + left; j++) {
                const int64_t position = context_before + (first + j) / group;
                const int64_t newest = position + 1 - begin;
                const int64_t eldest = layer->window ? position - layer->window + 1 - begin : 0;
                soften(scores + j * CHUNK, states + j, sums + j * dim, layer, num_keys, eldest > 0 ? eldest : 0,
                       newest < num_keys ? newest : num_keys);
            }
            WITH_ROWS(accumulate_panel, panel_sums, panel_scores, table, head, begin, begin + num_keys, next_table,
                      next_head)
#undef WITH_ROWS
        }
    }
    for (int64_t i = 0; i < num_rows; i++) {
        const int64_t token = query_begin + (first + i) / group, query_head = head * group + (first + i) % group;
        char *to = call->output + (token * layer->num_heads + query_head) * dim * size;
        const float factor = 1.0f / states[i].total;
        for (int64_t d = 0; d < dim; d += LANES) store(to, d, load_float(sums + i * dim + d) * factor, layer->dtype);
    }
}

INLINE void attend_rows(const call_t *call, int thread, int num_threads, dtype_t kv_dtype) {
    const layer_t *layer = call->layer;
    const batch_t *batch = call->batch;
    const int64_t group = layer->num_heads / layer->num_kv_heads;
    int64_t tile = 0; /* tiles are dealt out in turn: long and short ones mix */
    for (int64_t row = 0; row < batch->num_rows; row++) {
        const int64_t num_queries = (batch->query_start[row + 1] - batch->query_start[row]) * group;
        for (int64_t head = 0; head < layer->num_kv_heads; head++)
            for (int64_t first = 0; first < num_queries; first += TILE_ROWS)
                if (tile++ % num_threads == thread) {
                    const int64_t last = first + TILE_ROWS < num_queries ? first + TILE_ROWS : num_queries;
                    attend_tile(call, row, head, first, last, kv_dtype);
                }
    }
}

static void attend_share(void *work, int thread, int num_threads) {
    const call_t *call = work;
    if (call->layer->kv_dtype == FLOAT32)
        attend_rows(call, thread, num_threads, FLOAT32);
    else
        attend_rows(call, thread, num_threads, BFLOAT16);
}

/* Writes this step's keys and values into the cache, then attends. Strides are in elements between tokens; output is
 * [num_tokens, num_heads, head_dim]. */
void attention(const layer_t *layer, const batch_t *batch, const void *query, int64_t query_stride, const void *key,
               const void *value, int64_t key_stride, void *kv, void *output) {
    const int64_t size = size_of(layer->dtype);
    call_t call = {layer, batch, query, key, value, query_stride * size, key_stride * size, kv, output};
    int64_t pairs = 0; /* of a query and a key, from above */
    for (int64_t row = 0; row < batch->num_rows; row++)
        pairs += (int64_t)(batch->query_start[row + 1] - batch->query_start[row]) * batch->seq_lens[row];
    const int num_threads = 2 * pairs * layer->num_heads * layer->head_dim < SMALL ? 1 : batch->num_threads;
    run_shares(write_share, &call, num_threads);
    run_shares(attend_share, &call, num_threads);
}
