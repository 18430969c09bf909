// Warp and block reductions in a fixed order. A Monoid consists of 4-byte words, is neutral by default, and has
// merge().
#pragma once
#include <cstring>

#include "launch.h"

namespace gk {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int lane_of_thread() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_of_thread() { return int(threadIdx.x) / kWarp; }

// Another lane's value; shuffle(word) moves four bytes of it.
template <typename T, typename Shuffle> __device__ __forceinline__ T shuffled(const T& value, const Shuffle& shuffle) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  unsigned words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 4); ++i) words[i] = shuffle(words[i]);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}
template <typename T> __device__ __forceinline__ T shuffle_xor(const T& value, int lanes) {
  return shuffled(value, [=](unsigned word) { return __shfl_xor_sync(kFullWarp, word, lanes); });
}

// Every lane gets the warp's result. The lower lane is the left operand of each merge, so all lanes compute the same
// bits.
template <typename Monoid> __device__ __forceinline__ Monoid warp_merge(Monoid value) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const Monoid other = shuffle_xor(value, lanes);
    value = lane_of_thread() & lanes ? other.merge(value) : value.merge(other);
  }
  return value;
}

// The same for `warps` warps, with `sync` as their barrier. `scratch`: shared memory for one value per warp, in use
// until the next barrier.
template <typename Monoid, typename Sync>
__device__ __forceinline__ Monoid warps_merge(Monoid value, Monoid* scratch, int warps, const Sync& sync) {
  value = warp_merge(value);
  if (lane_of_thread() == 0) scratch[warp_of_thread()] = value;
  sync();
  return warp_merge(lane_of_thread() < warps ? scratch[lane_of_thread()] : Monoid{});
}

// The same for a block of whole warps.
template <typename Monoid> __device__ __forceinline__ Monoid block_merge(Monoid value) {
  __shared__ __align__(16) unsigned char scratch[kWarp * sizeof(Monoid)];
  value = warps_merge(value, reinterpret_cast<Monoid*>(scratch), int(blockDim.x) / kWarp, [] { __syncthreads(); });
  __syncthreads();  // scratch may be used by the next call
  return value;
}

}  // namespace gk
