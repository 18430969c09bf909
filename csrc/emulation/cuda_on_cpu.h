// CUDA C++ on the CPU, for tests: included before a .cu file, this header makes it C++ that runs on the machine of
// emulator.h.
//
// Supported: grids, blocks and clusters of any shape, static and dynamic shared memory, __syncthreads and named
// barriers, shuffles and votes with any mask, atomics, mbarriers, cp.async and bulk copies (cuda/async.cuh),
// distributed shared memory. Not supported: what timing decides (memory ordering, L2, divergence inside a warp between
// its collectives), waits on global memory (a grid-wide barrier never ends), textures, warp-level matrix instructions,
// double rounding of approximate instructions (the CPU's are exact to the last bit or two). Static shared memory is one
// copy, not one per block: a kernel that runs in clusters keeps all of its shared memory dynamic. It also keeps what an
// earlier block wrote, so reads of memory that was never written are found only in dynamic shared memory, which is
// filled with NaNs.
#pragma once
#include <cmath>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace gk::emulation {

// A CPU tolerates a misaligned access, a GPU faults.
inline void check_aligned(const void* p) {
  check(reinterpret_cast<uintptr_t>(p) % 16 == 0, "an access of 16 bytes that are not aligned");
}

inline void sync_warp(uint32_t mask) {
  Warp& warp = self().warp();
  mask &= warp.lanes;
  check(mask >> self().lane() & 1, "a thread outside its own mask");
  arrive_and_wait(warp.barriers[mask], __builtin_popcount(mask));
}

using LaneBytes = unsigned char[kWidest];

// The value that each lane of the warp passed to the same collective. Two sets of slots suffice: no lane can be two
// collectives ahead of one that still reads.
template <typename T> const LaneBytes* exchange(uint32_t mask, const T& value) {
  static_assert(sizeof(T) <= kWidest);
  auto& slots = self().warp().slots[self().collectives++ % 2];
  std::memcpy(slots[self().lane()], &value, sizeof(T));
  sync_warp(mask);
  return slots;
}
template <typename T> T shuffle(uint32_t mask, T value, int source, int width) {
  const auto* slots = exchange(mask, value);
  const int lane = int(self().lane()), first = lane / width * width;
  if (source < first || source >= first + width || !(self().warp().lanes >> source & 1)) return value;
  check(mask >> source & 1, "a shuffle from a lane outside the mask");
  std::memcpy(&value, slots[source], sizeof(T));
  return value;
}
inline uint32_t ballot(uint32_t mask, bool vote) {
  const auto* slots = exchange(mask, vote);
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask & self().warp().lanes & 1u << lane && slots[lane][0]) votes |= 1u << lane;
  return votes;
}
inline int sync_block_count(bool vote) {
  Block& block = *self().block;
  int& count = block.votes[block.barriers[0].phase % 2];
  if (block.barriers[0].arrived == 0) count = 0;
  count += vote;
  arrive_and_wait(block.barriers[0], block.live);
  return count;
}

}  // namespace gk::emulation

inline void __syncthreads() {
  auto& block = *gk::emulation::self().block;
  gk::emulation::arrive_and_wait(block.barriers[0], block.live);
}
inline int __syncthreads_count(int vote) { return gk::emulation::sync_block_count(vote != 0); }
inline int __syncthreads_or(int vote) { return __syncthreads_count(vote) > 0; }
inline int __syncthreads_and(int vote) { return __syncthreads_count(!vote) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { gk::emulation::sync_warp(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T> T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int lane = int(gk::emulation::self().lane());
  return gk::emulation::shuffle(mask, value, lane / width * width + source % width, width);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
  return gk::emulation::shuffle(mask, value, int(gk::emulation::self().lane()) ^ bits, width);
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return gk::emulation::shuffle(mask, value, int(gk::emulation::self().lane() + delta), width);
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return gk::emulation::shuffle(mask, value, int(gk::emulation::self().lane()) - int(delta), width);
}
inline unsigned __ballot_sync(unsigned mask, int vote) { return gk::emulation::ballot(mask, vote != 0); }
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, !vote) == 0; }

// One thread runs at a time: a plain read and write is atomic.
template <typename T, typename U> T atomicAdd(T* at, U value) {
  const T before = *at;
  *at = T(before + T(value));
  return before;
}
template <typename T, typename U> T atomicMax(T* at, U value) {
  const T before = *at;
  if (before < T(value)) *at = T(value);
  return before;
}
template <typename T, typename U> T atomicMin(T* at, U value) {
  const T before = *at;
  if (T(value) < before) *at = T(value);
  return before;
}
template <typename T, typename U> T atomicOr(T* at, U value) {
  const T before = *at;
  *at = before | T(value);
  return before;
}
template <typename T, typename U> T atomicExch(T* at, U value) {
  const T before = *at;
  *at = T(value);
  return before;
}
template <typename T, typename U, typename V> T atomicCAS(T* at, U expected, V value) {
  const T before = *at;
  if (before == T(expected)) *at = T(value);
  return before;
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
  const unsigned before = *at;
  *at = before >= last ? 0 : before + 1;
  return before;
}

template <typename T> T __ldg(const T* at) { return *at; }
template <typename T> T __ldcg(const T* at) { return *at; }
// Kernels sleep only while they wait for a block with an earlier ticket, and here that one has ended already.
inline void __nanosleep(unsigned) { gk::emulation::check(false, "a wait for a block that has not run"); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

namespace gk::emulation {
template <typename To, typename From> To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace gk::emulation
inline int __float_as_int(float x) { return gk::emulation::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return gk::emulation::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return gk::emulation::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return gk::emulation::bits_as<float>(x); }
