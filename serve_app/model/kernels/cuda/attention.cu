// Attention of one new token for each row over the paged KV cache. A block has some splits of a row's
// context and one KV head, a warp 16 tokens at a time; the query heads that share the KV head are
// rows of the matrix instruction. The block that is last to finish a row and KV head combines its
// splits, in their order, so that the result does not depend on which one that is. How a context is
// cut depends on that context alone, so that a row gets the same bits in any batch.
//
//   HEADS, KV_HEADS  H query heads, K heads of keys and values; G = H / K is at most 8
//   HEAD_DIM         D, 64 or 128
//   SCALE            of scores: D^-0.5 * log2(e)
//
//   queries      bf16 [T, H, D]
//   keys, values bf16 [slots, K, D]; `block_size` slots are a KV block
//   tables       int [T, table_stride]: KV blocks of each row
//   lens         int [T]: context lengths, with the new token; a padding row, of 0, gets zeros
//   mixed, stats float [T, K, G, 32, D] and [T, K, G, 32, 2]: results of splits
//   finished     int [T, K]: splits that are done; 0 between launches
//   out          bf16 [T, H * D]
//   window       tokens that the new one sees, itself included; 0: all
//   programs     blocks of a row and KV head: they take its splits by turns
#define GROUP (HEADS / KV_HEADS)
#define WARPS 4
#include "splits.cuh"

#define KEY_PARTS (HEAD_DIM / 32)    // 16 bytes of a key: lane 4g + t has d = 32 * part + 8t, ...
#define VALUE_PARTS (HEAD_DIM / 64)  // 16 bytes of a value: it has d = 64 * part + 8g, ...
static_assert(KEY_PARTS <= WARPS, "a warp loads a part of the queries");
static_assert(GROUP <= 8, "query heads are the upper half of a matrix instruction's rows");

#define SLOT (KV_HEADS * HEAD_DIM / 8)  // 16 bytes of a slot

// One layer's cache, of one row and KV head.
struct Cache {
  const uint4 *keys, *values;
  const int *table;
  int block_size;

  DEVICE int slot_of(int place) const {
    return table[place / block_size] * block_size + place % block_size;
  }
};

// The keys and values of 16 tokens in a warp. Lane 4g + t has the keys of tokens g and g + 8, and the
// values of tokens 2t, 2t + 1, 2t + 8 and 2t + 9.
struct Tile {
  uint4 keys[2][KEY_PARTS], values[4][VALUE_PARTS];
};

// Loads those of the 16 tokens from `place` that are at `low` to `high` - 1; others stay.
DEVICE void load_tile(Tile &tile, const Cache &cache, int place, int low, int high, int lane) {
  const int g = lane / 4, t = lane % 4;
  const int own = place + lane % 16, slot = own < high ? cache.slot_of(own) : 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int token = g + 8 * i;
    const uint4 *at = cache.keys + (u64)shuffle(slot, token) * SLOT + t;
    if (place + token < low || place + token >= high) continue;
#pragma unroll
    for (int part = 0; part < KEY_PARTS; part++) tile.keys[i][part] = load_fresh(at + 4 * part);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = 2 * t + i % 2 + i / 2 * 8;
    const uint4 *at = cache.values + (u64)shuffle(slot, token) * SLOT + g;
    if (place + token < low || place + token >= high) continue;
#pragma unroll
    for (int part = 0; part < VALUE_PARTS; part++) tile.values[i][part] = load_fresh(at + 8 * part);
  }
}

// The results of a warp for the tokens so far. Lane 4g + t has `largest` and its part of `total` for
// head g, and `mixed` for heads 2t and 2t + 1 at d = 64 * part + 8g + 2j, then at the next d.
struct WarpSums {
  float largest, total, mixed[VALUE_PARTS][4][4];
};

// The scores of head g for tokens 2t, 2t + 1, then 2t + 8 and 2t + 9. `queries` [KEY_PARTS, 32 lanes]
// are in the order of keys, with head g in place of the token.
DEVICE void score_tile(float *scores, const uint4 *queries, const Tile &tile, int lane) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float d[4] = {};
#pragma unroll
    for (int part = 0; part < KEY_PARTS; part++) {
      const uint4 query = queries[part * 32 + lane];
      const u32 left[4] = {query.x, 0, query.y, 0}, right[4] = {query.z, 0, query.w, 0};
      mma(d, left, tile.keys[i][part].x, tile.keys[i][part].y);
      mma(d, right, tile.keys[i][part].z, tile.keys[i][part].w);
    }
    scores[2 * i] = d[0] * SCALE;
    scores[2 * i + 1] = d[1] * SCALE;
  }
}

DEVICE u32 word_of(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// mixed += values [16 tokens, D] transposed times `weights`: those of the lane's tokens, head g.
DEVICE void mix_tile(WarpSums &sums, const float *weights, const Tile &tile) {
  const u32 first = to_bf16_pair(weights[0], weights[1]);
  const u32 second = to_bf16_pair(weights[2], weights[3]);
#pragma unroll
  for (int part = 0; part < VALUE_PARTS; part++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; i++) words[i] = word_of(tile.values[i][part], j);
      const u32 a[4] = {permute_bytes(words[0], words[1], 0x5410),
                        permute_bytes(words[0], words[1], 0x7632),
                        permute_bytes(words[2], words[3], 0x5410),
                        permute_bytes(words[2], words[3], 0x7632)};
      mma(sums.mixed[part][j], a, first, second);
    }
}

// Adds a tile whose tokens end before `stop`; the first is at `place`.
DEVICE void add_tile(WarpSums &sums, const uint4 *queries, const Tile &tile, int place, int stop,
                     int lane) {
  const int t = lane % 4;
  float scores[4], largest = sums.largest;
  score_tile(scores, queries, tile, lane);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (place + 2 * t + i % 2 + i / 2 * 8 >= stop) scores[i] = -INFINITE;
    largest = fmaxf(largest, scores[i]);
  }
  largest = lane_max(largest, 3, lane);
  const float fade = power_of_two(sums.largest - largest);
  sums.largest = largest;
  sums.total *= fade;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    scores[i] = power_of_two(scores[i] - largest);
    sums.total += scores[i];
  }
  const float fades[2] = {shuffled(fade, 8 * t), shuffled(fade, 8 * t + 4)};
#pragma unroll
  for (int part = 0; part < VALUE_PARTS; part++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums.mixed[part][j][i] *= fades[i % 2];
  mix_tile(sums, scores, tile);
}

// The queries of a block, and the sums of its warps.
struct Shared {
  uint4 queries[KEY_PARTS][32];
  float mixed[WARPS][GROUP][HEAD_DIM], largest[WARPS][GROUP], total[WARPS][GROUP];
  int is_last;
};

DEVICE void share(Shared *shared, const WarpSums &sums, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
  const float total = lane_sum(sums.total, 3, lane);
  if (t == 0 && g < GROUP) shared->largest[warp][g] = sums.largest, shared->total[warp][g] = total;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int head = 2 * t + i % 2;
    if (head >= GROUP) continue;
#pragma unroll
    for (int part = 0; part < VALUE_PARTS; part++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        shared->mixed[warp][head][64 * part + 8 * g + 2 * j + i / 2] = sums.mixed[part][j][i];
  }
}

// The sums of a split: those of the warps in their order. Warps without tokens have -infinity.
DEVICE Sums of_block(const Shared *shared, int head, int lane) {
  Sums sums = {-INFINITE, 0.f, {}};
#pragma unroll
  for (int w = 0; w < WARPS; w++) sums.largest = fmaxf(sums.largest, shared->largest[w][head]);
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const float share = power_of_two(shared->largest[w][head] - sums.largest);
    sums.total += share * shared->total[w][head];
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++)
      sums.mixed[i] += share * shared->mixed[w][head][lane + 32 * i];
  }
  return sums;
}

KERNEL void __launch_bounds__(WARPS * 32, 3)
attention(const u16 *queries, const u16 *keys, const u16 *values, const int *tables,
          const int *lens, float *mixed, float *stats, int *finished, u16 *out, int table_stride,
          int block_size, int window, int programs) {
  Shared *shared = (Shared *)shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int kv_head = blockIdx.x % KV_HEADS, program = blockIdx.x / KV_HEADS % programs;
  const u64 row = blockIdx.x / KV_HEADS / programs, row_head = row * KV_HEADS + kv_head;
  const Cache cache = {(const uint4 *)(keys + kv_head * HEAD_DIM),
                       (const uint4 *)(values + kv_head * HEAD_DIM), tables + row * table_stride,
                       block_size};
  const Span span = span_of(lens[row], window);
  u16 *rows_out = out + row_head * GROUP * HEAD_DIM;  // [G, D]
  const Partial partial = {mixed + row_head * GROUP * MAX_SPLITS * HEAD_DIM,
                           stats + row_head * GROUP * MAX_SPLITS * 2};

  // The previous kernel writes the new token alone, the last one. Others are loaded before the wait.
  Tile tile = {};
  const int newest = span.end - 1, first_place = span.first + program * span.size + warp * 16;
  const int first_stop = min(span.first + (program + 1) * span.size, span.end);
  bool is_loaded = first_place < first_stop;
  if (is_loaded) load_tile(tile, cache, first_place, first_place, min(first_stop, newest), lane);
  wait_for_previous();
  if (is_loaded && first_stop > newest)
    load_tile(tile, cache, first_place, newest, first_stop, lane);
  if (span.count == 0 && program == 0)
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += WARPS * 32) rows_out[i] = 0;
  if (program >= span.count) return;

  if (warp < KEY_PARTS) {
    const u16 *source = queries + (row_head * GROUP + g) * HEAD_DIM + 32 * warp + 8 * t;
    shared->queries[warp][lane] = g < GROUP ? load_fresh((const uint4 *)source) : make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  int done = 0;
#pragma unroll 1
  for (int split = program; split < span.count; split += programs, done++) {
    const int begin = span.first + split * span.size, stop = min(begin + span.size, span.end);
    WarpSums sums = {-INFINITE, 0.f, {}};
#pragma unroll 1
    for (int place = begin + warp * 16; place < stop; place += TILE) {
      if (!is_loaded) {
        tile = {};  // tokens beyond the end weigh 0, and 0 times what a register held may be NaN
        load_tile(tile, cache, place, place, stop, lane);
      }
      is_loaded = false;
      add_tile(sums, shared->queries[0], tile, place, stop, lane);
    }
    if (done) __syncthreads();  // the last split's sums have been read
    share(shared, sums, warp, lane);
    __syncthreads();
    for (int head = warp; head < GROUP; head += WARPS) {
      const Sums whole = of_block(shared, head, lane);
      if (span.count == 1) store_row(rows_out + head * HEAD_DIM, whole, lane);
      else partial.store(head, split, whole, lane);
    }
  }
  if (span.count == 1) return;

  fence();
  __syncthreads();
  if (threadIdx.x == 0)
    shared->is_last = atomic_add(finished + row_head, done) + done == span.count;
  __syncthreads();
  if (!shared->is_last) return;
  fence();
  if (threadIdx.x == 0) finished[row_head] = 0;
  for (int head = warp; head < GROUP; head += WARPS)
    store_row(rows_out + head * HEAD_DIM, partial.combined(head, span.count, lane), lane);
}
