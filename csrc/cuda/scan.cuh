// The threads behind each thread of a block, composed. Steps need not commute: a.after(b) is a, then b behind it.
#pragma once
#include "block.cuh"

namespace gk {

// Of the lane `distance` behind; its own where there is none.
template <typename T> __device__ __forceinline__ T shuffle_down(const T& value, int distance) {
  return shuffled(value, [=](unsigned word) { return __shfl_down_sync(kFullWarp, word, distance); });
}

// Of the threads behind this one; `whole`: of all. A thread's default Step changes nothing.
template <int kThreads, typename Step> __device__ Step exclusive_suffix(const Step& own, Step& whole) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp);
  __shared__ __align__(16) unsigned char storage[kWarps * sizeof(Step)];
  Step* of_warps = reinterpret_cast<Step*>(storage);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Step inclusive = own;
  for (int d = 1; d < kWarp; d *= 2) {
    const Step later = shuffle_down(inclusive, d);
    if (lane + d < kWarp) inclusive = inclusive.after(later);
  }
  if (lane == 0) of_warps[warp] = inclusive;
  const Step later = shuffle_down(inclusive, 1);
  __syncthreads();
  Step behind;
  for (int w = kWarps - 1; w > warp; --w) behind = of_warps[w].after(behind);
  whole = behind;
  for (int w = warp; w >= 0; --w) whole = of_warps[w].after(whole);
  __syncthreads();  // of_warps may be written again
  return lane + 1 < kWarp ? later.after(behind) : behind;
}

}  // namespace gk
