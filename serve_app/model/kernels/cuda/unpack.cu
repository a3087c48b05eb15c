// Dequantizes matrices in tiles to bf16, for prompts: which int64 [n] -> y bf16 [n, N, K]. The other
// tensors are in tiles.cuh. A warp has one block of a tile at a time.
#define OUTPUT 0
#define TOKENS 8
#define TOP_K 1
#define TABLE_STRIDE 32
#include "tiles.cuh"

#define WARPS 8

// Two weights times their scale, rounded once.
DEVICE u32 scaled_pair(u32 pair, float scale) {
  const float first = bits_to_float(pair << 16) * scale;
  const float second = bits_to_float(pair & 0xFFFF0000u) * scale;
  return to_bf16(first) | (u32)to_bf16(second) << 16;
}

// The eight weights of one word of codes.
DEVICE uint4 scaled_word(const u32 *table, u32 word, float scale, int lane) {
  return make_uint4(scaled_pair(decode(table, word, 0, lane), scale),
                    scaled_pair(decode(table, word, 1, lane), scale),
                    scaled_pair(decode(table, word, 2, lane), scale),
                    scaled_pair(decode(table, word, 3, lane), scale));
}

KERNEL void __launch_bounds__(WARPS * 32, 4)
unpack(const uint4 *__restrict__ codes, const uint4 *__restrict__ absmax,
       const u32 *__restrict__ pairs, const long long *__restrict__ which, void *__restrict__ y,
       int matrices, int row_tiles, int k_blocks) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  u32 *table = shared_memory();
  fill_table(table, pairs, warp, WARPS, lane);
  __syncthreads();
  const int per_matrix = row_tiles * k_blocks;  // at most 2^31 / 1024 of a matrix
  const u64 end = (u64)matrices * per_matrix;
  for (u64 i = (u64)blockIdx.x * WARPS + warp; i < end; i += (u64)gridDim.x * WARPS) {
    const int matrix = i / per_matrix, in_matrix = i % per_matrix;
    const int tile = in_matrix / k_blocks, block = in_matrix % k_blocks;
    const u64 source = (u64)which[matrix] * row_tiles + tile;
    const uint4 words = load_once(codes + (source * k_blocks + block) * 32 + lane);
    const u32 *scales = (const u32 *)(absmax + (source * (k_blocks / 4) + block / 4) * 8 + g);
    const u32 pair = scales[block % 4];
    const u64 row = ((u64)matrix * row_tiles + tile) * 16 + g;
    uint4 *upper = (uint4 *)((u16 *)y + (row * k_blocks + block) * 64) + t;
    uint4 *lower = (uint4 *)((u16 *)y + ((row + 8) * k_blocks + block) * 64) + t;
    upper[0] = scaled_word(table, words.x, upper_scale(pair), lane);
    upper[4] = scaled_word(table, words.y, upper_scale(pair), lane);
    lower[0] = scaled_word(table, words.z, lower_scale(pair), lane);
    lower[4] = scaled_word(table, words.w, lower_scale(pair), lane);
  }
}
