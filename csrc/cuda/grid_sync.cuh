// How the blocks of one launch wait for each other. A block may wait for blocks with an earlier ticket: they are
// running or have finished, so there is no deadlock, however many blocks run at a time. The counters are 0 at the start
// of a launch.
#pragma once
#include "block.cuh"
#include "watchdog.cuh"

namespace gk {

// Loads of memory that other blocks may be writing: from the cache that all share, and not reordered by the compiler.
#ifdef GK_EMULATED

inline float load_relaxed(const float* from) { return *from; }
inline int32_t load_acquire(const int32_t* from) { return *from; }

#else

__device__ __forceinline__ float load_relaxed(const float* from) {
  float value;
  asm volatile("ld.relaxed.gpu.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ int32_t load_acquire(const int32_t* from) {
  int32_t value;
  asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

#endif

// The block's place in the order in which blocks have started.
__device__ inline int64_t take_ticket(int32_t* counter) {
  __shared__ int32_t ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(counter, 1);
  __syncthreads();
  return ticket;
}

// Signals that this block has written its results; true, in every thread, in the last of `expected` blocks to do so.
//
// One thread fences for the block: the barrier orders the other threads' writes before its fence, and fences are
// cumulative, so whoever observes its atomic observes those writes too. The same holds in reverse for reads that
// follow.
__device__ inline bool signal_done(int32_t* counter, int64_t expected) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) == expected - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Waits until the counter is at least `expected`, and returns it; the calling thread then sees what the signalling
// blocks wrote. `kernel`: its name.
__device__ __forceinline__ int32_t spin_until(const int32_t* counter, int64_t expected, const char* kernel) {
  int32_t seen = load_acquire(counter);
  if (seen >= expected) return seen;
  const uint64_t begin = nanoseconds();
  while ((seen = load_acquire(counter)) < expected) {
    __nanosleep(100);
    if (nanoseconds() - begin > kStuckAfterNs) stuck(kernel);
  }
  return seen;
}

// The same for the whole block; one thread polls.
__device__ __forceinline__ void block_spin_until(const int32_t* counter, int64_t expected, const char* kernel) {
  if (threadIdx.x == 0) spin_until(counter, expected, kernel);
  __syncthreads();
}

// Loads what another block has written, after synchronising with it.
template <typename T> __device__ T load_from_other_block(const T* from) {
  static_assert(sizeof(T) % sizeof(float) == 0, "");
  T value;
  float words[sizeof(T) / sizeof(float)];
#pragma unroll
  for (int k = 0; k < int(sizeof(T) / sizeof(float)); ++k)
    words[k] = load_relaxed(reinterpret_cast<const float*>(from) + k);
  memcpy(&value, words, sizeof(T));
  return value;
}

// The sum of the blocks' partials [0, count), in a fixed order.
template <typename Sums> __device__ Sums sum_partials(const Sums* partials, int64_t count) {
  Sums sums;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sums = sums.merge(load_from_other_block(partials + i));
  return block_merge(sums);
}

}  // namespace gk
