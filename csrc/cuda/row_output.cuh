// What the row kernel keeps in shared memory in addition to the row, and how it writes a vector of the gradient.
#pragma once
#include "async.cuh"
#include "block.cuh"
#include "row_args.h"
#include "row_sweep.cuh"

namespace gk {

// Merges the statistics of a warp's lanes, for every lane. The maximum is reduced first, so that each lane scales its
// own sums once; a + b is b + a, so all lanes compute the same bits.
__device__ __forceinline__ Softmax<float> lanes_merge(Softmax<float> s, float unit) {
  float max = s.max;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, lanes));
  s = s.relative_to(max, unit);
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    s.sum += __shfl_xor_sync(kFullWarp, s.sum, lanes);
    s.dot += __shfl_xor_sync(kFullWarp, s.dot, lanes);
    s.sum2 += __shfl_xor_sync(kFullWarp, s.sum2, lanes);
  }
  return s;
}
// Merges `count` others, one per lane, in their order.
__device__ __forceinline__ Softmax<float> merge_of(const Softmax<float>* others, int count, float unit) {
  return lanes_merge(lane_of_thread() < count ? others[lane_of_thread()] : Softmax<float>{}, unit);
}

struct RowResult {  // the row's statistics, and the derivatives from the epilogue
  float logp, entropy, max, log_sum, d_logp, d_entropy;
  __device__ bool none() const { return d_logp == 0 && d_entropy == 0; }  // a NaN is something
};

// Shared memory after the slots and their barriers.
struct Control {
  Mbarrier exchanged[2];
  Softmax<float> of_block[2][kMaxCluster];  // by the parity of the row: a block may be one row ahead of the others
  Softmax<float> of_warp[kMaxThreads / kWarp];
  RowResult result;
};
static_assert(sizeof(Control) + 2 * kMaxSlots * sizeof(Mbarrier) <= kControlBytes);

template <typename T> struct Output {
  T* row;
  bool wide;  // its vectors are aligned like those of the logits
  int target;
  float of_target;  // the gradient there, without softcap'

  __device__ __forceinline__ void write(int column, const Vector<T>& v) const {
    const uint4 packed = v.packed();
    if (wide) return store_streaming(row + column, packed);
#pragma unroll
    for (int i = 0; i < Vector<T>::kCount; ++i) row[column + i] = from_float(v.values[i], T{});
  }
};

// Replaces logits by their gradient, with fn; the target's entry is set in registers, before the vector is stored.
template <bool kSoftcap, typename T, int kCount, typename Fn>
__device__ __forceinline__ void replace(float (&values)[kCount], int column, const Transform& f, const Output<T>& out,
                                        const Fn& fn) {
  if (out.target < column || out.target >= column + kCount) return fn(values);
  float logit = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) logit = column + i == out.target ? values[i] : logit;
  fn(values);
  const float t = kSoftcap ? tanhf(logit * f.inner) : 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = column + i == out.target ? out.of_target * fmaf(-t, t, 1.0f) : values[i];
}

}  // namespace gk
