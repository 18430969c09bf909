// The row kernel: softmax statistics of a row, in one launch.
#include "../math/softmax.h"
#include "block.cuh"
#include "policy_inputs.cuh"
#include "vec.cuh"

namespace gk {
namespace {

constexpr int kThreads = 256;

struct RowStatsArgs {
  Rows p;
  RowStats stats;
};

struct Partial {
  Softmax<float> softmax;
  float unit = 1;
  __device__ Partial merge(const Partial& o) const { return {softmax.merge(o.softmax, unit), unit}; }
};

template <typename T> __global__ void __launch_bounds__(kThreads) row_kernel(RowStatsArgs args) {
  const Rows& p = args.p;
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(p.logits.data) + p.logits.offset(row, p.tokens);
  Partial partial;
  partial.unit = float(p.inv_temperature * p.logit_scale * kLog2e);
  for (int64_t i = threadIdx.x; i < p.vocab; i += blockDim.x)
    partial = partial.merge({{to_float(logits[i]), 1, 0, 1}, partial.unit});
  partial = block_merge(partial);
  const int64_t target = static_cast<const int64_t*>(p.targets.data)[p.targets.offset(row, p.tokens)];
  if (threadIdx.x > 0) return;
  const Softmax<float>& s = partial.softmax;
  static_cast<float*>(args.stats.logps)[row] =
      (to_float(logits[target]) - s.max) * partial.unit * float(kLn2) - s.log_sum();
  static_cast<float*>(args.stats.entropy)[row] = s.entropy();
  static_cast<float*>(args.stats.max)[row] = s.max;
  static_cast<float*>(args.stats.log_sum)[row] = s.log_sum();
}

}  // namespace

void row_forward(const Rows& p, const RowStats& stats, Stream stream) {
  const auto kernel = p.dtype == DType::f32    ? row_kernel<float>
                      : p.dtype == DType::bf16 ? row_kernel<bf16>
                                               : row_kernel<f16>;
  launch("row_kernel", kernel, {p.batch * p.tokens, kThreads}, stream, RowStatsArgs{p, stats});
}

}  // namespace gk
