// One token for each row of logits, by the row's own parameters, without a sort.
//
// logits float [rows, vocab], parameters Row [rows], positions i64 [rows] -> tokens i64 [rows]
//
// A row that keeps all tokens is cut into parts, one for each block, where there are more blocks than
// rows; the last block to finish combines them. A row with top_k, top_p or min_p is one block's: its
// logits lie in registers while the block looks for the lowest one that is kept.
//
//   THREADS     of a block
//   VALUES      logits of a thread; THREADS * VALUES is at least vocab
//   CANDIDATES  logits that are compared with each other to find a threshold
#include "intrinsics.cuh"

#define WARPS (THREADS / 32)
#define MAX_PARTS 16
#define LOADS 4
#define IN_PROMPT 0x80000000u
#define GOLDEN 0x9E3779B97F4A7C15ull
#define INFINITE bits_to_float(0x7F800000u)
#define LARGEST bits_to_float(0x7F7FFFFFu)

using i64 = long long;

// The parameters of a row; ROW in sampling.py is the same.
struct Row {
  u64 seed;
  u32 *counts;       // [vocab] or null: how often each token was generated; IN_PROMPT in the prompt
  const u32 *lists;  // biased ids, then their biases as floats, then the ids of stop tokens
  float temperature;  // 0 takes the best token
  float top_p, log_min_p, presence, frequency, repetition;
  int top_k;  // 0 keeps all
  int min_tokens, num_biases, num_stops;
  int mask;         // row of `masks`; -1 without a grammar
  int is_filtered;  // whether top_k, top_p or min_p drop tokens
};

// The best token of some tokens of a row, and whether a logit is NaN or infinite.
struct Found {
  double score;
  int token;  // -1 where every score is -inf
  u32 is_bad;
};
// Logits above a pivot: how many, and the sum of their weights.
struct Sum {
  float weight;
  u32 count;
};
struct Max {
  float value;
};
struct Shared {
  u64 weights[CANDIDATES];
  Found of_warps[WARPS];
  float candidates[CANDIDATES];
  u32 num_candidates, lowest;
};
// The tokens of a block: from `begin` to `end`, the `part`th of `parts` of a row.
struct Job {
  int row, part, begin, end;
};

DEVICE Job job_of(int number, int parts, int vocab) {
  const int part = number % parts, size = (vocab + parts - 1) / parts;
  const int begin = part * size, end = begin + size;
  return {number / parts, part, begin, end < vocab ? end : vocab};
}

DEVICE Found combined(const Found &a, const Found &b) {
  const bool is_b = b.token >= 0 && (a.token < 0 || b.score > a.score ||
                                     (b.score == a.score && b.token < a.token));
  return {is_b ? b.score : a.score, is_b ? b.token : a.token, a.is_bad | b.is_bad};
}
DEVICE Sum combined(const Sum &a, const Sum &b) { return {a.weight + b.weight, a.count + b.count}; }
DEVICE Max combined(const Max &a, const Max &b) { return {fmaxf(a.value, b.value)}; }

// The value of the lane whose number differs in the bits of `mask`.
template <class T> DEVICE T of_lane(const T &value, int mask) {
  union {
    T whole;
    u32 words[sizeof(T) / 4];
  } both;
  both.whole = value;
#pragma unroll
  for (int i = 0; i < (int)sizeof(T) / 4; i++) both.words[i] = shuffle_xor(both.words[i], mask);
  return both.whole;
}

// The values of all threads combined, in an order that does not change; every thread gets it.
template <class T> DEVICE T of_block(T value, Shared *shared) {
  T *of_warps = (T *)shared->of_warps;
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value = combined(value, of_lane(value, mask));
  __syncthreads();  // the last call's values have been read
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[threadIdx.x % WARPS];
#pragma unroll
  for (int mask = WARPS / 2; mask; mask /= 2) value = combined(value, of_lane(value, mask));
  return value;
}

// A number whose order is that of the floats, save NaN; and back.
DEVICE u32 ordered(float x) {
  const u32 bits = float_to_bits(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float from_ordered(u32 key) {
  return bits_to_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

// SplitMix64's finalizer, as in engine/noise.py.
DEVICE u64 mix(u64 x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  return x ^ x >> 31;
}
// The 52 random bits of a token.
DEVICE u64 bits_of(u64 key, int id) { return mix(key + (u64)id * GOLDEN) >> 12; }

// engine/noise.py's Gumbel noise.
DEVICE double exact_gumbel(u64 bits) {
  const double uniform = ((double)bits + 0.5) * 0x1p-52;
  return -log(-log1p(-uniform));
}

// The same within 2e-5, in float. E = -log(1 - u) keeps its relative precision: a series where u is
// small, and elsewhere the logarithm of 1 - u, which the inverted bits give without cancellation.
DEVICE float rough_gumbel(u64 bits) {
  const bool is_small = bits < 1ull << 49;
  const u64 chosen = is_small ? bits : (1ull << 52) - 1 - bits;
  const float u = ((float)chosen + 0.5f) * 0x1p-52f;
  const float series =
      u * (1 + u * (1 / 2.f + u * (1 / 3.f + u * (1 / 4.f + u * (1 / 5.f + u * (1 / 6.f))))));
  const float exponential = is_small ? series : -0.69314718f * rough_log2(u);
  return -0.69314718f * rough_log2(exponential);
}

// A token's logit after bias, penalties and grammar.
DEVICE float adjusted(const Row &p, const float *logits, const u32 *mask, int id, float bias) {
  float x = rounded_sum(logits[id], bias);
  if (p.counts) {
    const u32 count = p.counts[id], generated = count & ~IN_PROMPT;
    if (count) x = x < 0 ? rounded_product(x, p.repetition) : x / p.repetition;
    const float presence = generated ? p.presence : 0;
    x = rounded_sum(x, -rounded_sum(rounded_product(p.frequency, (float)generated), presence));
  }
  return mask && !(mask[id / 32] >> id % 32 & 1) ? -INFINITE : x;
}

// Fills the job's `scores` with the adjusted logits.
DEVICE void adjust(const Row &p, const float *logits, const u32 *masks, i64 position, const Job &job,
                   int vocab, float *scores) {
  logits += (u64)job.row * vocab, scores += (u64)job.row * vocab;
  const u32 *mask = p.mask < 0 ? nullptr : masks + (u64)p.mask * ((vocab + 31) / 32);
  for (int id = job.begin + threadIdx.x; id < job.end; id += THREADS)
    scores[id] = adjusted(p, logits, mask, id, 0);
  __syncthreads();
  for (int i = threadIdx.x; i < p.num_biases; i += THREADS) {
    const int id = p.lists[i];
    if (id >= job.begin && id < job.end)
      scores[id] = adjusted(p, logits, mask, id, bits_to_float(p.lists[p.num_biases + i]));
  }
  __syncthreads();
  if (position < p.min_tokens)
    for (int i = threadIdx.x; i < p.num_stops; i += THREADS) {
      const int id = p.lists[2 * p.num_biases + i];
      if (id >= job.begin && id < job.end) scores[id] = -INFINITE;
    }
  __syncthreads();
}

// The logits of a row in a block's registers, -inf where there is none. The weight of a logit is
// exp2 of `scale` times its distance to the best one; 1 where `scale` is 0.
struct Logits {
  float x[VALUES];
  float best, scale;
};

DEVICE float weight(float best, float scale, float x) { return rough_exp2((x - best) * scale); }
DEVICE u64 fixed_point(float weight) { return (u64)(weight * 0x1p40f); }

// How many logits lie above `pivot`, and the sum of their weights.
DEVICE Sum above(const Logits &all, float pivot, Shared *shared) {
  const float best = unknown(all.best);  // else all weights would be kept in registers, too
  Sum sum = {0, 0};
#pragma unroll
  for (int i = 0; i < VALUES; i++)
    if (all.x[i] > pivot) sum.weight += weight(best, all.scale, all.x[i]), sum.count++;
  return of_block(sum, shared);
}

// The lowest logit in (low, high] for which the weights above it are below `target`; `over_high` are
// those above `high`. Integers are summed, so that the order of candidates does not matter.
DEVICE float lowest_kept(const Logits &all, float low, float high, float over_high, float target,
                         Shared *shared) {
  if (threadIdx.x == 0) shared->num_candidates = 0, shared->lowest = ordered(high);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < VALUES; i++)
    if (all.x[i] > low && all.x[i] <= high)
      shared->candidates[add_shared(&shared->num_candidates, 1)] = all.x[i];
  __syncthreads();
  const int count = shared->num_candidates;
  for (int i = threadIdx.x; i < count; i += THREADS)
    shared->weights[i] = fixed_point(weight(all.best, all.scale, shared->candidates[i]));
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const float mine = shared->candidates[i];
    u64 sum = fixed_point(over_high);
#pragma unroll 4
    for (int j = 0; j < count; j++)
      if (shared->candidates[j] > mine) sum += shared->weights[j];
    if (sum < fixed_point(target)) min_shared(&shared->lowest, ordered(mine));
  }
  __syncthreads();
  return from_ordered(shared->lowest);
}

// The lowest logit that is kept: one is kept while the weights above it are below `share` of all of
// them, or below `most`. Halves an interval until it has few logits.
DEVICE float threshold(const Logits &all, float share, float most, Shared *shared) {
  float low = -INFINITE, high = all.best, pivot = low, reach = 4, target;
  Sum over_low, over_high = {0, 0};
  for (bool is_first = true;; is_first = false) {
    const Sum sum = above(all, pivot, shared);
    if (is_first) target = fminf(share * sum.weight, most);
    if (sum.weight < target) {
      if (is_first) return low;
      high = pivot, over_high = sum;
    } else {
      low = pivot, over_low = sum;
    }
    if (over_low.count - over_high.count <= CANDIDATES) break;
    do pivot = high - reach, reach *= 4;
    while (low == -INFINITE && pivot == high);
    if (low > -INFINITE) pivot = low + (high - low) * 0.5f;
    if (pivot == -INFINITE) return pivot;
    if (!(low < pivot && pivot < high)) return high;  // all of them are equal
  }
  return lowest_kept(all, low, high, over_high.weight, target, shared);
}

// The lowest score that top_k, top_p and min_p keep. Scores have the order of logits.
DEVICE float filter(const Row &p, const float *source, int vocab, Shared *shared) {
  Logits all;
  Max most = {-INFINITE};
#pragma unroll
  for (int i = 0; i < VALUES; i++) {
    const int id = i * THREADS + threadIdx.x;
    all.x[i] = id < vocab ? source[id] : -INFINITE;
    most.value = fmaxf(most.value, all.x[i]);
  }
  all.best = of_block(most, shared).value;
  if (!(all.best < INFINITE && all.best > -INFINITE)) return -INFINITE;  // the row fails
  float lowest = -INFINITE;
#pragma unroll 1
  for (int has_top_k = 1; has_top_k >= 0; has_top_k--) {
    if (has_top_k ? !p.top_k : p.top_p >= 1) continue;
    all.scale = has_top_k ? 0 : 1.442695f / p.temperature;
    const float kept = threshold(all, has_top_k ? INFINITE : p.top_p,
                                 has_top_k ? (float)p.top_k : INFINITE, shared);
    lowest = fmaxf(lowest, kept);
#pragma unroll
    for (int i = 0; i < VALUES; i++) all.x[i] = all.x[i] < lowest ? -INFINITE : all.x[i];
  }
  return fmaxf(lowest / p.temperature, all.best / p.temperature + p.log_min_p);
}

// Logits of a thread that are loaded together, `first` and every THREADS-th after it, -inf behind
// the end of the job.
struct Loaded {
  float x[LOADS];
};
DEVICE Loaded loaded(const float *source, int first, const Job &job) {
  Loaded some;
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    const int id = first + i * THREADS;
    some.x[i] = id < job.end ? source[id] : -INFINITE;
  }
  return some;
}

// The best token of a job.
DEVICE Found best_of(const float *source, const Job &job, Shared *shared) {
  float best = -INFINITE;
  int token = -1;
  u32 is_bad = 0;
  for (int id = job.begin + threadIdx.x; id < job.end; id += LOADS * THREADS) {
    const Loaded some = loaded(source, id, job);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      is_bad |= !(some.x[i] < INFINITE);
      if (some.x[i] > best) best = some.x[i], token = id + i * THREADS;
    }
  }
  return of_block(Found{best, token, is_bad}, shared);
}

// The token of a job with the best sum of score and noise, among scores from `lowest` on.
//
// Noise is computed roughly for every token, and again in double for those whose rough sum lies so
// near the best one that they may win.
DEVICE Found drawn(const Row &p, i64 position, const float *source, float lowest, const Job &job,
                   Shared *shared) {
  const float temperature = p.temperature;
  const u64 key = mix(mix(p.seed) + (u64)position * GOLDEN);
  const int first = job.begin + threadIdx.x;
  float best = -INFINITE, second = -INFINITE;  // of this thread
  int token = job.end;
  u32 is_bad = 0;
  for (int id = first; id < job.end; id += LOADS * THREADS) {
    const Loaded some = loaded(source, id, job);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const float score = some.x[i] / temperature;
      is_bad |= !(some.x[i] < INFINITE);
      if (!(score >= lowest)) continue;
      const float sum = score + rough_gumbel(bits_of(key, id + i * THREADS));
      second = fmaxf(second, fminf(sum, best));
      if (sum > best) best = sum, token = id + i * THREADS;
    }
  }
  const float most = of_block(Max{best}, shared).value;
  const float least = most - (1e-4f + 1e-6f * fabsf(most));
  Found found = {0, -1, is_bad};
  const bool has_two = second >= least;  // rare: then all tokens of the thread are looked at again
#pragma unroll 1
  for (int id = has_two ? first : token; id < job.end; id += has_two ? THREADS : job.end) {
    const float score = source[id] / temperature;
    const u64 bits = bits_of(key, id);
    if (!(score >= lowest && score + rough_gumbel(bits) >= least)) continue;
    found = combined(found, {score + exact_gumbel(bits), id, is_bad});
  }
  return of_block(found, shared);
}

// What another block has found.
DEVICE Found of_part(const Found *p) {
  union {
    uint4 words;
    Found found;
  } both;
  both.words = load_remote((const uint4 *)p);
  return both.found;
}

// Writes the token of a row, -1 where a logit is not finite or every one is -inf, and counts it.
DEVICE void finish(const Row &p, const Found &found, i64 *token) {
  const int id = found.is_bad ? -1 : found.token;
  *token = id;
  if (p.counts && id >= 0) p.counts[id]++;
}

// Each row has `parts` blocks. Rows with a grammar are sampled where `masks` u32 [grammars,
// ceil(vocab / 32)] are given, the others where they are not: each row by one of two launches. `scores`
// float [rows, vocab], `partial` Found [rows, MAX_PARTS] and `arrivals` u32 [rows], which are 0 between
// launches, are the kernel's own.
KERNEL void __launch_bounds__(THREADS, 1)
sample(const float *logits, const Row *rows, const i64 *positions, const u32 *masks, i64 *tokens,
       float *scores, Found *partial, u32 *arrivals, int parts, int vocab) {
  wait_for_previous();
  Shared *shared = (Shared *)shared_memory();
  Job job = job_of(blockIdx.x, parts, vocab);
  const Row &p = rows[job.row];  // no copy: registers are scarce in `filter`
  if ((p.mask >= 0) != (masks != nullptr) || (p.is_filtered && job.part)) return;
  if (p.is_filtered) job.end = vocab;
  const bool is_adjusted =
      p.counts || p.num_biases || p.mask >= 0 || positions[job.row] < p.min_tokens;
  if (is_adjusted) adjust(p, logits, masks, positions[job.row], job, vocab, scores);
  const float *from = is_adjusted ? scores : logits;
  float lowest = -LARGEST;  // -inf is never drawn
  if (p.is_filtered) {
    lowest = fmaxf(lowest, filter(p, from + (u64)job.row * vocab, vocab, shared));
    job = job_of(unknown((int)blockIdx.x), parts, vocab);  // it was not kept in registers
    job.end = vocab;
  }
  from += (u64)job.row * vocab;
  Found found = p.temperature > 0 ? drawn(p, positions[job.row], from, lowest, job, shared)
                                  : best_of(from, job, shared);
  if (threadIdx.x) return;
  if (parts > 1 && !p.is_filtered) {
    Found *of_row = partial + job.row * MAX_PARTS;
    of_row[job.part] = found;
    if (arrive(arrivals + job.row) < (u32)parts - 1) return;
    arrivals[job.row] = 0;
    for (int part = 0; part < parts; part++)
      if (part != job.part) found = combined(found, of_part(of_row + part));
  }
  finish(p, found, tokens + job.row);
}
