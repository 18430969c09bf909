// The token kernel's sums, and the metrics that the last block makes of all of them.
#pragma once
#include "policy_inputs.cuh"

namespace gk {

struct TokenSums {
  float policy = 0, kl = 0, entropy = 0;  // as they enter the loss
  float tokens = 0, raw_entropy = 0, raw_kl = 0, approx_kl = 0, approx_kl_k3 = 0;
  float ratio = 0, low = 0, high = 0, cap = 0;
  float gradient_weight = 0, rejected = 0, weight = 0, weight_squares = 0;
  float rollout_kl = 0, rollout_kl_k3 = 0, rollout_abs_diff = 0;
  float ratio_min = INFINITY, ratio_max = -INFINITY, weight_min = INFINITY, weight_max = -INFINITY;

  __device__ TokenSums merge(const TokenSums& o) const {
    return {policy + o.policy,
            kl + o.kl,
            entropy + o.entropy,
            tokens + o.tokens,
            raw_entropy + o.raw_entropy,
            raw_kl + o.raw_kl,
            approx_kl + o.approx_kl,
            approx_kl_k3 + o.approx_kl_k3,
            ratio + o.ratio,
            low + o.low,
            high + o.high,
            cap + o.cap,
            gradient_weight + o.gradient_weight,
            rejected + o.rejected,
            weight + o.weight,
            weight_squares + o.weight_squares,
            rollout_kl + o.rollout_kl,
            rollout_kl_k3 + o.rollout_kl_k3,
            rollout_abs_diff + o.rollout_abs_diff,
            min_(ratio_min, o.ratio_min),
            max_(ratio_max, o.ratio_max),
            min_(weight_min, o.weight_min),
            max_(weight_max, o.weight_max)};
  }
};
static_assert(sizeof(TokenSums) == kTokenSums * sizeof(float));

struct TokenCounts {  // of a sequence; integers, as blocks add them up in any order
  int32_t tokens, low, high;
};

// What one token adds.
__device__ inline TokenSums sums_of(const TokenInputs& t, const Scalars<float>& s, float logp, float ratio,
                                    float entropy, float bonus, const TokenLoss<float>& loss) {
  const float moved = logp - t.old, drift = logp - t.rollout, w = t.token_weight * t.pooled_weight;
  TokenSums one;
  one.policy = t.weight * loss.policy, one.kl = t.weight * s.kl_coef * loss.kl;
  one.entropy = -bonus * t.entropy_weight * entropy;
  one.tokens = 1, one.raw_entropy = entropy, one.raw_kl = loss.kl;
  one.approx_kl = -moved, one.approx_kl_k3 = expm1_(moved) - moved;
  one.ratio = one.ratio_min = one.ratio_max = ratio;
  one.low = (loss.flags & kClippedLow) != 0, one.high = (loss.flags & kClippedHigh) != 0;
  one.cap = (loss.flags & kCapped) != 0;
  one.gradient_weight = loss.gradient_weight, one.rejected = w == 0;
  one.weight = one.weight_min = one.weight_max = w, one.weight_squares = w * w;
  one.rollout_kl = -drift, one.rollout_kl_k3 = expm1_(drift) - drift, one.rollout_abs_diff = max_(drift, -drift);
  return one;
}

struct ClipShares {  // the extremes over the sequences
  float low_min = INFINITY, high_max = -INFINITY;
  __device__ ClipShares merge(const ClipShares& o) const {
    return {min_(low_min, o.low_min), max_(high_max, o.high_max)};
  }
  __device__ static ClipShares of(const TokenCounts& c) {
    if (c.tokens == 0) return {};
    return {float(c.low) / float(c.tokens), float(c.high) / float(c.tokens)};
  }
};

__device__ inline void store_metrics(const TokenSums& t, const ClipShares& shares, float* loss, float* m) {
  const float n = max_(t.tokens, 1.0f);
  const bool any = t.tokens > 0;
  *loss = t.policy + t.kl + t.entropy;
  m[kPolicyLoss] = t.policy, m[kKlLoss] = t.kl, m[kEntropyLoss] = t.entropy, m[kTokens] = t.tokens;
  m[kEntropy] = t.raw_entropy / n, m[kKl] = t.raw_kl / n;
  m[kApproxKl] = t.approx_kl / n, m[kApproxKlK3] = t.approx_kl_k3 / n;
  m[kRatioMean] = any ? t.ratio / n : 1, m[kRatioMin] = any ? t.ratio_min : 1, m[kRatioMax] = any ? t.ratio_max : 1;
  m[kClipLow] = t.low / n, m[kClipHigh] = t.high / n, m[kClipRegion] = (t.low + t.high) / n, m[kClipCap] = t.cap / n;
  m[kClipLowMin] = any ? shares.low_min : 0, m[kClipHighMax] = any ? shares.high_max : 0;
  m[kGradientWeight] = any ? t.gradient_weight / n : 1, m[kRejected] = t.rejected / n;
  m[kWeightMean] = any ? t.weight / n : 1, m[kWeightMin] = any ? t.weight_min : 1;
  m[kWeightMax] = any ? t.weight_max : 1;
  m[kWeightEss] = !any ? 1 : t.weight_squares == 0 ? 0 : t.weight * t.weight / (n * t.weight_squares);
  m[kRolloutKl] = t.rollout_kl / n, m[kRolloutKlK3] = t.rollout_kl_k3 / n, m[kRolloutAbsDiff] = t.rollout_abs_diff / n;
}

}  // namespace gk
