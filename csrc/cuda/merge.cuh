// block.cuh for monoids that know how they are merged: a.merge(b), and a default value that changes nothing.
#pragma once
#include "block.cuh"

namespace gk {

inline Grid grid_of(int64_t blocks, int threads) { return {dim3{unsigned(blocks)}, dim3{unsigned(threads)}}; }

template <typename Monoid> __device__ __forceinline__ Monoid warp_merge(const Monoid& value) {
  return warp_reduce(value, [](const Monoid& a, const Monoid& b) { return a.merge(b); });
}

// Every thread of the block gets what all of them bring, merged. May be called again at once.
template <typename Monoid> __device__ __forceinline__ Monoid block_merge(const Monoid& value) {
  __align__(8) __shared__ unsigned char storage[kWarp * sizeof(Monoid)];
  const auto merge = [](const Monoid& a, const Monoid& b) { return a.merge(b); };
  const Monoid all = block_reduce(value, Monoid{}, merge, reinterpret_cast<Monoid*>(storage));
  __syncthreads();
  return all;
}

// Of the lane `distance` behind; its own where there is none.
template <typename T> __device__ __forceinline__ T shuffle_down(T value, int distance) {
  static_assert(sizeof(T) % 4 == 0);
  unsigned words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (unsigned& word : words) word = __shfl_down_sync(kFullWarp, word, distance);
  memcpy(&value, words, sizeof(T));
  return value;
}

}  // namespace gk
