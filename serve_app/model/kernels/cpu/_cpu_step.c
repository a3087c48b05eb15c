/* One step of Mixtral in float32 on a CPU: token ids in, logits out, in a single call.
 *
 * Computes what `model/mixtral.py` computes, decodes and prompts, without its two hundred small
 * operations and without the interpreter's lock. Every row is computed alone, in an order that does
 * not depend on the others: its bits are the same in any batch, a prompt's in any pieces, and both
 * with any number of threads.
 *
 * Letters: B rows, S of them whose logits are wanted, P rows that a thread computes at once,
 * H hidden size, D head size, Q query heads, K key heads, I intermediate size, E experts,
 * V vocabulary; E' and V' are E and V rounded up to a multiple of 16, which all other sizes are.
 * Matrices are transposed, [inputs, outputs], so that a vector holds 16 outputs.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_cpu_attention.h"
#include "_cpu_threads.h"
#include "_cpu_vectors.h"

/* One body for each kind of processor; which one runs is decided when the library is loaded. */
#if defined(__x86_64__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define TILE_ROWS 4
#define TILE_COLUMNS 8
#define MAX_SLICE 64 /* rows */
#define SLICES 4     /* for each thread, at least, where there are rows enough */

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

/* Each row is a token of the sequence whose blocks are table `owners[row]`. The rows of a sequence
 * are successive tokens. */
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
INLINE void multiply(const float *x, int64_t rows, const float *w, int64_t n, int64_t k,
                     float *out) {
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

/* Rows of a step between two layers. */
typedef struct {
    int64_t count;                     /* B */
    const int64_t *positions, *owners; /* [B] */
    float *x;                          /* [B, H] */
    float *qkv;                        /* [B, (Q + 2K) D] */
    float *normed;                     /* [B, H]: what the experts get */
    int64_t *chosen;                   /* [B, top_k]: their numbers, ascending */
    float *weights;                    /* [B, top_k] */
    float *mixed;                      /* [B, top_k, H]: what they return */
} State;

/* Successive rows, which one thread computes at once. */
typedef struct {
    int64_t first, end;
} Slice;

/* A step, which the threads of a team compute together. */
typedef struct {
    Team team;
    const Model *model;
    const Rows *rows;
    int64_t slice_rows; /* at most P */
    State all;          /* the rows until the last layer's keys and values are in their slots */
    State wanted;       /* from then on: the S rows alone whose logits are wanted */
    float *logits;      /* [S, V'] */
} Step;

/* What one thread has of the rows that it computes. */
typedef struct {
    Step *step;
    float *normed, *projected, *grouped; /* [P, H] */
    float *attended;                     /* [P, Q D] */
    float *router;                       /* [P, E'] */
    float *gate_up, *inner;              /* [P, 2I], [P, I] */
    float *attention;                    /* as `attention_scratch` says */
    int64_t *members;                    /* [P]: entries of `chosen` that are one expert's */
} Scratch;

/* The next slice of `count` rows; false where the threads have taken all. */
INLINE int take_slice(Step *step, int64_t count, Slice *slice) {
    int64_t first = take_number(&step->team) * step->slice_rows;
    *slice = (Slice){first, MIN(count, first + step->slice_rows)};
    return first < count;
}

INLINE void embed(const Step *step, Slice slice) {
    int64_t hidden = step->model->hidden;
    for (int64_t b = slice.first; b < slice.end; b++)
        memcpy(step->all.x + b * hidden, step->model->embedding + step->rows->token_ids[b] * hidden,
               sizeof(float) * hidden);
}

/* Queries into `qkv`, keys and values into their slots. */
INLINE void project(const Step *step, const Layer *layer, Slice slice, Scratch *s) {
    const Model *m = step->model;
    const State *all = &step->all;
    int64_t dim = m->head_dim, width = (m->heads + 2 * m->kv_heads) * dim;
    float *qkv = all->qkv + slice.first * width;
    for (int64_t b = slice.first; b < slice.end; b++)
        normalize(all->x + b * m->hidden, layer->input_layernorm, m->hidden, m->eps,
                  s->normed + (b - slice.first) * m->hidden);
    multiply(s->normed, slice.end - slice.first, layer->qkv, width, m->hidden, qkv);
    for (int64_t b = slice.first; b < slice.end; b++, qkv += width) {
        float *key = qkv + m->heads * dim, *value = key + m->kv_heads * dim;
        int64_t at = all->positions[b] * dim, slot = step->rows->slots[b] * m->kv_heads * dim;
        rotate(qkv, m->heads + m->kv_heads, dim, m->cos + at, m->sin + at);
        memcpy(layer->keys + slot, key, sizeof(float) * m->kv_heads * dim);
        memcpy(layer->values + slot, value, sizeof(float) * m->kv_heads * dim);
    }
}

/* Copies rows from `all` to `wanted`. */
INLINE void keep_wanted(const Step *step, Slice slice) {
    const Model *m = step->model;
    int64_t width = (m->heads + 2 * m->kv_heads) * m->head_dim;
    for (int64_t i = slice.first; i < slice.end; i++) {
        int64_t b = step->rows->sampled[i];
        memcpy(step->wanted.x + i * m->hidden, step->all.x + b * m->hidden,
               sizeof(float) * m->hidden);
        memcpy(step->wanted.qkv + i * width, step->all.qkv + b * width, sizeof(float) * width);
    }
}

/* The rows from b on, before row `end`, that are successive tokens of one sequence, as many as are
 * computed at once. */
INLINE Tile tile_of(const Step *step, const Layer *layer, const State *state, int64_t b,
                    int64_t end) {
    const Model *m = step->model;
    int64_t count = 1, owner = state->owners[b], position = state->positions[b];
    int64_t max = MIN(MAX_TOKENS, end - b);
    while (count < max && state->owners[b + count] == owner &&
           state->positions[b + count] == position + count)
        count++;
    return (Tile){.keys = layer->keys,
                  .values = layer->values,
                  .table = step->rows->tables + owner * step->rows->table_width,
                  .block_size = m->block_size,
                  .window = m->window,
                  .heads = m->heads,
                  .kv_heads = m->kv_heads,
                  .dim = m->head_dim,
                  .position = position,
                  .count = count};
}

INLINE void attention(const Step *step, const Layer *layer, const State *state, Slice slice,
                      Scratch *s) {
    const Model *m = step->model;
    int64_t queries = m->heads * m->head_dim, width = queries + 2 * m->kv_heads * m->head_dim;
    Tile tile = tile_of(step, layer, state, slice.first, slice.end), after = tile;
    Segment first = first_segment(&tile);
    for (int64_t b = slice.first; b < slice.end; b += tile.count, tile = after) {
        int64_t following = b + tile.count;
        if (following < slice.end) after = tile_of(step, layer, state, following, slice.end);
        attend(&tile, following < slice.end ? &after : NULL, &first, state->qkv + b * width, width,
               s->attended + (b - slice.first) * queries, s->attention);
    }
    int64_t count = slice.end - slice.first;
    float *x = state->x + slice.first * m->hidden;
    multiply(s->attended, count, layer->o, m->hidden, queries, s->projected);
    for (int64_t i = 0; i < count * m->hidden; i += LANES)
        store(x + i, load(x + i) + load(s->projected + i));
}

/* The top_k experts of one row, ascending, and their weights: a softmax over the chosen ones. */
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
    for (int64_t j = 1; j < m->top_k; j++) /* sorts by insertion */
        for (int64_t i = j; i > 0 && chosen[i] < chosen[i - 1]; i--) {
            int64_t number = chosen[i];
            float weight = weights[i];
            chosen[i] = chosen[i - 1], weights[i] = weights[i - 1];
            chosen[i - 1] = number, weights[i - 1] = weight;
        }
}

/* The experts of rows, and what they get. */
INLINE void select_experts(const Step *step, const Layer *layer, const State *state, Slice slice,
                           Scratch *s) {
    const Model *m = step->model;
    float *normed = state->normed + slice.first * m->hidden;
    for (int64_t b = slice.first; b < slice.end; b++)
        normalize(state->x + b * m->hidden, layer->post_attention_layernorm, m->hidden, m->eps,
                  state->normed + b * m->hidden);
    multiply(normed, slice.end - slice.first, layer->router, PADDED(m->experts), m->hidden,
             s->router);
    for (int64_t b = slice.first; b < slice.end; b++)
        route(m, s->router + (b - slice.first) * PADDED(m->experts), state->chosen + b * m->top_k,
              state->weights + b * m->top_k);
}

/* From `grouped` [count, H] to `projected` [count, H]. */
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

/* The next up to P of the entries [row, choice] of one expert: into `members`, from entry *next on,
 * which moves. Returns how many. */
INLINE int64_t next_members(const State *state, int64_t entries, int64_t e, int64_t max,
                            int64_t *next, int64_t *members) {
    int64_t count = 0;
    for (; *next < entries && count < max; ++*next)
        if (state->chosen[*next] == e) members[count++] = *next;
    return count;
}

/* The experts' results: a thread takes some entries of one expert at a time. */
INLINE void mixture(Step *step, const Layer *layer, const State *state, Scratch *s) {
    const Model *m = step->model;
    int64_t hidden = m->hidden, entries = state->count * m->top_k;
    int64_t taken = take_number(&step->team), number = 0;
    for (int64_t e = 0; e < m->experts; e++)
        for (int64_t next = 0, count;
             (count = next_members(state, entries, e, step->slice_rows, &next, s->members));
             number++) {
            if (number != taken) continue;
            for (int64_t r = 0; r < count; r++)
                memcpy(s->grouped + r * hidden, state->normed + s->members[r] / m->top_k * hidden,
                       sizeof(float) * hidden);
            expert(m, layer, e, count, s);
            for (int64_t r = 0; r < count; r++)
                for (int64_t i = 0; i < hidden; i += LANES)
                    store(state->mixed + s->members[r] * hidden + i,
                          load(s->projected + r * hidden + i));
            taken = take_number(&step->team);
        }
}

/* Adds the experts' results to x, in the order of their numbers. */
INLINE void combine(const Step *step, const State *state, Slice slice) {
    int64_t hidden = step->model->hidden, top_k = step->model->top_k;
    for (int64_t entry = slice.first * top_k; entry < slice.end * top_k; entry++) {
        float *x = state->x + entry / top_k * hidden, weight = state->weights[entry];
        for (int64_t i = 0; i < hidden; i += LANES)
            store(x + i, load(x + i) + weight * load(state->mixed + entry * hidden + i));
    }
}

/* The logits of wanted rows. */
INLINE void classify(const Step *step, Slice slice, Scratch *s) {
    const Model *m = step->model;
    int64_t width = PADDED(m->vocab);
    for (int64_t i = slice.first; i < slice.end; i++)
        normalize(step->wanted.x + i * m->hidden, m->norm, m->hidden, m->eps,
                  s->normed + (i - slice.first) * m->hidden);
    multiply(s->normed, slice.end - slice.first, m->head, width, m->hidden,
             step->logits + slice.first * width);
}

/* The work of one thread. The threads wait for each other where a row needs other rows: before
 * attention, and before and after the experts, which take their rows from the whole step. */
FOR_EACH_CPU
static void compute(Scratch *s) {
    Step *step = s->step;
    const Model *m = step->model;
    const State *state = &step->all;
    Slice slice;
    for (int64_t i = 0; i < m->num_layers; i++) {
        while (take_slice(step, step->all.count, &slice)) {
            if (i == 0) embed(step, slice);
            else combine(step, state, slice);
            project(step, m->layers + i, slice, s);
        }
        wait_for_all(&step->team);
        if (i == m->num_layers - 1) state = &step->wanted;
        while (take_slice(step, state->count, &slice)) {
            if (state->x != step->all.x) keep_wanted(step, slice);
            attention(step, m->layers + i, state, slice, s);
            select_experts(step, m->layers + i, state, slice, s);
        }
        wait_for_all(&step->team);
        mixture(step, m->layers + i, state, s);
        wait_for_all(&step->team);
    }
    while (take_slice(step, state->count, &slice)) {
        combine(step, state, slice);
        classify(step, slice, s);
    }
}

static void *run_thread(void *scratch) {
    compute(scratch);
    return NULL;
}

/* Several slices a thread let all threads end at about the same time; more rows in a slice share
 * the reading of weights. */
static int64_t slice_rows(int64_t rows, int64_t threads) {
    if (threads == 1) return MIN(rows, MAX_SLICE);
    int64_t some = (rows + threads * SLICES - 1) / (threads * SLICES);
    return MIN(some < MAX_TOKENS ? MAX(some, TILE_ROWS) : PADDED(some), MAX_SLICE);
}

/* Memory that is cut into pieces; without a start only its size is counted. */
typedef struct {
    float *start;
    int64_t used; /* floats */
} Memory;

static float *cut(Memory *memory, int64_t size) {
    int64_t at = memory->used;
    memory->used += PADDED(size);
    return memory->start ? memory->start + at : NULL;
}

static int64_t *cut_integers(Memory *memory, int64_t size) {
    return (int64_t *)cut(memory, size * (int64_t)(sizeof(int64_t) / sizeof(float)));
}

static void cut_state(Memory *memory, const Model *m, State *state) {
    state->x = cut(memory, state->count * m->hidden);
    state->qkv = cut(memory, state->count * (m->heads + 2 * m->kv_heads) * m->head_dim);
    state->normed = cut(memory, state->count * m->hidden);
    state->chosen = cut_integers(memory, state->count * m->top_k);
    state->weights = cut(memory, state->count * m->top_k);
    state->mixed = cut(memory, state->count * m->top_k * m->hidden);
}

static void cut_scratch(Memory *memory, Step *step, Scratch *s) {
    const Model *m = step->model;
    int64_t p = step->slice_rows;
    s->step = step;
    s->normed = cut(memory, p * m->hidden);
    s->projected = cut(memory, p * m->hidden);
    s->grouped = cut(memory, p * m->hidden);
    s->attended = cut(memory, p * m->heads * m->head_dim);
    s->router = cut(memory, p * PADDED(m->experts));
    s->gate_up = cut(memory, p * 2 * m->inner);
    s->inner = cut(memory, p * m->inner);
    s->attention = cut(memory, attention_scratch(m->heads, m->kv_heads, m->head_dim));
    s->members = cut_integers(memory, p);
}

/* Where not all rows are wanted, those that are get a state of their own. */
static void cut_wanted(Memory *memory, Step *step) {
    const Rows *rows = step->rows;
    int64_t wanted = rows->num_sampled, same = 0;
    while (same < wanted && rows->sampled[same] == same) same++;
    if (same == rows->count) {
        step->wanted = step->all;
        return;
    }
    int64_t *owners = cut_integers(memory, wanted), *positions = cut_integers(memory, wanted);
    for (int64_t i = 0; i < wanted && memory->start; i++) {
        owners[i] = rows->owners[rows->sampled[i]];
        positions[i] = rows->positions[rows->sampled[i]];
    }
    step->wanted = (State){.count = wanted, .owners = owners, .positions = positions};
    cut_state(memory, step->model, &step->wanted);
}

/* Cuts the memory of a step; returns the threads' scratch. */
static Scratch *cut_step(Memory *memory, Step *step, int64_t threads) {
    int64_t size = threads * (int64_t)(sizeof(Scratch) / sizeof(float));
    Scratch none, *scratch = (Scratch *)cut(memory, size);
    cut_state(memory, step->model, &step->all);
    cut_wanted(memory, step);
    for (int64_t i = 0; i < threads; i++) cut_scratch(memory, step, scratch ? scratch + i : &none);
    return scratch;
}

/* Fills `logits` [S, V'], and the rows' slots of every layer's keys and values, in up to `threads`
 * threads. Returns how many there were, or -1 where there is no memory. */
int64_t compute_mixtral_step(const Model *m, const Rows *rows, int64_t threads, float *logits) {
    Step step = {.model = m, .rows = rows, .logits = logits};
    step.slice_rows = slice_rows(rows->count, threads);
    step.all = (State){.count = rows->count, .positions = rows->positions, .owners = rows->owners};
    Memory memory = {NULL, 0};
    cut_step(&memory, &step, threads); /* how much it is */
    memory = (Memory){malloc(sizeof(float) * memory.used), 0};
    if (!memory.start) return -1;
    Scratch *scratch = cut_step(&memory, &step, threads);
    int64_t started = run_team(&step.team, threads, run_thread, scratch, sizeof(Scratch));
    free(memory.start);
    return started;
}
