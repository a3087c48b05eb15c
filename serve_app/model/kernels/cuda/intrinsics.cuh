// The instructions of a GPU that the kernels use, a function each. The tests compile the kernels for
// the host with functions of the same names in place of this file.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define KERNEL extern "C" __global__
#define DEVICE __device__ __forceinline__

// The block's shared memory, as many bytes as the launch asked for.
DEVICE u32 *shared_memory() {
  extern __shared__ __align__(1024) u32 memory[];
  return memory;
}

// Kernels of a decode step may start while the one before them runs (programmatic dependent launch,
// compute capability 9.0 and newer; on older cards a kernel starts when the last one has ended).
// The rule for all kernels with `wait_for_previous`:
//   1. Every thread calls it once, on every path. The next kernel may start when all blocks have, so
//      at a kernel's start all kernels but the one before it have ended, and after the call that one
//      too.
//   2. What the kernel before it writes is read after the call. Weights and what older kernels wrote
//      may be read before it.
//   3. Everything is written after the call: the kernel before it may still read what was there.
//   4. What a kernel of a step has written is read by plain loads or `load_fresh`, and its pointer
//      is not __restrict__: the compiler may move loads of constants above the call.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes that are read once: they do not displace activations from the L1 cache.
DEVICE uint4 load_once(const uint4 *p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

DEVICE uint4 load(const uint4 *p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

DEVICE uint2 load(const uint2 *p) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// 16 bytes that an older kernel has written.
DEVICE uint4 load_fresh(const uint4 *p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// Reads a value that another block of the same launch has written, from the L2 cache, which all
// blocks share.
DEVICE u32 load_from_l2(const void *p) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// All blocks see the thread's writes before the call earlier than its writes after it.
DEVICE void fence() { __threadfence(); }

// Adds to `*p`; returns what was there.
DEVICE int atomic_add(int *p, int x) { return atomicAdd(p, x); }

// Returns the `x` of lane `source` of the warp. All lanes call it together.
DEVICE u32 shuffle(u32 x, int source) { return __shfl_sync(0xFFFFFFFFu, x, source); }

// Returns a bit per lane: bit i is the `x` of lane i. All lanes call it together.
DEVICE u32 ballot(bool x) { return __ballot_sync(0xFFFFFFFFu, x); }

DEVICE int count_bits(u32 x) { return __popc(x); }

// Byte i of the result is the byte of (b, a) that nibble i of `selector` names; a has 0 to 3.
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// d [16 rows, 8 tokens] += a [16 rows, 16 columns] * b [16 columns, 8 tokens] by one warp, in bf16
// with float sums. Of lane 4g + t: a has rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8
// and the next; b0 and b1 have token g at columns 2t and 2t + 8 and the next; d has row g at tokens
// 2t and 2t + 1, then row g + 8.
DEVICE void mma(float *d, const u32 *a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},"
               "{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with d = a * b.
DEVICE void mma_from_zero(float *d, const u32 *a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},"
               "{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

// Two bf16 products. sm_80 has no instruction for them but a fused one; adding -0 changes nothing.
DEVICE u32 multiply_pair(u32 a, u32 b) {
  u32 d;
  asm("fma.rn.bf16x2 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
  return d;
}

// Copies 16 bytes to shared memory in the background; see `wait_for_copies`.
DEVICE void copy_async(void *shared, const void *global) {
  u32 to = (u32)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(global));
}

// The thread's copies since the last call are a group.
DEVICE void end_copy_group() { asm volatile("cp.async.commit_group;"); }

// Waits until at most MOST of the thread's last groups are under way.
template <int MOST> DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(MOST) : "memory");
}

// A barrier of `threads` threads of a block: those that name the same `id`, 1 to 15.
DEVICE void part_barrier(int id, int threads) {
  asm volatile("bar.sync %0,%1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE float exponential(float x) { return __expf(x); }
DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_to_bits(float x) { return __float_as_uint(x); }

// The value of the lane whose number differs in the bits of `mask`; all lanes of the warp call this.
DEVICE u32 shuffle_xor(u32 x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }

// Add to a number of shared memory and return what it was; lower a number of shared memory.
DEVICE u32 add_shared(u32 *p, u32 x) { return atomicAdd(p, x); }
DEVICE void min_shared(u32 *p, u32 x) { atomicMin(p, x); }

// Counts one block at `p` and returns how many came before. What a block wrote before this call, the
// blocks that come later read after theirs, with `load_remote`.
DEVICE u32 arrive(u32 *p) {
  __threadfence();
  const u32 before = atomicAdd(p, 1);
  __threadfence();
  return before;
}

// 16 bytes that another block of this launch has written.
DEVICE uint4 load_remote(const uint4 *p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// Products and sums that the compiler does not fuse, so that they round as torch's do.
DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
DEVICE float rounded_sum(float a, float b) { return __fadd_rn(a, b); }

// Within 2^-21 where x is in [0.5, 2], elsewhere within 3 units in the last place.
DEVICE float rough_log2(float x) { return __log2f(x); }

// Within 2 units in the last place; 1 for 0, and 0 below 2^-126.
DEVICE float rough_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

// The same number, of which the compiler knows nothing: it computes anew what depends on it.
DEVICE float unknown(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
DEVICE int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
