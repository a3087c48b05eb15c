// Products with 4-bit weights for experts with few tokens. A team is some warps that compute the same
// rows, each over its own share of K; at the end their sums are added in the order of warps. The
// teams of a block compute different jobs and share one table, so two teams need less shared memory
// than two blocks. Activations are read through the L1 cache. tiles.cuh describes the tensors.
//
//   OUTPUT        DENSE, GATE_UP or DOWN
//   K_BLOCKS      K / 64; K is a multiple of 256 * WARPS
//   ROW_TILES     tiles of 16 rows of a job
//   TOKEN_TILES   tiles of 8 tokens of a job; more tokens than that are more jobs
//   WARPS         of a team
//   TEAMS         of a block
//   BLOCKS_PER_SM blocks that a multiprocessor runs at once: a limit of registers
#define TOKENS (8 * TOKEN_TILES)
#include "tiles.cuh"

#define STEP 2  // blocks of 64 columns that a warp computes at a time; the next ones are loading
#define BUFFERS (TOKEN_TILES <= 2 ? 2 : 1)  // for sums: the next job may begin before all are read
#define SHARE (K_BLOCKS / WARPS)  // blocks of 64 columns of a warp
#define SUMS (WARPS * ROW_TILES * TOKEN_TILES * 32)  // float4 of a buffer
#define THREADS (TEAMS * WARPS * 32)

// The weights of a warp's next step.
struct Weights {
  uint4 codes[ROW_TILES][STEP];
  uint2 scales[ROW_TILES];
};

// The addresses at which a warp's share of a job's weights begins.
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
      weights.codes[r][b] = load_once(source.codes + step * STEP * 32 + (r * K_BLOCKS + b) * 32);
    const uint4 *four = source.absmax + (r * (K_BLOCKS / 4) + step / 2) * 8;
    weights.scales[r] = load((const uint2 *)four + step % 2);
  }
}

// A barrier of the team's threads.
DEVICE void team_barrier(int team) {
  if (TEAMS == 1) __syncthreads();
  else part_barrier(team + 1, WARPS * 32);
}

// sums += block b of a step of weights times the activations of TILES tiles; `row` [TILES]: those of
// this lane's tokens.
template <int TILES>
DEVICE void multiply_block(float (*sums)[TOKEN_TILES][4], const u32 *table, const Weights &weights,
                           int b, const u16 *const *row, int step, int lane) {
  u32 fragments[ROW_TILES][4][4];
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      decode_group(fragments[r][i], table, weights.codes[r][b], i, lane);
#pragma unroll
  for (int n = 0; n < TILES; n++) {
    const u16 *at = row[n] + step * STEP * 64 + b * 64;
    const uint4 left = load_fresh((const uint4 *)at);
    const uint4 right = load_fresh((const uint4 *)(at + 32));
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      float unscaled[4];
      mma_from_zero(unscaled, fragments[r][0], left.x, left.y);
      mma(unscaled, fragments[r][1], left.z, left.w);
      mma(unscaled, fragments[r][2], right.x, right.y);
      mma(unscaled, fragments[r][3], right.z, right.w);
      add_scaled(sums[r][n], unscaled, b == 0 ? weights.scales[r].x : weights.scales[r].y);
    }
  }
}

KERNEL void __launch_bounds__(THREADS, BLOCKS_PER_SM)
few_tokens(const uint4 *__restrict__ codes, const uint4 *__restrict__ absmax,
           const u32 *__restrict__ pairs, const u16 *x, const int *order, const int *starts,
           const float *topk_weights, void *y, int experts, int out_features, int tokens) {
  const Product p = {codes, absmax, x, order, starts, topk_weights, y,
                     experts, out_features, tokens};
  const Jobs jobs = {&p, out_features / (16 * ROW_TILES)};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % WARPS, g = lane / 4, t = lane % 4;
  const int team = TEAMS == 1 ? 0 : shuffle(threadIdx.x / 32 / WARPS, 0);
  u32 *table = shared_memory();
  // [TEAMS, BUFFERS, WARPS, rows, tokens, 32 lanes]
  float4 *all_sums = (float4 *)(table + TABLE_WORDS);

  if (WAITS_FOR_JOBS) {
    fill_table(table, pairs, threadIdx.x / 32, TEAMS * WARPS, lane);
    wait_for_previous();
  }
  if (blockIdx.x * TEAMS >= jobs.total()) {
    if (!WAITS_FOR_JOBS) wait_for_previous();
    return;
  }
  int number = blockIdx.x * TEAMS + team;
  Job job = jobs.at(number);
  Source source = source_of(p, job, jobs.groups, warp, lane);
  Weights next;
  if (TEAMS == 1 || job.count) load_step(next, source, 0);
  if (!WAITS_FOR_JOBS) {
    fill_table(table, pairs, threadIdx.x / 32, TEAMS * WARPS, lane);
    wait_for_previous();
  }
  __syncthreads();
  if (TEAMS > 1 && job.count == 0) return;

  for (int buffer = 0;; buffer ^= 1) {
    const int token_tiles = (job.count + 7) / 8;
    const u16 *row[TOKEN_TILES];  // this lane's token of each tile; tokens beyond the last are it
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
      const int token = n * 8 + g < job.count ? n * 8 + g : job.count - 1;
      row[n] = x + ((u64)p.row_of(job.first + token) * K_BLOCKS + warp * SHARE) * 64 + t * 8;
    }
    number += gridDim.x * TEAMS;
    const Job next_job = jobs.at(number);
    const bool is_last = next_job.count == 0;
    const Source next_source = is_last ? source : source_of(p, next_job, jobs.groups, warp, lane);
    float sums[ROW_TILES][TOKEN_TILES][4] = {};
    with_tiles<TOKEN_TILES>(token_tiles, [&](auto tiles) {
#pragma unroll 1
      for (int step = 0; step < SHARE / STEP; step++) {
        const Weights now = next;
        if (step + 1 < SHARE / STEP) load_step(next, source, step + 1);
        else if (!is_last) load_step(next, next_source, 0);
#pragma unroll
        for (int b = 0; b < STEP; b++)
          multiply_block<tiles.count>(sums, table, now, b, row, step, lane);
      }
    });
    float4 *shared = all_sums + (team * BUFFERS + buffer % BUFFERS) * SUMS;
    if (BUFFERS == 1) team_barrier(team);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; n++)
        if (TOKEN_TILES == 1 || n < token_tiles)
          shared[((warp * ROW_TILES + r) * TOKEN_TILES + n) * 32 + lane] =
              make_float4(sums[r][n][0], sums[r][n][1], sums[r][n][2], sums[r][n][3]);
    team_barrier(team);
    for (int i = warp * 32 + lane; i < ROW_TILES * token_tiles * 32; i += WARPS * 32) {
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
