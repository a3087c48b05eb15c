/* One step of Mixtral in float32 on a CPU: token ids in, logits out, in a single call.
 *
 * Computes what `model/mixtral.py` computes, decodes and prompts, without its two hundred small
 * operations and without the interpreter's lock. Every row is computed alone, in an order that does
 * not depend on the others: its bits are the same in any batch, and a prompt's in any pieces. One
 * thread.
 *
 * Letters: B rows, H hidden size, D head size, Q query heads, K key heads, I intermediate size,
 * E experts, V vocabulary; E' and V' are E and V rounded up to a multiple of 16, which all other
 * sizes are. Matrices are transposed, [inputs, outputs], so that a vector holds 16 outputs.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_cpu_attention.h"
#include "_cpu_vectors.h"

/* One body for each kind of processor; which one runs is decided when the library is loaded. */
#if defined(__x86_64__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define TILE_ROWS 4
#define TILE_COLUMNS 8

typedef struct {
    const float *input_layernorm;          /* [H] */
    const float *qkv;                      /* [H, (Q + 2K) D] */
    const float *o;                        /* [Q D, H] */
    const float *post_attention_layernorm; /* [H] */
    const float *router;                   /* [H, E'] */
    const float *gate_up;                  /* [E, H, 2I] */
    const float *down;                     /* [E, I, H] */
    float *keys;                           /* [slots, K, D] */
    float *values;                         /* [slots, K, D] */
} Layer;

typedef struct {
    int64_t num_layers, hidden, heads, kv_heads, head_dim, inner, experts, top_k, vocab;
    int64_t block_size, window; /* window: 0 is none */
    float eps;
    const float *embedding, *norm, *head; /* [V, H], [H], [H, V'] */
    const float *cos, *sin;               /* [positions, D]; the sign of the rotation is in sin */
    const Layer *layers;
} Model;

/* Each row is a token of the sequence whose blocks are table `owners[row]`. The rows of a sequence are
 * successive tokens. */
typedef struct {
    int64_t count, num_sampled, table_width;
    const int64_t *token_ids, *positions, *slots, *owners; /* [B] */
    const int64_t *sampled;                                /* the rows whose logits are wanted */
    const int64_t *tables;                                 /* [sequences, table_width] */
} Rows;

/* out[r][n] = sum over k of x[r][k] w[k][n], for R rows and N vectors of columns. Every sum goes
 * through k in order, in a lane of its own, for any R and N. */
INLINE void tile(const float *x, const float *w, int64_t n, int64_t k, float *out, int R, int N) {
    vec acc[TILE_ROWS][TILE_COLUMNS];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < N; c++) acc[r][c] = splat(0.0f);
    for (int64_t i = 0; i < k; i++)
        for (int c = 0; c < N; c++) {
            vec weight = load(w + i * n + c * LANES);
            for (int r = 0; r < R; r++) acc[r][c] += x[r * k + i] * weight;
        }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < N; c++) store(out + r * n + c * LANES, acc[r][c]);
}

INLINE void strip(const float *x, const float *w, int64_t n, int64_t k, float *out, int R, int N) {
    int64_t i = 0;
    for (; i + N * LANES <= n; i += N * LANES) tile(x, w + i, n, k, out + i, R, N);
    for (; i < n; i += LANES) tile(x, w + i, n, k, out + i, R, 1);
}

/* out [rows, n] = x [rows, k] times w [k, n]; as many accumulators as there are registers. */
INLINE void multiply(const float *x, int64_t rows, const float *w, int64_t n, int64_t k, float *out) {
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
        const float *some = x + r * k;
        switch (MIN(rows - r, TILE_ROWS)) {
        case 1: strip(some, w, n, k, out + r * n, 1, 8); break;
        case 2: strip(some, w, n, k, out + r * n, 2, 4); break;
        case 3: strip(some, w, n, k, out + r * n, 3, 4); break;
        default: strip(some, w, n, k, out + r * n, 4, 4);
        }
    }
}

INLINE void normalize(const float *x, const float *weight, int64_t size, float eps, float *out) {
    vec squares = splat(0.0f);
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    float scale = 1.0f / sqrtf(sum(squares) / (float)size + eps);
    for (int64_t i = 0; i < size; i += LANES)
        store(out + i, load(x + i) * scale * load(weight + i));
}

/* Rotary embedding of `heads` adjacent heads, pairing element i with i + D / 2. */
INLINE void rotate(float *x, int64_t heads, int64_t dim, const float *cos, const float *sin) {
    for (int64_t h = 0; h < heads; h++, x += dim)
        for (int64_t i = 0; i < dim / 2; i++) {
            int64_t j = i + dim / 2;
            float first = x[i], second = x[j];
            x[i] = first * cos[i] + second * sin[i];
            x[j] = second * cos[j] + first * sin[j];
        }
}

/* Scratch of one step, cut from one allocation. */
typedef struct {
    float *x, *normed, *qkv, *attended, *projected, *router, *grouped, *gate_up, *inner, *scratch;
    float *weights;    /* [B, top_k] */
    int64_t *chosen;   /* [B, top_k] */
    int64_t *members;  /* [B]: the entries of `chosen` that are one expert's */
} Scratch;

/* The tokens from row b on that belong to one sequence, as many as are computed at once. */
INLINE Tile tile_of(const Model *m, const Layer *layer, const Rows *rows, int64_t b) {
    int64_t count = 1, owner = rows->owners[b];
    int64_t max = MIN(MAX_TOKENS, rows->count - b);
    while (count < max && rows->owners[b + count] == owner) count++;
    return (Tile){.keys = layer->keys,
                  .values = layer->values,
                  .table = rows->tables + owner * rows->table_width,
                  .block_size = m->block_size,
                  .window = m->window,
                  .heads = m->heads,
                  .kv_heads = m->kv_heads,
                  .dim = m->head_dim,
                  .position = rows->positions[b],
                  .count = count};
}

INLINE void attention(const Model *m, const Layer *layer, const Rows *rows, Scratch *s) {
    int64_t dim = m->head_dim;
    int64_t width = (m->heads + 2 * m->kv_heads) * dim;
    for (int64_t b = 0; b < rows->count; b++)
        normalize(s->x + b * m->hidden, layer->input_layernorm, m->hidden, m->eps,
                  s->normed + b * m->hidden);
    multiply(s->normed, rows->count, layer->qkv, width, m->hidden, s->qkv);
    for (int64_t b = 0; b < rows->count; b++) {
        float *query = s->qkv + b * width, *key = query + m->heads * dim;
        float *value = key + m->kv_heads * dim;
        int64_t at = rows->positions[b] * dim, slot = rows->slots[b] * m->kv_heads * dim;
        rotate(query, m->heads + m->kv_heads, dim, m->cos + at, m->sin + at);
        memcpy(layer->keys + slot, key, sizeof(float) * m->kv_heads * dim);
        memcpy(layer->values + slot, value, sizeof(float) * m->kv_heads * dim);
    }
    Tile tile = tile_of(m, layer, rows, 0), after = tile;
    Segment first = first_segment(&tile);
    for (int64_t b = 0; b < rows->count; b += tile.count, tile = after) {
        int64_t following = b + tile.count;
        if (following < rows->count) after = tile_of(m, layer, rows, following);
        attend(&tile, following < rows->count ? &after : NULL, &first, s->qkv + b * width, width,
               s->attended + b * m->heads * dim, s->scratch);
    }
    multiply(s->attended, rows->count, layer->o, m->hidden, m->heads * dim, s->projected);
    for (int64_t i = 0; i < rows->count * m->hidden; i += LANES)
        store(s->x + i, load(s->x + i) + load(s->projected + i));
}

/* The top_k experts of one row, and their weights: a softmax over the chosen ones alone. */
INLINE void route(const Model *m, const float *logits, int64_t *chosen, float *weights) {
    float total = 0.0f;
    for (int64_t j = 0; j < m->top_k; j++) {
        int64_t best = -1;
        for (int64_t e = 0; e < m->experts; e++) {
            int is_taken = 0;
            for (int64_t i = 0; i < j; i++) is_taken |= chosen[i] == e;
            if (!is_taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        chosen[j] = best;
        weights[j] = expf(logits[best] - logits[chosen[0]]);
        total += weights[j];
    }
    for (int64_t j = 0; j < m->top_k; j++) weights[j] /= total;
}

INLINE void expert(const Model *m, const Layer *layer, int64_t e, int64_t count, Scratch *s) {
    int64_t inner = m->inner;
    multiply(s->grouped, count, layer->gate_up + e * 2 * inner * m->hidden, 2 * inner, m->hidden,
             s->gate_up);
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < inner; i += LANES) {
            vec gate = load(s->gate_up + r * 2 * inner + i);
            vec up = load(s->gate_up + r * 2 * inner + inner + i);
            store(s->inner + r * inner + i, gate / (1.0f + exponential(-gate)) * up);
        }
    multiply(s->inner, count, layer->down + e * m->hidden * inner, m->hidden, inner, s->projected);
}

INLINE void mixture(const Model *m, const Layer *layer, const Rows *rows, Scratch *s) {
    int64_t hidden = m->hidden, top_k = m->top_k;
    for (int64_t b = 0; b < rows->count; b++)
        normalize(s->x + b * hidden, layer->post_attention_layernorm, hidden, m->eps,
                  s->normed + b * hidden);
    multiply(s->normed, rows->count, layer->router, PADDED(m->experts), hidden, s->router);
    for (int64_t b = 0; b < rows->count; b++)
        route(m, s->router + b * PADDED(m->experts), s->chosen + b * top_k, s->weights + b * top_k);
    for (int64_t e = 0; e < m->experts; e++) {
        int64_t count = 0; /* entries [row, choice] of this expert */
        for (int64_t entry = 0; entry < rows->count * top_k; entry++)
            if (s->chosen[entry] == e) {
                memcpy(s->grouped + count * hidden, s->normed + entry / top_k * hidden,
                       sizeof(float) * hidden);
                s->members[count++] = entry;
            }
        if (!count) continue;
        expert(m, layer, e, count, s);
        for (int64_t r = 0; r < count; r++) {
            float *x = s->x + s->members[r] / top_k * hidden, weight = s->weights[s->members[r]];
            for (int64_t i = 0; i < hidden; i += LANES)
                store(x + i, load(x + i) + weight * load(s->projected + r * hidden + i));
        }
    }
}

static int allocate(const Model *m, const Rows *rows, float **all, Scratch *s) {
    int64_t b = rows->count;
    int64_t queries = m->heads * m->head_dim, keys = m->kv_heads * m->head_dim;
    struct { float **part; int64_t size; } parts[] = {
        {&s->x, b * m->hidden},          {&s->normed, b * m->hidden},
        {&s->qkv, b * (queries + 2 * keys)}, {&s->attended, b * queries},
        {&s->projected, b * m->hidden},  {&s->router, b * PADDED(m->experts)},
        {&s->grouped, b * m->hidden},    {&s->gate_up, b * 2 * m->inner},
        {&s->inner, b * m->inner},       {&s->weights, b * m->top_k},
        {&s->scratch, attention_scratch(m->heads, m->kv_heads, m->head_dim)},
    };
    int64_t total = 0;
    for (size_t i = 0; i < sizeof(parts) / sizeof(*parts); i++) total += parts[i].size + LANES;
    *all = malloc(sizeof(float) * total);
    s->chosen = malloc(sizeof(int64_t) * b * (m->top_k + 1));
    if (!*all || !s->chosen) return -1;
    s->members = s->chosen + b * m->top_k;
    float *next = *all;
    for (size_t i = 0; i < sizeof(parts) / sizeof(*parts); i++) {
        *parts[i].part = next;
        next += PADDED(parts[i].size);
    }
    return 0;
}

FOR_EACH_CPU
static void compute(const Model *m, const Rows *rows, Scratch *s, float *logits) {
    for (int64_t b = 0; b < rows->count; b++)
        memcpy(s->x + b * m->hidden, m->embedding + rows->token_ids[b] * m->hidden,
               sizeof(float) * m->hidden);
    for (int64_t i = 0; i < m->num_layers; i++) {
        attention(m, m->layers + i, rows, s);
        mixture(m, m->layers + i, rows, s);
    }
    for (int64_t i = 0; i < rows->num_sampled; i++)
        normalize(s->x + rows->sampled[i] * m->hidden, m->norm, m->hidden, m->eps,
                  s->normed + i * m->hidden);
    multiply(s->normed, rows->num_sampled, m->head, PADDED(m->vocab), m->hidden, logits);
}

/* Fills `logits` [num_sampled, V'], and the rows' slots of every layer's keys and values. 0, or -1
 * where there is no memory. */
int mixtral_step(const Model *m, const Rows *rows, float *logits) {
    float *all = NULL;
    Scratch s = {0};
    int failed = allocate(m, rows, &all, &s);
    if (!failed) compute(m, rows, &s, logits);
    free(all);
    free(s.chosen);
    return failed;
}
