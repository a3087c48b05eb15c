// Finds the lowest logit that top_k, top_p and min_p keep, without sorting.
//
//   CANDIDATES  logits that are compared with each other to find a threshold
#pragma once
#include "found.cuh"

// Converts a float that is not NaN to an integer with the same order, and back.
DEVICE u32 ordered(float x) {
  const u32 bits = float_to_bits(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float from_ordered(u32 key) {
  return bits_to_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

// The logits of a row in a block's registers, -inf where there is none. The weight of a logit is
// exp2 of `scale` times its distance to the best one; 1 where `scale` is 0.
struct Logits {
  float x[VALUES];
  float best, scale;
};

DEVICE float weight(float best, float scale, float x) { return rough_exp2((x - best) * scale); }
DEVICE u64 fixed_point(float weight) { return (u64)(weight * 0x1p40f); }

// Returns the number of logits above `pivot`, and the sum of their weights.
DEVICE Sum above(const Logits &all, float pivot, Shared *shared) {
  const float best = unknown(all.best);  // else all weights would be kept in registers, too
  Sum sum = {0, 0};
#pragma unroll
  for (int i = 0; i < VALUES; i++)
    if (all.x[i] > pivot) sum.weight += weight(best, all.scale, all.x[i]), sum.count++;
  return of_block(sum, shared);
}

// Returns the lowest logit in (low, high] for which the sum of the weights above it is below
// `target`. `over_high` is the sum of the weights above `high`. Weights are added as integers, so
// that the order of the candidates does not matter.
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
