// The common part of the products: weights in tiles, decoding, the jobs of a launch, the results.
//
// Letters: E experts, N out_features, K in_features, T tokens, k experts per token (TOP_K).
// K is known when a kernel is compiled: K_BLOCKS is K / 64. A tile is 16 rows by a block of 64
// columns. Lane 4g + t of a warp has its rows g and g + 8. tiles.py has an example.
//   codes   16 bytes [E, N / 16, K / 64, 32 lanes]: row g, columns 8t to 8t + 7 and 32 + 8t to
//           32 + 8t + 7; then row g + 8, the same columns; two columns per byte, the first in the
//           high bits
//   absmax  bf16 [E, N / 16, K / 256, 8 g, 4 blocks, rows g and g + 8]
// The entry token * k + j is the jth expert of a token. `order` has the entries sorted by expert. A
// place is an index of `order`; the places of expert e are starts[e] to starts[e + 1] - 1.
#pragma once
#include "floats.cuh"

// The products, with their inputs and outputs.
#define DENSE 0    // E = 1: x bf16 [T, K] -> y float [T, N]
#define GATE_UP 1  // x bf16 [T, K] -> silu(gate) * up as y bf16 [T * k places, N / 2]
#define DOWN 2     // x bf16 [T * k places, K] -> topk_weights * product as y float [T * k entries, N]

// The kernel before gate_up chooses the experts, so the jobs of gate_up are known only after the wait
// for that kernel. The jobs of the other products are known before their wait (`down` is two kernels
// after the choice), so they load their first weights before it.
#define WAITS_FOR_JOBS (OUTPUT == GATE_UP)

// The table has, for each of the 256 bytes, the values of its two codes as bf16, the first in the low
// half. Each entry is stored 32 times, once per lane, so that every lane reads its own bank. With a
// stride of 64 words between two bytes the table takes 64 KB and an address one instruction; with 32
// words it takes 32 KB, and an address two instructions.
#define TABLE_WORDS (256 * TABLE_STRIDE)

// Fills the table. `pairs` [256] has each entry once.
DEVICE void fill_table(u32 *table, const u32 *pairs, int warp, int warps, int lane) {
#pragma unroll 8
  for (int byte = warp; byte < 256; byte += warps) table[byte * TABLE_STRIDE + lane] = pairs[byte];
}

// Returns the two weights of byte `i` of `word`, not scaled yet.
DEVICE u32 decode(const u32 *table, u32 word, int i, u32 lane) {
  const u32 column = lane * 4;
#if TABLE_STRIDE == 64
  // Bytes of the address: 4 * lane, byte i of the word, 0, 0.
  const u32 at = permute_bytes(column, word, 0x1140 + 0x10 * i);
#else
  const u32 at = ((i == 0 ? word << 7 : word >> (8 * i - 7)) & 0x7F80) | column;
#endif
  return *(const u32 *)((const char *)table + at);
}

// Decodes part i (0 to 3) of a block of a tile into a fragment for `mma`. In lane 4g + t it has the
// columns 32 * (i / 2) + 8t + 4 * (i % 2) to the third one after it, of rows g and g + 8.
DEVICE void decode_group(u32 *fragment, const u32 *table, uint4 codes, int i, u32 lane) {
  const u32 upper = i / 2 ? codes.y : codes.x, lower = i / 2 ? codes.w : codes.z;
  fragment[0] = decode(table, upper, 2 * (i % 2), lane);
  fragment[1] = decode(table, lower, 2 * (i % 2), lane);
  fragment[2] = decode(table, upper, 2 * (i % 2) + 1, lane);
  fragment[3] = decode(table, lower, 2 * (i % 2) + 1, lane);
}

// Return the scales of a block's rows g and g + 8, which are the low and the high half of `pair`.
DEVICE float upper_scale(u32 pair) { return bits_to_float(pair << 16); }
DEVICE float lower_scale(u32 pair) { return bits_to_float(pair & 0xFFFF0000u); }

// A fragment times its scales.
DEVICE void scale_group(u32 *fragment, u32 pair) {
  const u32 upper = permute_bytes(pair, 0, 0x1010), lower = permute_bytes(pair, 0, 0x3232);
#pragma unroll
  for (int j = 0; j < 4; j++) fragment[j] = multiply_pair(fragment[j], j % 2 ? lower : upper);
}

// sums += what fragments without their scales gave, times the scales.
DEVICE void add_scaled(float *sums, const float *unscaled, u32 pair) {
  sums[0] += unscaled[0] * upper_scale(pair);
  sums[1] += unscaled[1] * upper_scale(pair);
  sums[2] += unscaled[2] * lower_scale(pair);
  sums[3] += unscaled[3] * lower_scale(pair);
}

// The tensors of a launch.
struct Product {
  const uint4 *codes;
  const uint4 *absmax;
  const u16 *x;
  const int *order, *starts;
  const float *topk_weights;
  void *y;
  int experts, out_features, tokens;

  DEVICE int first(int expert) const { return OUTPUT == DENSE ? 0 : starts[expert]; }
  DEVICE int end(int expert) const { return OUTPUT == DENSE ? tokens : starts[expert + 1]; }

  // Returns the row of x [rows, K] for a place.
  DEVICE int row_of(int place) const { return OUTPUT == GATE_UP ? order[place] / TOP_K : place; }
};

// A job: up to TOKENS tokens of one expert, multiplied by one group of rows of its matrix.
struct Job {
  int expert, group, first, count;
};

// The jobs of a launch: for each expert with tokens, for each pass of TOKENS tokens, all `groups` of
// rows. Example: with 2 groups and TOKENS 16, experts with 5, 0 and 20 tokens have 2, 0 and 4 jobs.
struct Jobs {
  const Product *product;
  int groups;

  DEVICE int total() const {
    int jobs = 0;
    for (int e = 0; e < product->experts; e++)
      jobs += (product->end(e) - product->first(e) + TOKENS - 1) / TOKENS * groups;
    return jobs;
  }

  DEVICE Job at(int number) const {
    Job job = {0, number, 0, 0};
    for (; job.expert < product->experts; job.expert++) {
      job.first = product->first(job.expert);
      const int end = product->end(job.expert);
      for (; job.first < end; job.first += TOKENS) {
        if (job.group < groups) {
          job.count = end - job.first < TOKENS ? end - job.first : TOKENS;
          return job;
        }
        job.group -= groups;
      }
    }
    return job;
  }
};

// A number of token tiles as a type.
template <int N> struct Tiles {
  static constexpr int count = N;
};

// Calls `work` with a quarter, half, three quarters or all of MOST token tiles, at least `needed`.
// The number is a compile-time constant, so a loop over K has no branch per tile.
template <int MOST, int N = (MOST + 3) / 4, class Work>
DEVICE void with_tiles(int needed, const Work &work) {
  if constexpr (N < MOST) {
    if (needed > N) return with_tiles<MOST, N + (MOST + 3) / 4>(needed, work);
  }
  work(Tiles<N>());
}

DEVICE float silu(float x) { return x / (1.f + exponential(-x)); }

// Stores what lane 4g + t has of a tile's sums: x, y are row g at tokens `token` and `token` + 1 of
// the job, z, w row g + 8. `row` is the tile's first. For GATE_UP row g is gate, row g + 8 its up.
DEVICE void store(const Product &p, const Job &job, int row, int g, int token, float4 sums) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (token + i >= job.count) return;
    const int place = job.first + token + i;
    const float upper = i ? sums.y : sums.x, lower = i ? sums.w : sums.z;
#if OUTPUT == GATE_UP
    ((u16 *)p.y)[(u64)place * (p.out_features / 2) + row / 2 + g] = to_bf16(silu(upper) * lower);
#else
    const int entry = OUTPUT == DOWN ? p.order[place] : place;
    const float scale = OUTPUT == DOWN ? p.topk_weights[entry] : 1.f;
    float *y = (float *)p.y + (u64)entry * p.out_features + row + g;
    y[0] = upper * scale;
    y[8] = lower * scale;
#endif
  }
}
