// The parameters of a row, and its logits after bias, penalties and grammar.
#pragma once
#include "floats.cuh"

#define IN_PROMPT 0x80000000u

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

// The tokens of a block: from `begin` to `end`, the `part`th of `parts` of a row.
struct Job {
  int row, part, begin, end;
};

DEVICE Job job_of(int number, int parts, int vocab) {
  const int part = number % parts, size = (vocab + parts - 1) / parts;
  const int begin = part * size, end = begin + size;
  return {number / parts, part, begin, end < vocab ? end : vocab};
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
