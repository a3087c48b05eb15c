// In place of intrinsics.cuh: the same functions for the host, and a block's threads as fibers.
//
// A thread runs until it waits at a barrier or for the other lanes of a matrix instruction; which one
// runs then, and the order of blocks, is as in their numbers or, with a seed, random. Shared
// memory begins as NaN, and asynchronous copies happen when they are waited for, so that a missing
// barrier or wait gives wrong numbers. What the kernel before writes, the `late` tensors of a launch,
// is NaN until all threads of a block have called `wait_for_previous`, and nothing may be written
// until then.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <utility>
#include <vector>

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = unsigned long long;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

#define KERNEL extern "C"
#define DEVICE inline
#define __launch_bounds__(...)
#define __syncthreads() part_barrier(0, (int)blockDim.x)

struct Index { u32 x; };
using std::min;
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum Failure { NONE, DEADLOCK, OUT_OF_SHARED, MISALIGNED, NO_WAIT, EARLY_WRITE };
constexpr int STACK = 64 << 10, GUARD = 4096;

struct Copy { void *to; const void *from; };
struct Fiber {
  jmp_buf at;
  ucontext_t start;
  std::vector<char> stack;
  bool is_started = false, is_done = false;
  int parity = 0;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
struct Tensor { char *at; u64 bytes, is_late; };
struct Barrier { int arrived = 0, generation = 0; };
struct Lane { u32 a[4], b[2]; };

static std::vector<Fiber> fibers;
static std::vector<Barrier> barriers;  // 16 of the block, then one of each warp, then of the wait
static std::vector<Tensor> tensors;    // of a launch that checks what happens before the wait
static std::vector<std::string> contents, seen;  // of the tensors: as given, and before the wait
static int waits;
static std::vector<Lane> lanes;        // [2, threads]
static std::vector<char> shared;
static int current, idle_yields;
static Failure failure;
static jmp_buf finished;
static ucontext_t main_context;
static std::function<void()> body;
static u32 random_state;  // 0: threads run in the order of their numbers

static u32 random_number() {
  random_state ^= random_state << 13, random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}

// The thread that runs after `self`; -1 where all are done. In a random order one warp runs as far as
// it can while the others stand still, then another one does: what a missing barrier allows.
static int next_fiber(int self) {
  const int count = fibers.size(), in_warp = self / 32 * 32 + (self + 1) % 32;
  const bool is_stuck = idle_yields % 64 == 63 || fibers[in_warp].is_done;
  const int first = !random_state ? self + 1 : is_stuck ? random_number() % count : in_warp;
  for (int i = 0; i < count; i++)
    if (!fibers[(first + i) % count].is_done) return (first + i) % count;
  return -1;
}

static void run_fiber() {
  body();
  fibers[current].is_done = true;
  idle_yields = 0;
  for (;;) {
    const int next = next_fiber(current);
    if (next < 0) longjmp(finished, 1);
    current = next, threadIdx.x = next;
    if (fibers[next].is_started) longjmp(fibers[next].at, 1);
    fibers[next].is_started = true;
    setcontext(&fibers[next].start);
  }
}

// Runs the other threads until it is this one's turn again.
static void yield() {
  const int patience = (random_state ? 64 : 4) * fibers.size();
  if (++idle_yields > patience) failure = DEADLOCK, longjmp(finished, 1);
  const int self = current;
  if (setjmp(fibers[self].at)) return;
  const int next = next_fiber(self);
  if (next == self) return;
  current = next, threadIdx.x = next;
  if (fibers[next].is_started) longjmp(fibers[next].at, 1);
  fibers[next].is_started = true;
  setcontext(&fibers[next].start);
}

static void wait_at(Barrier &barrier, int threads) {
  const int mine = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0, barrier.generation++, idle_yields = 0;
    return;
  }
  while (barrier.generation == mine) yield();
}

static std::string content(const Tensor &tensor) { return std::string(tensor.at, tensor.bytes); }

static void hide_late_tensors() {
  seen.clear();
  for (const Tensor &each : tensors)
    if (each.is_late) memset(each.at, 0xFF, each.bytes);
  for (const Tensor &each : tensors) seen.push_back(content(each));
}

static void show_late_tensors() {
  for (size_t i = 0; i < tensors.size(); i++)
    if (content(tensors[i]) != seen[i]) failure = EARLY_WRITE, longjmp(finished, 1);
  for (size_t i = 0; i < tensors.size(); i++)
    if (tensors[i].is_late) memcpy(tensors[i].at, contents[i].data(), tensors[i].bytes);
}

static void wait_for_previous() {
  const int threads = fibers.size();
  if (++waits == threads) show_late_tensors();
  wait_at(barriers[16 + threads / 32], threads);
}

// What the lanes of the warp give, as the first number of each; all lanes do this together.
static const Lane *exchange(u32 mine) {
  const int threads = fibers.size(), warp = current / 32;
  Fiber &fiber = fibers[current];
  Lane *all = &lanes[fiber.parity * threads + warp * 32];
  fiber.parity ^= 1;
  all[current % 32].a[0] = mine;
  wait_at(barriers[16 + warp], 32);
  return all;
}

static float from_bf16(u32 bits) {
  const u32 whole = bits << 16;
  float x;
  memcpy(&x, &whole, 4);
  return x;
}

static u32 rounded(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static float element(u32 pair, int i) { return from_bf16(i ? pair >> 16 : pair & 0xFFFF); }

// What one lane has of d = c + a * b, from the fragments of all lanes of its warp.
static void multiply(float *d, const u32 *a, u32 b0, u32 b1) {
  Fiber &fiber = fibers[current];
  const int threads = fibers.size(), warp = current / 32, g = current % 32 / 4, t = current % 4;
  Lane *all = &lanes[fiber.parity * threads + warp * 32];
  fiber.parity ^= 1;
  all[current % 32] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  wait_at(barriers[16 + warp], 32);
  for (int i = 0; i < 4; i++) {
    const int half = i / 2, token = 2 * t + i % 2;  // row g or g + 8
    for (int k = 0; k < 16; k++) {
      const Lane &row = all[4 * g + k % 8 / 2], &column = all[4 * token + k % 8 / 2];
      d[i] += element(row.a[k / 8 * 2 + half], k % 2) * element(column.b[k / 8], k % 2);
    }
  }
}

template <class P> static P aligned(P p) {
  if ((uintptr_t)p % sizeof(*p)) failure = MISALIGNED;
  return p;
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), const u64 *values, std::index_sequence<I...>) {
  kernel((A)values[I]...);
}

// How to run a kernel: `is_reversed` begins with the last block, `must_wait` demands the wait, and
// `seed` makes the order of blocks and threads random unless it is 0.
struct Launch { int blocks, threads, shared_bytes, is_reversed, must_wait, seed, num_tensors; };

// Runs a kernel's blocks one after the other. Returns a Failure.
template <class... A>
static int run(void (*kernel)(A...), const Launch &launch, const u64 *values, const Tensor *given) {
  body = [=] { call(kernel, values, std::index_sequence_for<A...>()); };
  failure = NONE;
  const int blocks = launch.blocks, threads = launch.threads, shared_bytes = launch.shared_bytes;
  tensors.assign(given, given + launch.num_tensors);
  contents.clear();
  for (const Tensor &tensor : tensors) contents.push_back(content(tensor));
  gridDim.x = blocks, blockDim.x = threads;
  random_state = launch.seed;
  std::vector<int> order(blocks);
  for (int i = 0; i < blocks; i++) order[i] = launch.is_reversed ? blocks - 1 - i : i;
  if (random_state)
    for (int i = blocks - 1; i > 0; i--) std::swap(order[i], order[random_number() % (i + 1)]);
  for (int block = 0; block < blocks && failure == NONE; block++) {
    blockIdx.x = order[block];
    waits = 0;
    hide_late_tensors();
    shared.assign(shared_bytes + GUARD, (char)0xFF);
    fibers.assign(threads, Fiber());
    barriers.assign(17 + threads / 32, Barrier());
    lanes.assign(2 * threads, Lane());
    for (Fiber &fiber : fibers) {
      fiber.stack.resize(STACK);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.data();
      fiber.start.uc_stack.ss_size = STACK;
      makecontext(&fiber.start, run_fiber, 0);
    }
    current = 0, threadIdx.x = 0, idle_yields = 0;
    fibers[0].is_started = true;
    if (!setjmp(finished)) setcontext(&fibers[0].start);
    if (failure == NONE && launch.must_wait && waits != threads) failure = NO_WAIT;
    for (int i = 0; i < GUARD; i++)
      if (shared[shared_bytes + i] != (char)0xFF) failure = OUT_OF_SHARED;
  }
  return failure;
}

}  // namespace host

static inline void part_barrier(int id, int threads) { host::wait_at(host::barriers[id], threads); }

static inline u32 *shared_memory() {
  return (u32 *)(((uintptr_t)host::shared.data() + 15) / 16 * 16);
}
static inline void wait_for_previous() { host::wait_for_previous(); }

static inline void fence() {}
static inline int atomic_add(int *p, int x) { return (*p += x) - x; }
static inline u32 load_from_l2(const void *p) { return *host::aligned((const u32 *)p); }
static inline u32 shuffle(u32 x, int source) { return host::exchange(x)[source].a[0]; }
static inline u32 ballot(bool x) {
  const host::Lane *all = host::exchange(x);
  u32 bits = 0;
  for (int i = 0; i < 32; i++) bits |= all[i].a[0] << i;
  return bits;
}
static inline int count_bits(u32 x) { return __builtin_popcount(x); }
static inline uint4 load_fresh(const uint4 *p) { return *host::aligned(p); }
static inline uint4 load_once(const uint4 *p) { return *host::aligned(p); }
static inline uint4 load(const uint4 *p) { return *host::aligned(p); }
static inline uint2 load(const uint2 *p) { return *host::aligned(p); }

static inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 both = (u64)b << 32 | a;
  u32 picked = 0;
  for (int i = 0; i < 4; i++) picked |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return picked;
}

static inline void mma(float *d, const u32 *a, u32 b0, u32 b1) { host::multiply(d, a, b0, b1); }
static inline void mma_from_zero(float *d, const u32 *a, u32 b0, u32 b1) {
  d[0] = d[1] = d[2] = d[3] = 0;
  host::multiply(d, a, b0, b1);
}

static inline u32 multiply_pair(u32 a, u32 b) {
  const float low = host::element(a, 0) * host::element(b, 0);
  const float high = host::element(a, 1) * host::element(b, 1);
  return host::rounded(low) | host::rounded(high) << 16;
}

static inline void copy_async(void *to, const void *from) {
  host::fibers[host::current].open.push_back(
      {host::aligned((uint4 *)to), host::aligned((const uint4 *)from)});
}
static inline void end_copy_group() {
  host::Fiber &fiber = host::fibers[host::current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int MOST> static inline void wait_for_copies() {
  auto &groups = host::fibers[host::current].groups;
  for (; (int)groups.size() > MOST; groups.pop_front())
    for (const host::Copy &copy : groups.front()) memcpy(copy.to, copy.from, 16);
}

static inline float exponential(float x) { return expf(x); }
static inline float power_of_two(float x) { return exp2f(x); }
static inline float reciprocal_root(float x) { return 1 / sqrtf(x); }
static inline float bits_to_float(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline u32 float_to_bits(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static inline u32 shuffle_xor(u32 x, int mask) {
  return shuffle(x, host::current % 32 ^ mask);
}
static inline u32 add_shared(u32 *p, u32 x) {
  const u32 before = *p;
  *p += x;
  return before;
}
static inline void min_shared(u32 *p, u32 x) { *p = x < *p ? x : *p; }
static inline u32 arrive(u32 *p) { return (*p)++; }
static inline uint4 load_remote(const uint4 *p) { return *host::aligned(p); }
static inline float rounded_product(float a, float b) { return a * b; }
static inline float rounded_sum(float a, float b) { return a + b; }
// As wrong as the GPU's may be.
static inline float rough_log2(float x) { return log2f(x) * (1 + 0x1p-22f) + 0x1p-22f; }
static inline float rough_exp2(float x) { return x ? exp2f(x) * (1 - 0x1p-23f) : 1; }
static inline float unknown(float x) { return x; }
static inline int unknown(int x) { return x; }
