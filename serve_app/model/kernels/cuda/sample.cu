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
#include "noise.cuh"
#include "threshold.cuh"

#define MAX_PARTS 16
#define LOADS 4
#define LARGEST bits_to_float(0x7F7FFFFFu)

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

// Returns the result of another block.
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
