// Results of the threads of a block for the logits of a row, and functions that combine them.
#pragma once
#include "logits.cuh"

#define WARPS (THREADS / 32)

// The best token of some tokens of a row, and whether a logit is NaN or infinite.
struct Found {
  double score;
  int token;  // -1 where every score is -inf
  u32 is_bad;
};
// The number of logits above a pivot, and the sum of their weights.
struct Sum {
  float weight;
  u32 count;
};
struct Max {
  float value;
};

// The block's shared memory.
struct Shared {
  u64 weights[CANDIDATES];
  Found of_warps[WARPS];
  float candidates[CANDIDATES];
  u32 num_candidates, lowest;
};

DEVICE Found combined(const Found &a, const Found &b) {
  const bool is_b = b.token >= 0 && (a.token < 0 || b.score > a.score ||
                                     (b.score == a.score && b.token < a.token));
  return {is_b ? b.score : a.score, is_b ? b.token : a.token, a.is_bad | b.is_bad};
}
DEVICE Sum combined(const Sum &a, const Sum &b) { return {a.weight + b.weight, a.count + b.count}; }
DEVICE Max combined(const Max &a, const Max &b) { return {fmaxf(a.value, b.value)}; }

// Returns the value of the lane whose number differs from this lane's in the bits of `mask`.
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

// Combines the values of all threads, always in the same order. Every thread gets the result.
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
