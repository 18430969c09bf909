// One token of the token kernel: its inputs, its results, and what it adds to the sums behind the metrics.
#pragma once
#include "policy.h"

namespace gk {

enum Metric : int {  // the order of METRICS in grpo_kernels/config.py
  kPolicyLoss,
  kKlLoss,
  kEntropyLoss,
  kTokens,
  kEntropy,
  kKl,
  kApproxKl,
  kApproxKlK3,
  kRatioMean,
  kRatioMin,
  kRatioMax,
  kClipLow,
  kClipHigh,
  kClipRegion,
  kClipCap,
  kClipLowMin,
  kClipHighMax,
  kGradientWeight,
  kRejected,
  kWeightMean,
  kWeightMin,
  kWeightMax,
  kWeightEss,
  kRolloutKl,
  kRolloutKlK3,
  kRolloutAbsDiff,
  kMetricCount
};

template <typename T> struct TokenInputs {
  T adv, weight, old, ref, rollout, token_weight, entropy_weight, entropy_mask, selected, pooled_weight;
};

// What a sequence's tokens have in common: its pooled values, the factor `share` that takes the derivative in the
// pooled log-ratio back to each token, and whether the bound on the pooled log-ratio passes the gradient.
template <typename T> struct Sequence {
  Pooled<T> pooled{0, 0, 1};
  T share = 0;
  bool passes_grad = true;
};

template <typename T> struct TokenSums {
  T policy = 0, kl = 0, entropy = 0;  // as they enter the loss
  T tokens = 0, raw_entropy = 0, raw_kl = 0, approx_kl = 0, approx_kl_k3 = 0;
  T ratio = 0, low = 0, high = 0, cap = 0;
  T gradient_weight = 0, rejected = 0, weight = 0, weight_squares = 0;
  T rollout_kl = 0, rollout_kl_k3 = 0, rollout_abs_diff = 0;
  T ratio_min = INFINITY, ratio_max = -INFINITY, weight_min = INFINITY, weight_max = -INFINITY;

  GK_HD TokenSums merge(const TokenSums& o) const {
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

// The token kernel's results for one token; `d_pooled`: its derivative in the sequence's pooled log-ratio.
template <typename T> struct TokenResult {
  T value, d_logp, d_entropy, d_pooled;
  TokenSums<T> sums;
};

template <typename T> GK_HD T clamp_log_ratio(T log_ratio, const Scalars<T>& s) {
  return clamp_(log_ratio, -s.log_ratio_clamp, s.log_ratio_clamp);
}

// The token as the objectives see it. `log_ratio`: at the ratio's level.
template <typename T>
GK_HD TokenValues<T> token_values(const TokenInputs<T>& t, T logp, T log_ratio, const Pooled<T>& pooled) {
  return {logp, t.old, log_ratio, t.adv, t.token_weight, t.selected, t.ref, t.rollout, pooled};
}

template <typename T>
GK_HD TokenSums<T> sums_of(const TokenInputs<T>& t, const Scalars<T>& s, T logp, T ratio, T entropy, T bonus,
                           const TokenTerm<T>& term) {
  const T moved = clamp_log_ratio(logp - t.old, s), drift = logp - t.rollout, w = t.token_weight * t.pooled_weight;
  TokenSums<T> one;
  one.policy = weighted_(t.weight, term.policy), one.kl = weighted_(t.weight * s.kl_coef, term.kl);
  one.entropy = weighted_(-bonus * t.entropy_weight, entropy);
  one.tokens = 1, one.raw_entropy = entropy, one.raw_kl = term.kl;
  one.approx_kl = -moved, one.approx_kl_k3 = expm1_minus_x_(moved);
  one.ratio = one.ratio_min = one.ratio_max = ratio;
  one.low = (term.flags & kClippedLow) != 0, one.high = (term.flags & kClippedHigh) != 0;
  one.cap = (term.flags & kCapped) != 0;
  one.gradient_weight = term.gradient_weight, one.rejected = w == 0;
  one.weight = one.weight_min = one.weight_max = w, one.weight_squares = w * w;
  one.rollout_kl = -drift, one.rollout_kl_k3 = expm1_minus_x_(drift), one.rollout_abs_diff = max_(drift, -drift);
  return one;
}

template <typename T>
GK_HD TokenResult<T> token_result(const Form& form, const TokenInputs<T>& t, T logp, T entropy,
                                  const Sequence<T>& sequence, const Scalars<T>& s) {
  const RatioLevel level = form.ratio_level;
  const T raw = logp - t.old, clamped = clamp_log_ratio(raw, s);
  const T log_ratio = level == RatioLevel::token ? clamped : sequence.pooled.log_ratio;
  const TokenTerm<T> term = token_term(form, token_values(t, logp, log_ratio, sequence.pooled), s);
  const bool own = level == RatioLevel::token ? clamp_passes_grad(raw, clamped)
                                              : level == RatioLevel::sequence_token && sequence.passes_grad;
  const bool shared = level == RatioLevel::sequence || level == RatioLevel::sequence_product;
  const T bonus = s.entropy_coef * t.entropy_mask;
  return {term.value(s) - weighted_(bonus, entropy), weighted_(t.weight, term.d_logp + (own ? term.d_log_ratio : T(0))),
          -bonus * t.entropy_weight, weighted_(t.weight, term.d_pooled + (shared ? term.d_log_ratio : T(0))),
          sums_of(t, s, logp, exp_(log_ratio), entropy, bonus, term)};
}

template <typename T> GK_HD T loss_of(const TokenSums<T>& t) { return t.policy + t.kl + t.entropy; }

// low_min, high_max: the extremes of the sequences' clipped shares.
template <typename T> GK_HD void metrics_of(const TokenSums<T>& t, T low_min, T high_max, T* m) {
  const T n = max_(t.tokens, T(1));
  const bool any = t.tokens > 0;
  m[kPolicyLoss] = t.policy, m[kKlLoss] = t.kl, m[kEntropyLoss] = t.entropy, m[kTokens] = t.tokens;
  m[kEntropy] = t.raw_entropy / n, m[kKl] = t.raw_kl / n;
  m[kApproxKl] = t.approx_kl / n, m[kApproxKlK3] = t.approx_kl_k3 / n;
  m[kRatioMean] = any ? t.ratio / n : 1, m[kRatioMin] = any ? t.ratio_min : 1, m[kRatioMax] = any ? t.ratio_max : 1;
  m[kClipLow] = t.low / n, m[kClipHigh] = t.high / n, m[kClipRegion] = (t.low + t.high) / n, m[kClipCap] = t.cap / n;
  m[kClipLowMin] = any ? low_min : 0, m[kClipHighMax] = any ? high_max : 0;
  m[kGradientWeight] = any ? t.gradient_weight / n : 1, m[kRejected] = t.rejected / n;
  m[kWeightMean] = any ? t.weight / n : 1, m[kWeightMin] = any ? t.weight_min : 1;
  m[kWeightMax] = any ? t.weight_max : 1;
  m[kWeightEss] = !any ? 1 : t.weight_squares == 0 ? 0 : t.weight * t.weight / (n * t.weight_squares);
  m[kRolloutKl] = t.rollout_kl / n, m[kRolloutKlK3] = t.rollout_kl_k3 / n, m[kRolloutAbsDiff] = t.rollout_abs_diff / n;
}

}  // namespace gk
