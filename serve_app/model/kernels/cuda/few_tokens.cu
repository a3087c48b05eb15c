// Products with 4-bit weights for a few tokens an expert. The warps of a block have the same rows
// and a share of K each, and add their sums at the end, in the order of warps. Activations are read
// through the L1 cache. The tensors are in tiles.cuh.
//
//   OUTPUT        DENSE, GATE_UP or DOWN
//   K_BLOCKS      K / 64; K is a multiple of 256 * WARPS
//   ROW_TILES     tiles of 16 rows of a job
//   TOKEN_TILES   tiles of 8 tokens of a job; more tokens than that are more jobs
//   WARPS         of a block
//   BLOCKS_PER_SM blocks that a multiprocessor runs at once: a limit of registers
#define TOKENS (8 * TOKEN_TILES)
#include "tiles.cuh"

#define STEP 2  // blocks of 64 columns that a warp computes at a time; the next ones are loading
#define BUFFERS (TOKEN_TILES <= 2 ? 2 : 1)  // for sums: the next job may begin before all are read
#define SHARE (K_BLOCKS / WARPS)  // blocks of 64 columns of a warp
#define SUMS (WARPS * ROW_TILES * TOKEN_TILES * 32)  // float4 of a buffer

// The weights of a warp's next step.
struct Weights {
  uint4 codes[ROW_TILES][STEP];
  uint2 scales[ROW_TILES];
};

// Where a warp's share of a job's weights begins.
struct Source {
  const uint4 *codes;
  const uint4 *absmax;
};

DEVICE Source source_of(const Product &p, const Job &job, int groups, int warp, int lane) {
  const u64 tile = ((u64)job.expert * groups + job.group) * ROW_TILES;
  return {p.codes + (tile * K_BLOCKS + (u64)warp * SHARE) * 32 + lane,
          p.absmax + (tile * (K_BLOCKS / 4) + (u64)warp * (SHARE / 4)) * 8 + lane / 4};
}

DEVICE void load_step(Weights &weights, const Source &source, int step) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
    for (int b = 0; b < STEP; b++)
      weights.codes[r][b] = load_once(source.codes + (r * K_BLOCKS + step * STEP + b) * 32);
    const uint4 *four = source.absmax + (r * (K_BLOCKS / 4) + step / 2) * 8;
    weights.scales[r] = load((const uint2 *)four + step % 2);
  }
}

KERNEL void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
few_tokens(const uint4 *__restrict__ codes, const uint4 *__restrict__ absmax,
           const u32 *__restrict__ pairs, const u16 *x, const int *order, const int *starts,
           const float *topk_weights, void *y, int experts, int out_features, int tokens) {
  const Product p = {codes, absmax, x, order, starts, topk_weights, y,
                     experts, out_features, tokens};
  const Jobs jobs = {&p, out_features / (16 * ROW_TILES)};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  u32 *table = shared_memory();
  float4 *all_sums = (float4 *)(table + TABLE_WORDS);  // [BUFFERS, WARPS, rows, tokens, 32 lanes]

  if (WAITS_FOR_JOBS) {
    fill_table(table, pairs, warp, WARPS, lane);
    wait_for_previous();
  }
  const int total = jobs.total();
  int number = blockIdx.x;
  if (number >= total) {
    if (!WAITS_FOR_JOBS) wait_for_previous();
    return;
  }
  Job job = jobs.at(number);
  Source source = source_of(p, job, jobs.groups, warp, lane);
  Weights next;
  load_step(next, source, 0);
  if (!WAITS_FOR_JOBS) {
    fill_table(table, pairs, warp, WARPS, lane);
    wait_for_previous();
  }
  __syncthreads();

  for (int buffer = 0;; buffer ^= 1) {
    const int token_tiles = (job.count + 7) / 8;
    const u16 *row[TOKEN_TILES];  // this lane's token of each tile; tokens beyond the last are it
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
      const int token = n * 8 + g < job.count ? n * 8 + g : job.count - 1;
      row[n] = x + ((u64)p.row_of(job.first + token) * K_BLOCKS + warp * SHARE) * 64 + t * 8;
    }
    number += gridDim.x;
    const Job next_job = jobs.at(number);
    const bool is_last = next_job.count == 0;
    const Source next_source = is_last ? source : source_of(p, next_job, jobs.groups, warp, lane);
    float sums[ROW_TILES][TOKEN_TILES][4] = {};
#pragma unroll 1
    for (int step = 0; step < SHARE / STEP; step++) {
      const Weights now = next;
      if (step + 1 < SHARE / STEP) load_step(next, source, step + 1);
      else if (!is_last) load_step(next, next_source, 0);
#pragma unroll
      for (int b = 0; b < STEP; b++) {
        u32 fragments[ROW_TILES][4][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
          decode_block(fragments[r], table, now.codes[r][b], lane);
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
          if (TOKEN_TILES > 1 && n >= token_tiles) continue;
          const u16 *at = row[n] + (step * STEP + b) * 64;
          const uint4 left = load_fresh((const uint4 *)at);
          const uint4 right = load_fresh((const uint4 *)(at + 32));
#pragma unroll
          for (int r = 0; r < ROW_TILES; r++) {
            float d[4];
            mma_from_zero(d, fragments[r][0], left.x, left.y);
            mma(d, fragments[r][1], left.z, left.w);
            mma(d, fragments[r][2], right.x, right.y);
            mma(d, fragments[r][3], right.z, right.w);
            const u32 scales = b == 0 ? now.scales[r].x : now.scales[r].y;
            sums[r][n][0] += d[0] * upper_scale(scales);
            sums[r][n][1] += d[1] * upper_scale(scales);
            sums[r][n][2] += d[2] * lower_scale(scales);
            sums[r][n][3] += d[3] * lower_scale(scales);
          }
        }
      }
    }
    float4 *shared = all_sums + (BUFFERS == 2 ? buffer : 0) * SUMS;
    if (BUFFERS == 1) __syncthreads();
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; n++)
        if (TOKEN_TILES == 1 || n < token_tiles)
          shared[((warp * ROW_TILES + r) * TOKEN_TILES + n) * 32 + lane] =
              make_float4(sums[r][n][0], sums[r][n][1], sums[r][n][2], sums[r][n][3]);
    __syncthreads();
    for (int i = threadIdx.x; i < ROW_TILES * token_tiles * 32; i += WARPS * 32) {
      const int from = i % 32, r = i / 32 / token_tiles, n = i / 32 % token_tiles;
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float4 part = shared[((w * ROW_TILES + r) * TOKEN_TILES + n) * 32 + from];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      const int tile = job.group * ROW_TILES + r;
      store(p, job, tile * 16, from / 4, n * 8 + from % 4 * 2, sum);
    }
    if (is_last) return;
    job = next_job, source = next_source;
  }
}
