// Adds the parts of the last product to the hidden state and normalizes it (RMSNorm, arXiv
// 1910.07467); before experts it also chooses them. A block has one row, a thread eight columns.
//
//   SIZE         H, the hidden size: a multiple of 256, at most 8192
//   SUMMANDS     rows of parts for each token; 0: the hidden state begins as rows of the embedding
//   EXPERTS      E, the experts that the router chooses from, at most 8; 0: no router
//   TOP_K        k, the experts of a token
//   MAX_ENTRIES  the most entries, T * k
//   EPS          added to the mean square
//
//   token_ids int64 [T], embedding bf16 [V, H]: where SUMMANDS is 0
//   x         bf16 [T, H]: the hidden state, read and written
//   parts     float [T * SUMMANDS, H]; padding rows, whose context length is 0, have none
//   lens      int [T]: context lengths
//   weight    bf16 [H], router bf16 [E, H]
//   y         bf16 [T, H]: the normalized hidden state
//   topk_ids  int [T * k]: between blocks; topk_weights float [T * k], order int [T * k],
//   starts    int [E + 1]: as the products read them, see tiles.cuh
//   finished  int [1]: 0 between launches
#include "floats.cuh"
#if EXPERTS
#include "routing.cuh"
#endif

#define THREADS (SIZE / 8)
#define WARPS (THREADS / 32)

struct Shared {
  float squares[WARPS];
#if EXPERTS
  float logits[WARPS][EXPERTS];
  int sizes[EXPERTS];
  int is_last;
  unsigned char staged[MAX_ENTRIES];
#endif
};

// `x` [8] plus the thread's columns of `row` [H] of floats.
DEVICE void add_columns(float *x, const float *row) {
  const uint4 *at = (const uint4 *)row + threadIdx.x * 2;
  const uint4 first = load_fresh(at), second = load_fresh(at + 1);
  const u32 words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] += bits_to_float(words[i]);
}

// The sum of `mine` over the block, in the order of warps.
DEVICE float block_sum(float mine, float *of_warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  mine = lane_sum(mine, 31, lane);
  if (lane == 0) of_warps[warp] = mine;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += of_warps[w];
  return sum;
}

#if EXPERTS
// The tensors that get the results of the router.
struct Routing {
  int *topk_ids;
  float *topk_weights;
  int *order, *starts, *finished;
};

// Chooses the experts of the block's row from y [8] and the same columns of the router's rows. The
// block that is last to finish sorts the entries of all rows.
DEVICE void route(const float *y, const uint4 *router, bool is_live, const Routing &out,
                  Shared *shared) {
  const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int e = 0; e < EXPERTS; e++) {
    float weights[8], sum = 0.f;
    unpack_eight(weights, router[e]);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += y[i] * weights[i];
    sum = lane_sum(sum, 31, lane);
    if (lane == 0) shared->logits[warp][e] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    float sum = 0.f, logits[EXPERTS];
    for (int w = 0; w < WARPS; w++) sum += shared->logits[w][lane < EXPERTS ? lane : 0];
    // Rounded as plain torch does, so that both choose alike.
#pragma unroll
    for (int e = 0; e < EXPERTS; e++) logits[e] = from_bf16(to_bf16(shuffled(sum, e)));
    int ids[TOP_K];
    float weights[TOP_K];
    choose_experts(logits, ids, weights);
    if (lane == 0) {
#pragma unroll
      for (int j = 0; j < TOP_K; j++) {
        out.topk_ids[row * TOP_K + j] = is_live ? ids[j] : NO_EXPERT;
        out.topk_weights[row * TOP_K + j] = weights[j];
      }
      fence();
      shared->is_last = gridDim.x == 1 || atomic_add(out.finished, 1) == (int)gridDim.x - 1;
    }
  }
  __syncthreads();
  if (!shared->is_last) return;
  fence();
  if (threadIdx.x == 0) *out.finished = 0;
  sort_by_expert(out.topk_ids, out.order, out.starts, gridDim.x * TOP_K, shared->staged,
                 shared->sizes);
}
#endif

KERNEL void __launch_bounds__(THREADS, 1)
add_norm(const long long *token_ids, const u16 *__restrict__ embedding, u16 *x, const float *parts,
         const int *lens, const u16 *__restrict__ weight, u16 *y, const u16 *__restrict__ router,
         int *topk_ids, float *topk_weights, int *order, int *starts, int *finished) {
  Shared *shared = (Shared *)shared_memory();
  const u64 row = blockIdx.x;
  uint4 *mine = (uint4 *)(x + row * SIZE) + threadIdx.x;
  const uint4 weights = load((const uint4 *)weight + threadIdx.x);
#if EXPERTS
  uint4 of_router[EXPERTS];
#pragma unroll
  for (int e = 0; e < EXPERTS; e++)
    of_router[e] = load((const uint4 *)(router + e * SIZE) + threadIdx.x);
#endif
  wait_for_previous();

  float value[8], scales[8];
#if SUMMANDS == 0
  const uint4 packed = load((const uint4 *)(embedding + token_ids[row] * SIZE) + threadIdx.x);
#else
  const bool is_live = lens[row] > 0;
  unpack_eight(value, load_fresh(mine));
  if (is_live) {
    float added[8] = {};
#pragma unroll
    for (int s = 0; s < SUMMANDS; s++) add_columns(added, parts + (row * SUMMANDS + s) * SIZE);
#pragma unroll
    for (int i = 0; i < 8; i++) value[i] += added[i];
  }
  const uint4 packed = pack_eight(value);
#endif
  *mine = packed;
  unpack_eight(value, packed);  // rounded as the hidden state is kept, before it is normalized

  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) squares += value[i] * value[i];
  const float scale = reciprocal_root(block_sum(squares, shared->squares) / SIZE + EPS);
  unpack_eight(scales, weights);
#pragma unroll
  for (int i = 0; i < 8; i++) value[i] *= scale * scales[i];
  const uint4 normalized = pack_eight(value);
  ((uint4 *)(y + row * SIZE))[threadIdx.x] = normalized;
#if EXPERTS
  unpack_eight(value, normalized);
  route(value, of_router, is_live, {topk_ids, topk_weights, order, starts, finished}, shared);
#endif
}
