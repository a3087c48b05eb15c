// A token's noise, from the row's seed and the position; engine/noise.py computes the same.
#pragma once
#include "intrinsics.cuh"

#define GOLDEN 0x9E3779B97F4A7C15ull

// SplitMix64's finalizer, as in engine/noise.py.
DEVICE u64 mix(u64 x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  return x ^ x >> 31;
}
// The 52 random bits of a token.
DEVICE u64 bits_of(u64 key, int id) { return mix(key + (u64)id * GOLDEN) >> 12; }

// engine/noise.py's Gumbel noise.
DEVICE double exact_gumbel(u64 bits) {
  const double uniform = ((double)bits + 0.5) * 0x1p-52;
  return -log(-log1p(-uniform));
}

// The same within 2e-5, in float. E = -log(1 - u) keeps its relative precision: a series where u is
// small, and elsewhere the logarithm of 1 - u, which the inverted bits give without cancellation.
DEVICE float rough_gumbel(u64 bits) {
  const bool is_small = bits < 1ull << 49;
  const u64 chosen = is_small ? bits : (1ull << 52) - 1 - bits;
  const float u = ((float)chosen + 0.5f) * 0x1p-52f;
  const float series =
      u * (1 + u * (1 / 2.f + u * (1 / 3.f + u * (1 / 4.f + u * (1 / 5.f + u * (1 / 6.f))))));
  const float exponential = is_small ? series : -0.69314718f * rough_log2(u);
  return -0.69314718f * rough_log2(exponential);
}
