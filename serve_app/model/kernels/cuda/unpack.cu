// Dequantizes matrices in tiles to bf16, for prompts: which int64 [n] -> y bf16 [n, N, K]. The other
// tensors are in tiles.cuh. A warp has 16 rows by 256 columns at a time: four blocks of a tile, whose
// codes it loads together and whose scales are one load a lane. Lanes of adjacent rows exchange codes,
// so that eight lanes write the 128 bytes of a row's block together. A block fills a multiprocessor:
// a launch with fewer blocks than those leaves the others to a product that runs at the same time.
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

// Returns `a` where `mask` is 0 and `b` where all its bits are set, without a branch.
DEVICE u32 choose(u32 mask, u32 a, u32 b) { return (a & ~mask) | (b & mask); }

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
  const u32 is_odd = g % 2, odd = 0u - is_odd;
  for (u32 i = blockIdx.x * WARPS + warp; i < end; i += gridDim.x * WARPS) {
    const u32 matrix = i / per_matrix, in_matrix = i % per_matrix;
    const u64 from = (u64)which[matrix] * per_matrix + in_matrix;
    const uint4 scales = load_once(absmax + from * 8 + g);
    const u32 scale_of[BLOCKS] = {scales.x, scales.y, scales.z, scales.w};
    uint4 words[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
      words[b] = load_once(codes + (from * BLOCKS + b) * 32 + lane);
    const u64 row = (u64)(i / k_groups) * 16 + g - is_odd;
    uint4 *to = (uint4 *)y + row * row_words + i % k_groups * (BLOCKS * 8) + is_odd * 4 + t;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const uint4 word = words[b];
      // A lane of an even row keeps the left half of its block and gets that of the next row; a lane
      // of an odd row gets the right half of the row before.
      const u32 other = shuffle_xor(scale_of[b], 4);
      const u32 got = shuffle_xor(choose(odd, word.y, word.x), 4);
      const u32 got_lower = shuffle_xor(choose(odd, word.w, word.z), 4);
      const u32 even_row = choose(odd, scale_of[b], other), odd_row = choose(odd, other, scale_of[b]);
      const u32 upper[] = {permute_bytes(even_row, 0, 0x1010), permute_bytes(odd_row, 0, 0x1010)};
      const u32 lower[] = {permute_bytes(even_row, 0, 0x3232), permute_bytes(odd_row, 0, 0x3232)};
      to[b * 8] = scaled_word(table, choose(odd, word.x, got), upper[0], lane);
      to[row_words + b * 8] = scaled_word(table, choose(odd, got, word.y), upper[1], lane);
      to[8 * row_words + b * 8] = scaled_word(table, choose(odd, word.z, got_lower), lower[0], lane);
      to[9 * row_words + b * 8] = scaled_word(table, choose(odd, got_lower, word.w), lower[1], lane);
    }
  }
}
