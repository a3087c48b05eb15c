/* Attention of a few successive tokens of one sequence over its context, in blocks of keys and
 * values.
 *
 * Keys and values are read once for all of these tokens, segment by segment, with a softmax that is
 * corrected when a larger score comes (https://arxiv.org/abs/2205.14135). Segments begin at
 * multiples of their length, and each token's sums go through its own positions in order: its bits
 * do not depend on the tokens it is computed with.
 *
 * Letters: R tokens, Q query heads, K key heads, G = Q / K that share a key head, D head size.
 */

#ifndef CPU_ATTENTION_H
#define CPU_ATTENTION_H

#include <stddef.h>

#include "_cpu_vectors.h"

#define SEGMENT 64     /* positions */
#define MAX_TOKENS 16  /* at once */
#define FEW_QUERIES 8  /* for so many, transposing the keys does not pay */

/* R successive tokens, the first at `position`, and their sequence's context in one layer. */
typedef struct {
    const float *keys, *values; /* [slots, K, D] */
    const int64_t *table;       /* its blocks */
    int64_t block_size, window, heads, kv_heads, dim, position, count;
} Tile;

/* The positions from `start` on; `at` says where the keys and values [K, D] of each are. In place
 * of those that no token of the tile may see, it has the nearest one that some may. */
typedef struct {
    int64_t start, at[SEGMENT];
} Segment;

/* What the tokens have so far. Queries that share a key head lie together. */
typedef struct {
    float *queries; /* [K, R, G, D], divided by the root of D */
    float *mixed;   /* [K, R, G, D]: the values' weighted sum */
    float *totals;  /* [K, R, G, 16]: the weights' sum, in 16 parts */
    float *largest; /* [K, R, G]: of the scores */
    float *scores;  /* [R G + 3, SEGMENT] of one segment and key head; then its weights */
    float *columns; /* [D, 16] of its keys */
} Sums;

/* In floats. */
static inline int64_t attention_scratch(int64_t heads, int64_t kv_heads, int64_t dim) {
    int64_t all = MAX_TOKENS * heads;
    return all * (2 * dim + LANES + 1) + dim * LANES + (all / kv_heads + 3) * SEGMENT;
}

INLINE int64_t end_of(const Tile *tile, int64_t r) { return tile->position + r + 1; }

INLINE int64_t begin_of(const Tile *tile, int64_t r) {
    int64_t end = end_of(tile, r);
    return tile->window && end > tile->window ? end - tile->window : 0;
}

/* Places in the segment from `start` on which token r sees: from `first` to before `last`. */
typedef struct {
    int64_t first, last;
} Span;

INLINE Span span_of(const Tile *tile, int64_t r, int64_t start) {
    return (Span){MAX(begin_of(tile, r) - start, 0), MIN(end_of(tile, r) - start, SEGMENT)};
}

INLINE Segment segment_of(const Tile *tile, int64_t start) {
    Segment segment = {.start = start};
    int64_t begin = MAX(start, begin_of(tile, 0)), end = end_of(tile, tile->count - 1);
    int64_t block = begin / tile->block_size, place = begin % tile->block_size, at = 0;
    for (int64_t t = start; t < start + SEGMENT; t++) {
        if (t <= begin || t < end)
            at = (tile->table[block] * tile->block_size + place) * tile->kv_heads * tile->dim;
        segment.at[t - start] = at;
        if (t >= begin && ++place == tile->block_size) place = 0, block++;
    }
    return segment;
}

INLINE Segment first_segment(const Tile *tile) {
    return segment_of(tile, begin_of(tile, 0) / SEGMENT * SEGMENT);
}

/* Asks memory for the keys and values of head k at 16 places, which will be read when the present
 * segment is done: blocks lie anywhere, which no processor foresees. Into the second cache, as the
 * first is in use. */
INLINE void foresee(const Tile *tile, int64_t k, const int64_t *at) {
    for (int j = 0; j < LANES; j++)
        for (int64_t i = k * tile->dim; i < (k + 1) * tile->dim; i += LANES) {
            __builtin_prefetch(tile->keys + at[j] + i, 0, 2);
            __builtin_prefetch(tile->values + at[j] + i, 0, 2);
        }
}

/* The products of a query [D] with the keys of 16 positions. */
INLINE vec products(const float *query, const float *keys, const int64_t *at, int64_t dim) {
    vec dots[LANES];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) dots[j] = splat(0.0f);
    for (int64_t i = 0; i < dim; i += LANES) {
        vec some = load(query + i);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) dots[j] += some * load(keys + at[j] + i);
    }
    return sums(dots);
}

/* The keys of 16 positions as columns [D, 16]. */
INLINE void transpose_keys(const float *keys, const int64_t *at, int64_t dim, float *columns) {
    for (int64_t i = 0; i < dim; i += LANES) {
        vec v[LANES];
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) v[j] = load(keys + at[j] + i);
        transpose(v);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) store(columns + (i + j) * LANES, v[j]);
    }
}

/* The products of four queries with 16 transposed keys, added in the very order of `products`: what
 * that one has in lane i of its vectors, until it adds the lanes, are the terms i, i + 16, ... */
typedef struct {
    vec of[4];
} Four;

INLINE Four terms(const float *queries, const float *columns, int64_t dim, int64_t i) {
    Four four = {};
    for (; i < dim; i += LANES) {
        vec key = load(columns + i * LANES);
        for (int r = 0; r < 4; r++) four.of[r] += queries[r * dim + i] * key;
    }
    return four;
}

#define SUM_OF(name, half, distance)                                                              \
    INLINE Four name(const float *queries, const float *columns, int64_t dim, int64_t i) {        \
        Four a = half(queries, columns, dim, i), b = half(queries, columns, dim, i + distance);   \
        for (int r = 0; r < 4; r++) a.of[r] += b.of[r];                                           \
        return a;                                                                                 \
    }
SUM_OF(two_terms, terms, 8)
SUM_OF(four_terms, two_terms, 4)
SUM_OF(eight_terms, four_terms, 2)
SUM_OF(all_terms, eight_terms, 1)

/* Scores of the `count` queries of key head k, in whole vectors around a span; what `next` has is
 * asked for meanwhile. There is room for the scores of three more queries. */
INLINE void score(const Tile *tile, int64_t k, int64_t dim, const Segment *now, const Segment *next,
                  Span span, int64_t count, const Sums *s) {
    const float *keys = tile->keys + k * dim, *queries = s->queries + k * count * dim;
    for (int64_t j = 0; j < SEGMENT; j += LANES) {
        if (next) foresee(tile, k, next->at + j);
        if (j + LANES <= span.first || j >= span.last) continue;
        float *scores = s->scores + j;
        if (count <= FEW_QUERIES) {
            for (int64_t i = 0; i < count; i++)
                store(scores + i * SEGMENT, products(queries + i * dim, keys, now->at + j, dim));
            continue;
        }
        transpose_keys(keys, now->at + j, dim, s->columns);
        for (int64_t i = 0; i < count; i += 4) {
            Four four = all_terms(queries + i * dim, s->columns, dim, 0);
            for (int r = 0; r < 4; r++) store(scores + (i + r) * SEGMENT, four.of[r]);
        }
    }
}

/* One query's scores of a span become weights; what was mixed before is scaled to them. Scores
 * beside the span, up to whole vectors, get weights too small to count. */
INLINE void soften(float *scores, Span span, float *largest, float *totals, float *mixed,
                   int64_t dim) {
    int64_t first = span.first / LANES * LANES, last = PADDED(span.last);
    for (int64_t j = first; j < span.first; j++) scores[j] = -INFINITY;
    for (int64_t j = span.last; j < last; j++) scores[j] = -INFINITY;
    vec most = load(scores + first), total = load(totals);
    for (int64_t j = first + LANES; j < last; j += LANES) most = larger(load(scores + j), most);
    float now = largest_of(most);
    if (now > *largest) {
        vec factor = exponential(splat(*largest - now));
        total *= factor;
        for (int64_t i = 0; i < dim; i += LANES) store(mixed + i, load(mixed + i) * factor);
        *largest = now;
    }
    for (int64_t j = first; j < last; j += LANES) {
        vec weight = exponential(load(scores + j) - *largest);
        store(scores + j, weight);
        total += weight;
    }
    store(totals, total);
}

/* Adds weighted values [D] of a span to `mixed`, for R queries, N vectors of each. */
INLINE void mix_some(const float *weights, const float *values, const int64_t *at, Span span,
                     int64_t dim, float *mixed, int R, int N) {
    vec acc[4][2];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < N; c++) acc[r][c] = load(mixed + r * dim + c * LANES);
    for (int64_t j = span.first; j < span.last; j++)
        for (int c = 0; c < N; c++) {
            vec value = load(values + at[j] + c * LANES);
            for (int r = 0; r < R; r++) acc[r][c] += weights[r * SEGMENT + j] * value;
        }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < N; c++) store(mixed + r * dim + c * LANES, acc[r][c]);
}

INLINE void mix(const float *weights, const float *values, const int64_t *at, Span span,
                int64_t dim, float *mixed, int R) {
    int64_t i = 0;
    for (; i + 2 * LANES <= dim; i += 2 * LANES)
        mix_some(weights, values + i, at, span, dim, mixed + i, R, 2);
    if (i < dim) mix_some(weights, values + i, at, span, dim, mixed + i, R, 1);
}

/* How many queries from i on see the same span: up to four, which are mixed together. */
INLINE int64_t alike(const Tile *tile, int64_t start, int64_t i, int64_t count) {
    int64_t group = tile->heads / tile->kv_heads, same = 1;
    Span span = span_of(tile, i / group, start);
    for (; same < 4 && i + same < count; same++) {
        Span other = span_of(tile, (i + same) / group, start);
        if (other.first != span.first || other.last != span.last) break;
    }
    return same;
}

/* One segment for the queries of key head k; `next` may be NULL. */
INLINE void attend_segment(const Tile *tile, int64_t k, int64_t dim, const Segment *now,
                           const Segment *next, const Sums *s) {
    int64_t group = tile->heads / tile->kv_heads, count = tile->count * group;
    int64_t first = k * count; /* query */
    const float *values = tile->values + k * dim;
    Span whole = {span_of(tile, 0, now->start).first,
                  span_of(tile, tile->count - 1, now->start).last};
    score(tile, k, dim, now, next, whole, count, s);
    for (int64_t i = 0; i < count; i++) {
        Span span = span_of(tile, i / group, now->start);
        if (span.first < span.last)
            soften(s->scores + i * SEGMENT, span, s->largest + first + i,
                   s->totals + (first + i) * LANES, s->mixed + (first + i) * dim, dim);
    }
    for (int64_t i = 0, same; i < count; i += same) {
        const float *weights = s->scores + i * SEGMENT;
        float *mixed = s->mixed + (first + i) * dim;
        Span span = span_of(tile, i / group, now->start);
        same = alike(tile, now->start, i, count);
        switch (same) {
        case 1: mix(weights, values, now->at, span, dim, mixed, 1); break;
        case 2: mix(weights, values, now->at, span, dim, mixed, 2); break;
        case 3: mix(weights, values, now->at, span, dim, mixed, 3); break;
        default: mix(weights, values, now->at, span, dim, mixed, 4);
        }
    }
}

/* Where query head h of token r lies in [K, R, G]. */
INLINE int64_t place_of(const Tile *tile, int64_t r, int64_t h) {
    int64_t group = tile->heads / tile->kv_heads;
    return (h / group * tile->count + r) * group + h % group;
}

INLINE Sums begin_sums(const Tile *tile, const float *queries, int64_t stride, float *scratch) {
    int64_t dim = tile->dim, all = tile->count * tile->heads;
    float scale = 1.0f / sqrtf((float)dim);
    Sums s = {.queries = scratch, .mixed = scratch + all * dim};
    s.totals = s.mixed + all * dim;
    s.columns = s.totals + all * LANES;
    s.scores = s.columns + dim * LANES;
    s.largest = s.scores + (all / tile->kv_heads + 3) * SEGMENT;
    for (int64_t r = 0; r < tile->count; r++)
        for (int64_t h = 0; h < tile->heads; h++) {
            int64_t place = place_of(tile, r, h);
            for (int64_t i = 0; i < dim; i += LANES) {
                vec query = load(queries + r * stride + h * dim + i) * scale;
                store(s.queries + place * dim + i, query);
                store(s.mixed + place * dim + i, splat(0.0f));
            }
            store(s.totals + place * LANES, splat(0.0f));
            s.largest[place] = -INFINITY;
        }
    return s;
}

/* From `queries` [R, stride] to `out` [R, Q D]. `first` is the tile's first segment, and becomes
 * that of the tile that is computed `after` it, if there is one, which is asked for early. */
INLINE void attend(const Tile *tile, const Tile *after, Segment *first, const float *queries,
                   int64_t stride, float *out, float *scratch) {
    int64_t dim = tile->dim, end = end_of(tile, tile->count - 1);
    Sums s = begin_sums(tile, queries, stride, scratch);
    Segment segments[2] = {*first};
    for (int64_t i = 0, start = first->start; start < end; start += SEGMENT, i = 1 - i) {
        const Segment *now = segments + i, *next = segments + 1 - i;
        if (start + SEGMENT < end) segments[1 - i] = segment_of(tile, start + SEGMENT);
        else if (after) segments[1 - i] = *first = first_segment(after);
        else next = NULL;
        for (int64_t k = 0; k < tile->kv_heads; k++)
            /* The compiler unrolls loops over a constant size: two thirds of the time. */
            if (dim == 32) attend_segment(tile, k, 32, now, next, &s);
            else attend_segment(tile, k, dim, now, next, &s);
    }
    for (int64_t r = 0; r < tile->count; r++)
        for (int64_t h = 0; h < tile->heads; h++, out += dim) {
            int64_t place = place_of(tile, r, h);
            float scale = 1.0f / sum(load(s.totals + place * LANES));
            for (int64_t i = 0; i < dim; i += LANES)
                store(out + i, load(s.mixed + place * dim + i) * scale);
        }
}

#endif
