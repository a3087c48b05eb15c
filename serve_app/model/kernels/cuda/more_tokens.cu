// Products with 4-bit weights for up to 64 tokens an expert. The warps of a block have different
// rows and, where there is more than one share, shares of K, whose sums are added in their order.
// Activations are copied to shared memory ahead of their use. The tensors are in tiles.cuh.
//
//   OUTPUT        DENSE, GATE_UP or DOWN
//   K_BLOCKS      K / 64; K is a multiple of 256 * SHARES
//   ROW_TILES     tiles of 16 rows of a warp
//   TOKEN_TILES   tiles of 8 tokens of a job; more tokens than that are more jobs
//   ROW_WARPS     warps of a share; a job has 16 * ROW_TILES * ROW_WARPS rows
//   SHARES        shares of K
//   CHUNK         blocks of 64 columns of activations that are copied at a time: 2 or 4
//   STAGES        chunks in shared memory, of which one is in use
//   SCALE_WEIGHTS 1: weights are scaled in bf16 before the product; 0: its sums, after each block
//   BLOCKS_PER_SM blocks that a multiprocessor runs at once: a limit of registers
#define TOKENS (8 * TOKEN_TILES)
#include "tiles.cuh"

#define STEP 2  // blocks of 64 columns that a warp computes at a time; the next ones are loading
#define THREADS (ROW_WARPS * SHARES * 32)
#define STAGE (CHUNK * TOKENS * 64)  // bf16 of a stage
#define SHARE (K_BLOCKS / SHARES)    // blocks of 64 columns of a warp
#define CHUNKS (SHARE / CHUNK)
static_assert(CHUNKS >= STAGES - 1, "copies run into the next job at most");

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

// Which rows and which share of K a warp has.
struct Place {
  int row_warp, share, lane;
};

DEVICE Source source_of(const Product &p, const Job &job, int groups, Place place) {
  const u64 group = (u64)job.expert * groups + job.group;
  const u64 tile = (group * ROW_WARPS + place.row_warp) * ROW_TILES;
  return {p.codes + (tile * K_BLOCKS + (u64)place.share * SHARE) * 32 + place.lane,
          p.absmax + (tile * (K_BLOCKS / 4) + (u64)place.share * (SHARE / 4)) * 8 +
              place.lane / 4};
}

DEVICE void load_step(Weights &weights, const Source &source, int block) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
    for (int b = 0; b < STEP; b++)
      weights.codes[r][b] = load_once(source.codes + (r * K_BLOCKS + block + b) * 32);
    const uint4 *four = source.absmax + (r * (K_BLOCKS / 4) + block / 4) * 8;
    weights.scales[r] = load((const uint2 *)four + block / 2 % 2);
  }
}

// 16 bytes of a token in a block of a stage, [TOKENS, 64 bf16]: part 0 to 7 of its columns. Odd
// tokens have their halves swapped, so that the lanes of a warp read from different banks.
DEVICE u32 position_of(u32 token, u32 part) {
  return token * 64 + (part / 4 ^ token % 2) * 32 + part % 4 * 8;
}

// Copies one chunk of the activations of `count` places; the threads of a share do it together.
DEVICE void copy_chunk(u16 *stage, const Product &p, int first, int count, int first_block,
                       u32 thread) {
  const u32 part = thread % 8, block = thread / 8 % CHUNK;
  for (int token = thread / 8 / CHUNK; token < count; token += ROW_WARPS * 4 / CHUNK) {
    const u64 row = p.row_of(first + token);
    copy_async(stage + block * TOKENS * 64 + position_of(token, part),
               p.x + (row * K_BLOCKS + first_block + block) * 64 + part * 8);
  }
}

// sums += one block of weights times the activations in `block` [TOKENS, 64].
DEVICE void multiply_block(float (*sums)[TOKEN_TILES][4], const u32 *table, const Weights &weights,
                           int b, const u16 *block, int token_tiles, u32 lane) {
  const u32 g = lane / 4, t = lane % 4;
  u32 fragments[ROW_TILES][4][4], scales[ROW_TILES];
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
    decode_block(fragments[r], table, weights.codes[r][b], lane);
    scales[r] = b == 0 ? weights.scales[r].x : weights.scales[r].y;
#if SCALE_WEIGHTS
    const u32 upper = permute_bytes(scales[r], 0, 0x1010);
    const u32 lower = permute_bytes(scales[r], 0, 0x3232);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        fragments[r][i][j] = multiply_pair(fragments[r][i][j], j % 2 ? lower : upper);
#endif
  }
#pragma unroll
  for (int n = 0; n < TOKEN_TILES; n++) {
    if (n >= token_tiles) continue;
    const uint4 left = *(const uint4 *)(block + n * 512 + position_of(g, t));
    const uint4 right = *(const uint4 *)(block + n * 512 + position_of(g, t + 4));
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#if SCALE_WEIGHTS
      float *d = sums[r][n];
      mma(d, fragments[r][0], left.x, left.y);
#else
      float d[4];
      mma_from_zero(d, fragments[r][0], left.x, left.y);
#endif
      mma(d, fragments[r][1], left.z, left.w);
      mma(d, fragments[r][2], right.x, right.y);
      mma(d, fragments[r][3], right.z, right.w);
#if !SCALE_WEIGHTS
      sums[r][n][0] += d[0] * upper_scale(scales[r]);
      sums[r][n][1] += d[1] * upper_scale(scales[r]);
      sums[r][n][2] += d[2] * lower_scale(scales[r]);
      sums[r][n][3] += d[3] * lower_scale(scales[r]);
#endif
    }
  }
}

DEVICE float4 quad(const float *d) { return make_float4(d[0], d[1], d[2], d[3]); }

// Adds the sums of all shares, through `shared` [SHARES, ROW_WARPS, rows, tokens, 32 lanes], and
// stores them.
DEVICE void finish(const Product &p, const Job &job, const float (*sums)[TOKEN_TILES][4],
                   float4 *shared, int token_tiles, Place place) {
#if SHARES == 1
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
      if (n >= token_tiles) continue;
      const int tile = (job.group * ROW_WARPS + place.row_warp) * ROW_TILES + r;
      store(p, job, tile * 16, place.lane / 4, n * 8 + place.lane % 4 * 2, quad(sums[r][n]));
    }
#else
  const int warp = place.share * ROW_WARPS + place.row_warp;
  __syncthreads();  // the last job's sums have been read
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++)
      if (n < token_tiles)
        shared[((warp * ROW_TILES + r) * TOKEN_TILES + n) * 32 + place.lane] = quad(sums[r][n]);
  __syncthreads();
  for (int i = threadIdx.x; i < ROW_WARPS * ROW_TILES * token_tiles * 32; i += THREADS) {
    const int from = i % 32, n = i / 32 % token_tiles, tile = i / 32 / token_tiles;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int s = 0; s < SHARES; s++) {
      const float4 part = shared[((s * ROW_WARPS * ROW_TILES + tile) * TOKEN_TILES + n) * 32 + from];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    const int row = (job.group * ROW_WARPS * ROW_TILES + tile) * 16;
    store(p, job, row, from / 4, n * 8 + from % 4 * 2, sum);
  }
#endif
}

KERNEL void __launch_bounds__(THREADS, BLOCKS_PER_SM)
more_tokens(const uint4 *__restrict__ codes, const uint4 *__restrict__ absmax,
            const u32 *__restrict__ pairs, const u16 *x, const int *order, const int *starts,
            const float *topk_weights, void *y, int experts, int out_features, int tokens) {
  const Product p = {codes, absmax, x, order, starts, topk_weights, y,
                     experts, out_features, tokens};
  const Jobs jobs = {&p, out_features / (16 * ROW_TILES * ROW_WARPS)};
  const int warp = threadIdx.x / 32;
  const Place place = {warp % ROW_WARPS, warp / ROW_WARPS, (int)threadIdx.x % 32};
  u32 *table = shared_memory();
  u16 *stages = (u16 *)(table + TABLE_WORDS) + place.share * STAGES * STAGE;
  float4 *shared = (float4 *)((u16 *)(table + TABLE_WORDS) + SHARES * STAGES * STAGE);

  if (WAITS_FOR_JOBS) {
    fill_table(table, pairs, warp, ROW_WARPS * SHARES, place.lane);
    wait_for_previous();
  }
  const int total = jobs.total();
  int number = blockIdx.x;
  if (number >= total) {
    if (!WAITS_FOR_JOBS) wait_for_previous();
    return;
  }
  Job job = jobs.at(number), next_job = jobs.at(number + gridDim.x);
  Source source = source_of(p, job, jobs.groups, place), next_source = source;
  Weights next;
  load_step(next, source, 0);
  if (!WAITS_FOR_JOBS) {
    fill_table(table, pairs, warp, ROW_WARPS * SHARES, place.lane);
    wait_for_previous();
  }

  // Copies run STAGES - 1 chunks ahead, over the end of a job into the next one.
  int copied_chunk = 0, copied_stage = 0;
  bool in_next_job = false;
  auto copy_next_chunk = [&]() {
    const int first = in_next_job ? next_job.first : job.first;
    const int count = in_next_job ? next_job.count : job.count;
    copy_chunk(stages + copied_stage * STAGE, p, first, count,
               place.share * SHARE + copied_chunk * CHUNK, threadIdx.x % (ROW_WARPS * 32));
    end_copy_group();
    copied_stage = copied_stage + 1 == STAGES ? 0 : copied_stage + 1;
    if (++copied_chunk == CHUNKS) copied_chunk = 0, in_next_job = true;
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) copy_next_chunk();
  __syncthreads();

  for (int stage = 0;;) {
    const int token_tiles = (job.count + 7) / 8;
    if (next_job.count) next_source = source_of(p, next_job, jobs.groups, place);
    float sums[ROW_TILES][TOKEN_TILES][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      wait_for_copies<STAGES - 2>();
      // This chunk is there for all threads, and all are done with the stage that is copied next.
      if (SHARES == 1) __syncthreads();
      else part_barrier(place.share + 1, ROW_WARPS * 32);
      copy_next_chunk();
      const u16 *activations = stages + stage * STAGE;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
#pragma unroll
      for (int block = 0; block < CHUNK; block += STEP) {
        const Weights now = next;
        const int next_block = chunk * CHUNK + block + STEP;
        if (next_block < SHARE) load_step(next, source, next_block);
        else if (next_job.count) load_step(next, next_source, 0);
#pragma unroll
        for (int b = 0; b < STEP; b++)
          multiply_block(sums, table, now, b, activations + (block + b) * TOKENS * 64, token_tiles,
                         place.lane);
      }
    }
    finish(p, job, sums, shared, token_tiles, place);
    if (next_job.count == 0) break;
    number += gridDim.x;
    job = next_job, source = next_source, in_next_job = false;
    next_job = jobs.at(number + gridDim.x);
  }
  wait_for_copies<0>();
}
