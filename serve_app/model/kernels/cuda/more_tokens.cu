// Products with 4-bit weights for up to 128 tokens an expert. The warps of a block have different
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

// The beginning of a warp's share of a job's weights, as indices of 16 bytes, which need half of the
// registers that pointers need.
struct Source {
  u32 codes, absmax;
};

// The position of a warp in the block: its rows and its share of K.
struct Place {
  int row_warp, share, lane;
};

DEVICE Place place_of(int thread) {
  return {thread / 32 % ROW_WARPS, thread / 32 / ROW_WARPS, thread % 32};
}

DEVICE Source source_of(const Job &job, int groups, Place place) {
  const u32 group = job.expert * groups + job.group;
  const u32 tile = (group * ROW_WARPS + place.row_warp) * ROW_TILES;
  return {(tile * K_BLOCKS + place.share * SHARE) * 32 + place.lane,
          (tile * (K_BLOCKS / 4) + place.share * (SHARE / 4)) * 8 + place.lane / 4};
}

DEVICE void load_step(Weights &weights, const Product &p, const Source &source, int block) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
    for (int b = 0; b < STEP; b++)
      weights.codes[r][b] = load_once(p.codes + source.codes + block * 32 + (r * K_BLOCKS + b) * 32);
    const uint4 *four = p.absmax + source.absmax + (r * (K_BLOCKS / 4) + block / 4) * 8;
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
#pragma unroll 1
  for (int token = thread / 8 / CHUNK; token < count; token += ROW_WARPS * 4 / CHUNK) {
    const u32 row = p.row_of(first + token);
    copy_async(stage + block * TOKENS * 64 + position_of(token, part),
               p.x + (row * K_BLOCKS + first_block + block) * 64 + part * 8);
  }
}

// sums += one block of weights times the activations of TILES tiles in `block` [TOKENS, 64]. The order
// of a token's sums is the same for any TILES.
template <int TILES>
DEVICE void multiply_block(float (*sums)[TOKEN_TILES][4], const u32 *table, const Weights &weights,
                           int b, const u16 *block, u32 lane) {
  const u32 g = lane / 4, t = lane % 4;
  u32 scales[ROW_TILES];
  float unscaled[ROW_TILES][TILES][4] = {};
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) scales[r] = b == 0 ? weights.scales[r].x : weights.scales[r].y;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const u16 *activations = block + position_of(g, t + 4 * half);  // of the first tile
#if TOKEN_TILES > 8
    // The weights of half a block are decoded first, because the activations of all tiles would take
    // too many registers.
    u32 fragments[ROW_TILES][2][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        decode_group(fragments[r][i], table, weights.codes[r][b], 2 * half + i, lane);
        if (SCALE_WEIGHTS) scale_group(fragments[r][i], scales[r]);
      }
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const uint4 x = *(const uint4 *)(activations + n * 512);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
          mma(SCALE_WEIGHTS ? sums[r][n] : unscaled[r][n], fragments[r][i], i ? x.z : x.x,
              i ? x.w : x.y);
    }
#else
    uint4 x[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++)
      x[n] = *(const uint4 *)(activations + n * 512);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
        u32 fragment[4];
        decode_group(fragment, table, weights.codes[r][b], 2 * half + i, lane);
        if (SCALE_WEIGHTS) scale_group(fragment, scales[r]);
#pragma unroll
        for (int n = 0; n < TILES; n++)
          mma(SCALE_WEIGHTS ? sums[r][n] : unscaled[r][n], fragment, i ? x[n].z : x[n].x,
              i ? x[n].w : x[n].y);
      }
    }
#endif
  }
  if (SCALE_WEIGHTS) return;
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int n = 0; n < TILES; n++) add_scaled(sums[r][n], unscaled[r][n], scales[r]);
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
  const int warp = shuffle(threadIdx.x / 32, 0);  // the compiler then knows that lanes share it
  const Place place = place_of(threadIdx.x);
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
  Source source = source_of(job, jobs.groups, place);
  Weights next;
  load_step(next, p, source, 0);
  if (!WAITS_FOR_JOBS) {
    fill_table(table, pairs, warp, ROW_WARPS * SHARES, place.lane);
    wait_for_previous();
  }

  // Copies run STAGES - 1 chunks ahead, over the end of a job into the next one.
  auto copy = [&](int stage, int chunk) {
    const bool in_next_job = chunk >= CHUNKS;
    const int first = in_next_job ? next_job.first : job.first;
    const int count = in_next_job ? next_job.count : job.count;
    const int first_block = (in_next_job ? chunk - CHUNKS : chunk) * CHUNK;
    copy_chunk(stages + stage * STAGE, p, first, count, place.share * SHARE + first_block,
               threadIdx.x % (ROW_WARPS * 32));
    end_copy_group();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) copy(i, i);
  __syncthreads();

  for (int stage = 0;;) {
    const int token_tiles = (job.count + 7) / 8;
    float sums[ROW_TILES][TOKEN_TILES][4] = {};
    with_tiles<TOKEN_TILES>(token_tiles, [&](auto tiles) {
#pragma unroll 1
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        wait_for_copies<STAGES - 2>();
        // This chunk is there for all threads, and all are done with the stage that is copied next.
        if (SHARES == 1) __syncthreads();
        else part_barrier(place.share + 1, ROW_WARPS * 32);
        copy(stage == 0 ? STAGES - 1 : stage - 1, chunk + STAGES - 1);
        const u16 *activations = stages + stage * STAGE;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
#pragma unroll(BLOCKS_PER_SM > 1 ? 1 : CHUNK / STEP)
        for (int block = 0; block < CHUNK; block += STEP) {
          const Weights now = next;
          const int next_block = chunk * CHUNK + block + STEP;
          if (next_block < SHARE) {
            load_step(next, p, source, next_block);
          } else if (next_job.count) {
            source = source_of(next_job, jobs.groups, place);
            load_step(next, p, source, 0);
          }
#pragma unroll
          for (int b = 0; b < STEP; b++)
            multiply_block<tiles.count>(sums, table, now, b, activations + (block + b) * TOKENS * 64,
                                        place.lane);
        }
      }
    });
    finish(p, job, sums, shared, token_tiles, place);
    if (next_job.count == 0) break;
    number += gridDim.x;
    job = next_job;
    next_job = jobs.at(number + gridDim.x);
  }
  wait_for_copies<0>();
}
