// The clipped value loss with its derivative and metrics, in one launch.
#include "../math/value.h"
#include "flat_tiles.cuh"
#include "grid_sync.cuh"
#include "launch.h"
#include "policy_inputs.cuh"

namespace gk {
namespace {

constexpr int kThreads = 256;

struct ValueSums {
  float loss = 0, tokens = 0, clipped = 0, value = 0, target = 0;
  __device__ ValueSums merge(const ValueSums& o) const {
    return {loss + o.loss, tokens + o.tokens, clipped + o.clipped, value + o.value, target + o.target};
  }
};
static_assert(sizeof(ValueSums) == kValueSums * sizeof(float));

struct ValueArgs {
  ValueParams p;
  float clip;
  int64_t tiles;
};

__device__ void store_metrics(const ValueParams& p, const ValueSums& t) {
  const float n = max_(t.tokens, 1.0f);
  float* m = static_cast<float*>(p.metrics);
  *static_cast<float*>(p.loss) = t.loss;
  m[kValueTokens] = t.tokens, m[kValueClipped] = t.clipped / n;
  m[kValueMean] = t.value / n, m[kReturnMean] = t.target / n;
}

__global__ void __launch_bounds__(kThreads) value_kernel(ValueArgs a) {
  const ValueParams& p = a.p;
  ValueSums sums, *partials = static_cast<ValueSums*>(p.workspace.partials);
  float *per_token = static_cast<float*>(p.per_token), *g_values = static_cast<float*>(p.g_values);
  for_each_in_tile(p.batch, p.tokens, [&](int64_t i, Place at) {
    ValueTerm<float> term{0, 0, false};
    float weight = 0;
    if (is_active(p.active, at.row, at.t)) {
      const float value = read(p.values, at.row, at.t, 0), target = read(p.returns, at.row, at.t, 0);
      term = value_term(value, read(p.old_values, at.row, at.t, value), target, a.clip);
      weight = read(p.weights, at.row, at.t, 0);
      sums = sums.merge({weighted_(weight, term.value), 1, float(term.clipped), value, target});
    }
    per_token[i] = term.value, g_values[i] = weighted_(weight, term.d_value);
  });
  sums = block_merge(sums);
  if (threadIdx.x == 0) partials[blockIdx.x] = sums;
  if (!signal_done(p.workspace.counters, a.tiles)) return;
  sums = sum_partials(partials, a.tiles);
  if (threadIdx.x == 0) store_metrics(p, sums);
}

}  // namespace

void value_loss(const ValueParams& p, Stream stream) {
  const ValueArgs args{p, float(p.clip), flat_tile_count(p.batch, p.tokens)};
  launch("value_kernel", value_kernel, {args.tiles, kThreads}, stream, args);
}

}  // namespace gk
