// Divides a context into splits, and combines the results of attention: those of the warps of a
// block, then those of the splits. The letters are those of attention.cu.
#pragma once
#include "floats.cuh"

#define TILE (16 * WARPS)  // tokens that a block computes at once
#define MAX_SPLITS 32
#define LANE_DIMS (HEAD_DIM / 32)  // of a head; a lane has d = lane, lane + 32, ...

struct Span {
  int first, end, size, count;  // the first token and the end, tokens of a split, number of splits
};

// Returns splits of 64 tokens for contexts up to 512, of 128 up to 2,048, of 256 up to 8,192, and for
// longer ones 32 equal splits of whole tiles. Longer splits write fewer results per token.
DEVICE Span span_of(int end, int window) {
  const int first = window > 0 && end > window ? end - window : 0, length = end - first;
  int size = 64;
  while (size < 256 && length > size * size / 8) size *= 2;
  if (length > MAX_SPLITS * size)
    size = (length + MAX_SPLITS * TILE - 1) / (MAX_SPLITS * TILE) * TILE;
  return {first, end, size, (length + size - 1) / size};
}

// The attention of a query head to some tokens: the largest score, and relative to it the sum of
// exponentials and the lane's dimensions of the weighted sum of values.
struct Sums {
  float largest, total, mixed[LANE_DIMS];
};

// Writes a row of the output: the sums divided by their total.
DEVICE void store_row(u16 *out, const Sums &sums, int lane) {
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) out[lane + 32 * i] = to_bf16(sums.mixed[i] / sums.total);
}

// The memory for the results of the splits of one row and KV head: float `mixed` [G, MAX_SPLITS, D]
// and `stats` [G, MAX_SPLITS, 2].
struct Partial {
  float *mixed, *stats;

  DEVICE void store(int head, int split, const Sums &sums, int lane) const {
    const int at = head * MAX_SPLITS + split;
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) mixed[at * HEAD_DIM + lane + 32 * i] = sums.mixed[i];
    if (lane == 0) stats[at * 2] = sums.largest, stats[at * 2 + 1] = sums.total;
  }

  // Combines all splits of a head in their order, by one warp.
  DEVICE Sums combined(int head, int count, int lane) const {
    const int first = head * MAX_SPLITS;
    const float *mine = stats + (first + lane) * 2;
    const bool is_there = lane < count;
    const float largest = is_there ? bits_to_float(load_from_l2(mine)) : -INFINITE;
    const float total = is_there ? bits_to_float(load_from_l2(mine + 1)) : 0.f;
    Sums sums = {lane_max(largest, 31, lane), 0.f, {}};
    const float factor = is_there ? power_of_two(largest - sums.largest) : 0.f;
    sums.total = lane_sum(factor * total, 31, lane);
#pragma unroll 8
    for (int split = 0; split < count; split++) {
      const float *row = mixed + (first + split) * HEAD_DIM + lane;
      const float share = shuffled(factor, split);
#pragma unroll
      for (int i = 0; i < LANE_DIMS; i++)
        sums.mixed[i] += share * bits_to_float(load_from_l2(row + 32 * i));
    }
    return sums;
  }
};
