// Statistics of a group's rewards, for the advantage kernel or fused into the loss; the twin of
// backends/triton/group.py.
//
// Sums are in fixed point: integer addition is exact, so the order of the samples changes no bit and nothing is sorted.
// Each value is first divided by the range of the group's rewards, and has as many bits as 64 leave for the count.
#pragma once
#include "../kernels.h"
#include "block.cuh"

namespace gk {

// The threads that work on a group together; every one of them gets what `merge` returns.
struct WarpTeam {
  __device__ int rank() const { return threadIdx.x % kWarp; }
  __device__ int size() const { return kWarp; }
  template <typename Monoid> __device__ Monoid merge(const Monoid& value) const { return warp_merge(value); }
};
struct BlockTeam {
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  template <typename Monoid> __device__ Monoid merge(const Monoid& value) const { return block_merge(value); }
};

// Reads rewards of groups whose samples are contiguous, directly or in `order`.
struct RewardSource {
  const float* rewards;
  int64_t stride, components;
  const double* weights;  // null: 1
  const uint8_t* valid;   // null: all
  const int64_t* order;   // null: contiguous

  __device__ int64_t sample(int64_t i) const { return order ? order[i] : i; }
  // The weighted sum of the components that are not NaN; NaN if there are none, or the sample is not valid.
  __device__ float reward(int64_t i) const {
    const int64_t k = sample(i);
    if (valid && !valid[k]) return NAN;
    float sum = 0;
    bool any = false;
#pragma unroll 1
    for (int64_t c = 0; c < components; ++c) {
      const float r = rewards[k * stride + c];
      if (r != r) continue;
      sum += weights ? weighted_(float(weights[c]), r) : r, any = true;
    }
    return any ? sum : NAN;
  }
};

struct RewardRange {
  float low = INFINITY, high = -INFINITY;
  int count = 0;
  __device__ RewardRange merge(const RewardRange& o) const {
    return {fminf(low, o.low), fmaxf(high, o.high), count + o.count};
  }
  __device__ RewardRange with(float r) const { return r == r ? merge({r, r, 1}) : *this; }  // ignores a NaN
  __device__ bool finite() const { return is_finite_(high - low); }
  __device__ float origin() const { return finite() ? low : 0; }  // infinite rewards are measured from 0
  __device__ float span() const { return finite() && high > low ? high - low : 1; }
};

// A power of two that fits 63 bits `count` times; its exact value does not matter.
__device__ inline float fixed_scale(int count) {
  int bits = 0;
  while (bits < 30 && (1 << bits) < count) ++bits;
  return float(int64_t(1) << (60 - bits));
}
// A number in [-1, 1] in fixed point; 0 if an infinite reward has made it NaN.
__device__ inline int64_t fixed(float share, float scale) {
  return fabsf(share) <= 1 ? static_cast<int64_t>(share * scale) : 0;
}

struct FixedSum {
  int64_t value = 0;
  __device__ FixedSum merge(const FixedSum& o) const { return {value + o.value}; }
};

struct RewardStatistics {
  float low, above, std;  // above: the mean's distance from the lowest, so that nothing cancels
  float span;             // of the rewards, 1 where there is none
  int count;
  bool constant;
  __device__ float mean() const { return low + above; }
  __device__ GroupStatistics<float> of_group(float shift) const { return {float(count), low, shift, constant, above}; }
};

// Statistics of the rewards [begin, end), centred before squaring; they depend, to the last bit, on nothing but the
// values.
template <typename Team>
__device__ RewardStatistics statistics(Team team, const RewardSource& source, int64_t begin, int64_t end, int ddof) {
  RewardRange range;
  for (int64_t i = begin + team.rank(); i < end; i += team.size()) range = range.with(source.reward(i));
  range = team.merge(range);
  const float origin = range.origin(), span = range.span(), scale = fixed_scale(range.count);
  FixedSum sum, squares;
  for (int64_t i = begin + team.rank(); i < end; i += team.size())
    sum.value += fixed((source.reward(i) - origin) / span, scale);
  const float n = max_(float(range.count), 1.0f), total = float(team.merge(sum).value);
  const float above = range.finite() ? total / scale / n * span : range.low + range.high;
  for (int64_t i = begin + team.rank(); i < end; i += team.size()) {
    const float d = ((source.reward(i) - origin) - above) / span;
    squares.value += fixed(d * d, scale);
  }
  const float variance = float(team.merge(squares).value) / scale / max_(n - float(ddof), 1.0f);
  const bool constant = range.count == 0 || range.low == range.high;
  const float std = range.finite() ? sqrtf(variance) * span : NAN;
  return {range.count == 0 ? 0
          : constant       ? range.low
                           : origin,
          constant ? 0 : above,
          constant || range.count <= ddof ? 0 : std,
          span,
          range.count,
          constant};
}

// The advantage of one sample, from its group's rewards, centred or normalised; 0 for a NaN reward.
template <typename Team>
__device__ float sample_advantage(Team team, const View& rewards, Advantages form, int64_t sample, int64_t group_size,
                                  float eps) {
  const RewardSource source{static_cast<const float*>(rewards.data), rewards.stride_b, 1, nullptr, nullptr, nullptr};
  const int64_t begin = sample / group_size * group_size;
  const RewardStatistics group = statistics(team, source, begin, begin + group_size, 1);
  const float r = source.reward(sample);
  AdvantageForm plain{};
  plain.scale = form == Advantages::normalised ? Scale::group : Scale::none;
  plain.eps = eps;
  return r == r ? advantage(plain, r, float(NAN), group.std, group.of_group(0)) : 0;
}

}  // namespace gk
