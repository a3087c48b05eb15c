// Dequantizes matrices in tiles to bf16, for prompts: which int64 [n] -> y bf16 [n, N, K]. The other
// tensors are in tiles.cuh. A warp has 16 rows by 256 columns at a time: four blocks of a tile, whose
// codes it loads together and whose scales are one load a lane. A block fills a multiprocessor: a
// launch with fewer blocks than those leaves the others to a product that runs at the same time.
#define OUTPUT 0
#define TOKENS 8
#define TOP_K 1
#define TABLE_STRIDE 32
#include "tiles.cuh"

#define WARPS 32
#define BLOCKS 4  // blocks of 64 columns that a warp has at a time

// The eight weights of one word of codes, as columns 0 to 7 of a row. Both factors are bf16, so that
// their product is rounded once.
DEVICE uint4 scaled_word(const u32 *table, u32 word, u32 scale, u32 lane) {
  return make_uint4(multiply_pair(decode(table, word, 0, lane), scale),
                    multiply_pair(decode(table, word, 1, lane), scale),
                    multiply_pair(decode(table, word, 2, lane), scale),
                    multiply_pair(decode(table, word, 3, lane), scale));
}

KERNEL void __launch_bounds__(WARPS * 32)
unpack(const uint4 *__restrict__ codes, const uint4 *__restrict__ absmax,
       const u32 *__restrict__ pairs, const long long *__restrict__ which, void *__restrict__ y,
       int matrices, int row_tiles, int k_blocks) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  u32 *table = shared_memory();
  fill_table(table, pairs, warp, WARPS, lane);
  __syncthreads();
  const u32 k_groups = k_blocks / BLOCKS, per_matrix = row_tiles * k_groups;
  const u32 end = matrices * per_matrix;  // at most 2^31 / 4096 of a matrix
  const u32 row_words = k_blocks * 8;     // of 16 bytes, as `to` counts them
  for (u32 i = blockIdx.x * WARPS + warp; i < end; i += gridDim.x * WARPS) {
    const u32 matrix = i / per_matrix, in_matrix = i % per_matrix;
    const u64 from = (u64)which[matrix] * per_matrix + in_matrix;
    const uint4 scales = load_once(absmax + from * 8 + g);
    const u32 scale_of[BLOCKS] = {scales.x, scales.y, scales.z, scales.w};
    uint4 words[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
      words[b] = load_once(codes + (from * BLOCKS + b) * 32 + lane);
    const u64 row = (u64)(i / k_groups) * 16 + g;
    uint4 *to = (uint4 *)y + row * row_words + i % k_groups * (BLOCKS * 8) + t;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const u32 upper = permute_bytes(scale_of[b], 0, 0x1010);
      const u32 lower = permute_bytes(scale_of[b], 0, 0x3232);
      to[b * 8] = scaled_word(table, words[b].x, upper, lane);
      to[b * 8 + 4] = scaled_word(table, words[b].y, upper, lane);
      to[8 * row_words + b * 8] = scaled_word(table, words[b].z, lower, lane);
      to[8 * row_words + b * 8 + 4] = scaled_word(table, words[b].w, lower, lane);
    }
  }
}
