// How blocks of one launch wait for each other. A block may wait for those that took an earlier ticket: they run or
// have run, so there is no deadlock, whatever the number of blocks that the device runs at a time. The counters are
// zeros at the start of a launch.
#pragma once
#include "block.cuh"

namespace gk {

// The block's place in the order in which blocks have started.
__device__ inline int64_t take_ticket(int32_t* counter) {
  __shared__ int32_t ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(counter, 1);
  __syncthreads();
  return ticket;
}

// Says that this block has written what others wait for; true in every thread of the last of `expected` to say so.
__device__ inline bool arrive(int32_t* counter, int64_t expected) {
  __shared__ bool last;
  __threadfence();  // each thread's own writes, before thread 0 says so
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1) == expected - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// What is there once `expected` have said so. For the calling thread alone: the others of its block call it too.
__device__ inline int32_t wait_for(const int32_t* counter, int64_t expected) {
  int32_t seen;
  while ((seen = *static_cast<const volatile int32_t*>(counter)) < expected) __nanosleep(100);
  __threadfence();
  return seen;
}

// What another block has left: read from the cache that they share.
template <typename T> __device__ T left_by_other(const T* from) {
  static_assert(sizeof(T) % sizeof(float) == 0, "");
  T value;
  float words[sizeof(T) / sizeof(float)];
#pragma unroll
  for (int k = 0; k < int(sizeof(T) / sizeof(float)); ++k) words[k] = __ldcg(reinterpret_cast<const float*>(from) + k);
  memcpy(&value, words, sizeof(T));
  return value;
}

// All that blocks left in [0, count), in their order.
template <typename Sums> __device__ Sums sum_left(const Sums* left, int64_t count) {
  Sums sums;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sums = sums.merge(left_by_other(left + i));
  return block_merge(sums);
}

}  // namespace gk
