// The choice of experts from a token's router logits, and tokens in the order of experts. Letters as
// in tiles.cuh; entry token * k + j is the jth expert of a token.
#pragma once
#include "floats.cuh"

#define NOT_FINITE_FROM 1e38f  // router logits beyond this count as not finite
#define NO_EXPERT EXPERTS      // of a padding row

// The k largest of `logits` [E], of equal ones the first, and the softmax over them.
//
// A row with numbers that are not finite gets NaN as its weights, and still k different experts.
DEVICE void choose_experts(const float *logits, int *ids, float *weights) {
  float left[EXPERTS];
  bool is_sound = true;
#pragma unroll
  for (int e = 0; e < EXPERTS; e++) {
    const bool is_finite = logits[e] > -NOT_FINITE_FROM && logits[e] < NOT_FINITE_FROM;
    is_sound = is_sound && is_finite;
    left[e] = is_finite ? logits[e] : -NOT_FINITE_FROM;
  }
  float total = 0.f, largest = 0.f;
#pragma unroll
  for (int j = 0; j < TOP_K; j++) {
    int best = 0;
    float value = left[0];
#pragma unroll
    for (int e = 1; e < EXPERTS; e++)
      if (left[e] > value) best = e, value = left[e];
    if (j == 0) largest = value;
    ids[j] = best;
    weights[j] = exponential(value - largest);
    total += weights[j];
#pragma unroll
    for (int e = 0; e < EXPERTS; e++)
      if (e == best) left[e] = -INFINITE;
  }
#pragma unroll
  for (int j = 0; j < TOP_K; j++) weights[j] = is_sound ? weights[j] / total : NOT_A_NUMBER;
}

// Sorts entries by expert, by all threads of the block: `order` gets the entries, `starts` [E + 1]
// the first place of each expert. `topk_ids` [entries] has been written by other blocks. `staged`
// [entries] and `sizes` [E] are shared memory.
DEVICE void sort_by_expert(const int *topk_ids, int *order, int *starts, int entries,
                           unsigned char *staged, int *sizes) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int i = threadIdx.x; i < entries; i += blockDim.x) staged[i] = load_from_l2(topk_ids + i);
  __syncthreads();
  for (int e = warp; e < EXPERTS; e += warps) {
    int count = 0;
    for (int first = 0; first < entries; first += 32)
      count += count_bits(ballot(first + lane < entries && staged[first + lane] == e));
    if (lane == 0) sizes[e] = count;
  }
  __syncthreads();
  for (int e = warp; e < EXPERTS; e += warps) {
    int place = 0;
    for (int before = 0; before < e; before++) place += sizes[before];
    if (lane == 0) starts[e] = place;
    for (int first = 0; first < entries; first += 32) {
      const bool is_hit = first + lane < entries && staged[first + lane] == e;
      const u32 hits = ballot(is_hit);
      if (is_hit) order[place + count_bits(hits & ((1u << lane) - 1))] = first + lane;
      place += count_bits(hits);
    }
    if (lane == 0 && e == EXPERTS - 1) starts[EXPERTS] = place;
  }
}
