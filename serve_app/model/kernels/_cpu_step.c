/* One step of Mixtral in float32 on a CPU: token ids in, logits out, in a single call.
 *
 * Computes what `model/mixtral.py` computes, decodes and prompts, without its two hundred small
 * operations and without the interpreter's lock. Every row is computed alone, in an order that does
 * not depend on the others: its bits are the same in any batch, and a prompt's in any pieces. One
 * thread.
 *
 * Letters: B rows, H hidden size, D head size, Q query heads, K key heads, I inner size,
 * E experts, V vocabulary; E' and V' are E and V rounded up to a multiple of 16, which all other
 * sizes are. Matrices are transposed, [inputs, outputs], so that a vector holds 16 outputs.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));

#define INLINE static inline __attribute__((always_inline))
/* One body for each kind of processor; which one runs is decided when the library is loaded. */
#if defined(__x86_64__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define TILE_ROWS 4
#define TILE_COLUMNS 8
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)

typedef struct {
    const float *attention_norm; /* [H] */
    const float *qkv;            /* [H, (Q + 2K) D] */
    const float *o;              /* [Q D, H] */
    const float *mlp_norm;       /* [H] */
    const float *router;         /* [H, E'] */
    const float *gate_up;        /* [E, H, 2I] */
    const float *down;           /* [E, I, H] */
    float *keys;                 /* [slots, K, D] */
    float *values;               /* [slots, K, D] */
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

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec splat(float x) { return (vec){} + x; }

INLINE float sum(vec v) {
    v += __builtin_shuffle(v, (ivec){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, (ivec){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, (ivec){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    v += __builtin_shuffle(v, (ivec){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    return v[0];
}

/* Adds the halves of each group of 2 * `half` lanes, of `a` and then of `b`; `low` are first halves. */
INLINE vec folded(vec a, vec b, ivec low, int half) {
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + half);
}

/* The sums of 16 vectors, that of number j (of its four bits in reverse order) in lane j: in fewer
 * operations than 16 sums take. */
INLINE vec sums(const vec v[LANES]) {
    const ivec eights = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const ivec fours = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const ivec twos = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
    const ivec ones = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    vec a[8], b[4];
    for (int i = 0; i < 8; i++) a[i] = folded(v[i], v[i + 8], eights, 8);
    for (int i = 0; i < 4; i++) b[i] = folded(a[i], a[i + 4], fours, 4);
    return folded(folded(b[0], b[2], twos, 2), folded(b[1], b[3], twos, 2), ones, 1);
}

INLINE vec choose(ivec is_first, vec first, vec second) {
    return (vec)(((ivec)first & is_first) | ((ivec)second & ~is_first));
}

/* e^x to about 1e-7 for x <= 0 and beyond; 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE vec exponential(vec x) {
    const vec low = splat(-87.0f), high = splat(88.0f), magic = splat(12582912.0f);
    x = choose(x < low, low, choose(x > high, high, x));
    vec shifted = x * 1.44269504f + magic; /* rounds to an integer in its low bits */
    vec n = shifted - magic;
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec exponent = (ivec)shifted - (ivec)magic;
    return (vec)((ivec)p + (exponent << 23)) + (x - x); /* a NaN stays one */
}

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

INLINE void normalise(const float *x, const float *weight, int64_t size, float eps, float *out) {
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

/* scores [padded length] become weights that sum to 1. */
INLINE void softmax(float *scores, int64_t length) {
    int64_t padded = PADDED(length);
    float largest = scores[0];
    for (int64_t t = 1; t < length; t++) largest = scores[t] > largest ? scores[t] : largest;
    for (int64_t t = length; t < padded; t++) scores[t] = -INFINITY;
    vec total = splat(0.0f);
    for (int64_t t = 0; t < padded; t += LANES) {
        vec weight = exponential(load(scores + t) - largest);
        for (int i = 0; t + LANES > length && i < LANES; i++)
            if (t + i >= length) weight[i] = 0.0f;
        store(scores + t, weight);
        total += weight;
    }
    float scale = 1.0f / sum(total);
    for (int64_t t = 0; t < padded; t += LANES) store(scores + t, load(scores + t) * scale);
}

/* Where the keys (or values) [K, D] of up to 16 positions from t on are; the last one's in place of
 * those past `length`. */
INLINE void find(const Model *m, const float *pages, const int64_t *table, int64_t t,
                 int64_t length, const float **at) {
    int64_t size = m->block_size, stride = m->kv_heads * m->head_dim;
    int64_t block = t / size, offset = t % size;
    for (int j = 0; j < LANES; j++, t++, offset++) {
        if (offset == size) offset = 0, block++;
        at[j] = t < length ? pages + (table[block] * size + offset) * stride : at[j - 1];
    }
}

/* Asks memory for what the next `find` will find: heads are read one after the other, which the
 * processor does not foresee. */
INLINE void foresee(const Model *m, const float *pages, const int64_t *table, int64_t t,
                    int64_t length) {
    const float *at[LANES];
    if (t >= length) return;
    find(m, pages, table, t, length, at);
    for (int j = 0; j < LANES; j++)
        for (int64_t i = 0; i < m->kv_heads * m->head_dim; i += LANES) __builtin_prefetch(at[j] + i);
}

/* Up to TILE_ROWS successive tokens of one sequence, the first at `position`. */
typedef struct {
    const float *queries; /* [count, stride] */
    float *out;           /* [count, Q D] */
    int64_t count, stride, position, window;
    const int64_t *table, *kv_head;
} Tile;

INLINE int64_t end_of(const Tile *tile, int64_t row) { return tile->position + row + 1; }

INLINE int64_t begin_of(const Tile *tile, int64_t row) {
    int64_t end = end_of(tile, row);
    return tile->window && end > tile->window ? end - tile->window : 0;
}

/* The products of a query [D] with the keys of 16 positions. */
INLINE vec products(const float *query, const float **keys, int64_t offset, int64_t dim) {
    static const int reversed[LANES] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
    vec dots[LANES];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) dots[j] = splat(0.0f);
    for (int64_t i = 0; i < dim; i += LANES) {
        vec some = load(query + i);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) dots[reversed[j]] += some * load(keys[j] + offset + i);
    }
    return sums(dots);
}

/* Adds the weighted sum of values [D] to `out`, N vectors of it. */
INLINE void mix(const float *weights, const float **values, int64_t offset, int64_t first,
                int64_t last, float *out, int N) {
    vec acc[2];
    for (int c = 0; c < N; c++) acc[c] = load(out + c * LANES);
    for (int64_t j = first; j < last; j++)
        for (int c = 0; c < N; c++) acc[c] += weights[j] * load(values[j] + offset + c * LANES);
    for (int c = 0; c < N; c++) store(out + c * LANES, acc[c]);
}

/* All query heads of a tile over their sequence's context. Positions are the outer loop, so that
 * keys and values stream through once for all rows, in the order of memory. */
INLINE void attend(const Model *m, const Layer *layer, const Tile *tile, float *scores) {
    int64_t dim = m->head_dim, begin = begin_of(tile, 0), end = end_of(tile, tile->count - 1);
    int64_t padded = PADDED(end - begin) + LANES;
    float scale = 1.0f / sqrtf((float)dim);
    const float *at[LANES];
    for (int64_t t = begin; t < end; t += LANES) {
        find(m, layer->keys, tile->table, t, end, at);
        foresee(m, layer->keys, tile->table, t + 4 * LANES, end);
        for (int64_t r = 0; r < tile->count; r++)
            for (int64_t h = 0; h < m->heads; h++)
                store(scores + (r * m->heads + h) * padded + t - begin,
                      products(tile->queries + r * tile->stride + h * dim, at,
                               tile->kv_head[h] * dim, dim) * scale);
    }
    for (int64_t r = 0; r < tile->count; r++)
        for (int64_t h = 0; h < m->heads; h++)
            softmax(scores + (r * m->heads + h) * padded + begin_of(tile, r) - begin,
                    end_of(tile, r) - begin_of(tile, r));
    for (int64_t i = 0; i < tile->count * m->heads * dim; i += LANES)
        store(tile->out + i, splat(0.0f));
    for (int64_t t = begin; t < end; t += LANES) {
        find(m, layer->values, tile->table, t, end, at);
        foresee(m, layer->values, tile->table, t + 4 * LANES, end);
        for (int64_t r = 0; r < tile->count; r++) {
            int64_t first = MAX(begin_of(tile, r) - t, 0), last = MIN(end_of(tile, r) - t, LANES);
            for (int64_t h = 0; h < m->heads; h++) {
                const float *weights = scores + (r * m->heads + h) * padded + t - begin;
                float *out = tile->out + (r * m->heads + h) * dim;
                int64_t of_head = tile->kv_head[h] * dim, i = 0;
                for (; i + 2 * LANES <= dim; i += 2 * LANES)
                    mix(weights, at, of_head + i, first, last, out + i, 2);
                if (i < dim) mix(weights, at, of_head + i, first, last, out + i, 1);
            }
        }
    }
}

/* Scratch of one step, cut from one allocation. */
typedef struct {
    float *x, *normed, *qkv, *attended, *projected, *router, *grouped, *gate_up, *inner, *scores;
    float *weights;    /* [B, top_k] */
    int64_t *chosen;   /* [B, top_k] */
    int64_t *members;  /* [B]: the entries of `chosen` that are one expert's */
    int64_t *kv_head;  /* [Q]: which keys a query head reads */
} Scratch;

INLINE void attention(const Model *m, const Layer *layer, const Rows *rows, Scratch *s) {
    int64_t dim = m->head_dim;
    int64_t width = (m->heads + 2 * m->kv_heads) * dim;
    for (int64_t b = 0; b < rows->count; b++)
        normalise(s->x + b * m->hidden, layer->attention_norm, m->hidden, m->eps,
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
    for (int64_t b = 0, count; b < rows->count; b += count) {
        for (count = 1; count < TILE_ROWS && b + count < rows->count; count++)
            if (rows->owners[b + count] != rows->owners[b]) break;
        Tile tile = {.queries = s->qkv + b * width,
                     .out = s->attended + b * m->heads * dim,
                     .count = count,
                     .stride = width,
                     .position = rows->positions[b],
                     .window = m->window,
                     .table = rows->tables + rows->owners[b] * rows->table_width,
                     .kv_head = s->kv_head};
        attend(m, layer, &tile, s->scores);
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
        normalise(s->x + b * hidden, layer->mlp_norm, hidden, m->eps, s->normed + b * hidden);
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
    int64_t b = rows->count, longest = 0;
    for (int64_t i = 0; i < b; i++)
        longest = rows->positions[i] >= longest ? rows->positions[i] + 1 : longest;
    int64_t queries = m->heads * m->head_dim, keys = m->kv_heads * m->head_dim;
    struct { float **part; int64_t size; } parts[] = {
        {&s->x, b * m->hidden},          {&s->normed, b * m->hidden},
        {&s->qkv, b * (queries + 2 * keys)}, {&s->attended, b * queries},
        {&s->projected, b * m->hidden},  {&s->router, b * PADDED(m->experts)},
        {&s->grouped, b * m->hidden},    {&s->gate_up, b * 2 * m->inner},
        {&s->inner, b * m->inner},       {&s->scores, TILE_ROWS * m->heads * (PADDED(longest) + LANES)},
        {&s->weights, b * m->top_k},
    };
    int64_t total = 0;
    for (size_t i = 0; i < sizeof(parts) / sizeof(*parts); i++) total += parts[i].size + LANES;
    *all = malloc(sizeof(float) * total);
    s->chosen = malloc(sizeof(int64_t) * (b * (m->top_k + 1) + m->heads));
    if (!*all || !s->chosen) return -1;
    s->members = s->chosen + b * m->top_k;
    s->kv_head = s->members + b;
    for (int64_t h = 0; h < m->heads; h++) s->kv_head[h] = h * m->kv_heads / m->heads;
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
        normalise(s->x + rows->sampled[i] * m->hidden, m->norm, m->hidden, m->eps,
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
