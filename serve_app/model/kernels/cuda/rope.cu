// Rotates queries and keys (arXiv 2104.09864) and writes keys and values into the KV cache. A thread
// has four elements of one head of a row.
//
//   HEADS, KV_HEADS  H query heads, K heads of keys and values
//   HEAD_DIM         D, a multiple of 8
//
//   qkv        float [T, (H + 2 K) * D]
//   positions, slots  int64 [T]; lens int [T]: context lengths, 0 for padding rows
//   cos, sin   bf16 [P, D]; the sign of the rotation's minus is in sin
//   queries    bf16 [T, H, D]
//   keys, values      bf16 [slots, K, D]; padding rows write none
#include "floats.cuh"

#define THREADS 256
#define ROW_THREADS ((HEADS + 2 * KV_HEADS) * HEAD_DIM / 4)
#define ROW_BLOCKS ((ROW_THREADS + THREADS - 1) / THREADS)

struct Four {
  float at[4];
};

// Four floats that the kernel before has written.
DEVICE Four load_four(const float *p) {
  const uint4 v = load_fresh((const uint4 *)p);
  return {{bits_to_float(v.x), bits_to_float(v.y), bits_to_float(v.z), bits_to_float(v.w)}};
}

// Four numbers of bf16 of a table.
DEVICE Four load_table(const u16 *p) {
  const uint2 v = load((const uint2 *)p);
  return {{bits_to_float(v.x << 16), bits_to_float(v.x & 0xFFFF0000u), bits_to_float(v.y << 16),
           bits_to_float(v.y & 0xFFFF0000u)}};
}

DEVICE void store_four(u16 *p, const Four &x) {
  *(uint2 *)p = make_uint2(to_bf16_pair(x.at[0], x.at[1]), to_bf16_pair(x.at[2], x.at[3]));
}

KERNEL void __launch_bounds__(THREADS, 4)
rope(const float *qkv, const long long *positions, const long long *slots, const int *lens,
     const u16 *__restrict__ cos, const u16 *__restrict__ sin, u16 *queries, u16 *keys,
     u16 *values) {
  const u64 row = blockIdx.x / ROW_BLOCKS;
  const int element = (blockIdx.x % ROW_BLOCKS * THREADS + threadIdx.x) * 4;
  const int head = element / HEAD_DIM, d = element % HEAD_DIM;
  const bool is_live = lens[row] > 0;
  const u64 position = positions[row], slot = slots[row];
  const Four cosine = load_table(cos + position * HEAD_DIM + d);
  const Four sine = load_table(sin + position * HEAD_DIM + d);
  wait_for_previous();
  if (head >= HEADS + 2 * KV_HEADS) return;

  const float *source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM;
  Four own = load_four(source + d);
  if (head >= HEADS + KV_HEADS) {
    const int kv_head = head - HEADS - KV_HEADS;
    if (is_live) store_four(values + (slot * KV_HEADS + kv_head) * HEAD_DIM + d, own);
    return;
  }
  const Four partner = load_four(source + (d + HEAD_DIM / 2) % HEAD_DIM);
#pragma unroll
  for (int i = 0; i < 4; i++) own.at[i] = own.at[i] * cosine.at[i] + partner.at[i] * sine.at[i];
  if (head < HEADS) store_four(queries + (row * HEADS + head) * HEAD_DIM + d, own);
  else if (is_live) store_four(keys + (slot * KV_HEADS + head - HEADS) * HEAD_DIM + d, own);
}
