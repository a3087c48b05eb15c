// bfloat16 in words, and sums over the lanes of a warp.
#pragma once
#include "intrinsics.cuh"

#define INFINITE bits_to_float(0x7F800000u)
#define NOT_A_NUMBER bits_to_float(0x7FC00000u)

DEVICE u16 to_bf16(float x) {
  const u32 bits = float_to_bits(x);
  return (u16)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

DEVICE float from_bf16(u16 x) { return bits_to_float((u32)x << 16); }

// Two numbers as bf16, the first in the low half.
DEVICE u32 to_bf16_pair(float first, float second) {
  return to_bf16(first) | (u32)to_bf16(second) << 16;
}

// Eight numbers of bf16 as floats, and back.
DEVICE void unpack_eight(float *x, uint4 packed) {
  const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 8; i++)
    x[i] = bits_to_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
}

DEVICE uint4 pack_eight(const float *x) {
  return make_uint4(to_bf16_pair(x[0], x[1]), to_bf16_pair(x[2], x[3]), to_bf16_pair(x[4], x[5]),
                    to_bf16_pair(x[6], x[7]));
}

DEVICE float shuffled(float x, int source) { return bits_to_float(shuffle(float_to_bits(x), source)); }

// The sum and the maximum over the lanes whose numbers differ in `bits` alone; every lane gets it.
DEVICE float lane_sum(float x, int bits, int lane) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2)
    if (bits & bit) x += shuffled(x, lane ^ bit);
  return x;
}

DEVICE float lane_max(float x, int bits, int lane) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2)
    if (bits & bit) x = fmaxf(x, shuffled(x, lane ^ bit));
  return x;
}
