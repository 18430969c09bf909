// An exclusive suffix scan over the threads of a block. Maps need not commute: a.compose(b) applies b, the later one,
// first.
#pragma once
#include "block.cuh"

namespace gk {

// The value of the lane `distance` higher; its own where there is none.
template <typename T> __device__ __forceinline__ T shuffle_down(const T& value, int distance) {
  return shuffled(value, [=](unsigned word) { return __shfl_down_sync(kFullWarp, word, distance); });
}

// The maps of the threads after this one, composed; `total`: of all threads. A default Map is the identity.
template <int kThreads, typename Map> __device__ Map exclusive_suffix(const Map& own, Map& total) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp);
  __shared__ __align__(16) unsigned char storage[kWarps * sizeof(Map)];
  Map* of_warps = reinterpret_cast<Map*>(storage);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Map inclusive = own;
  for (int d = 1; d < kWarp; d *= 2) {
    const Map later = shuffle_down(inclusive, d);
    if (lane + d < kWarp) inclusive = inclusive.compose(later);
  }
  if (lane == 0) of_warps[warp] = inclusive;
  const Map later = shuffle_down(inclusive, 1);
  __syncthreads();
  Map behind;
  for (int w = kWarps - 1; w > warp; --w) behind = of_warps[w].compose(behind);
  total = behind;
  for (int w = warp; w >= 0; --w) total = of_warps[w].compose(total);
  __syncthreads();  // of_warps may be written again
  return lane + 1 < kWarp ? later.compose(behind) : behind;
}

}  // namespace gk
