// Per-token policy maths, each piece as value and derivative. The same functions stand, in the same order and with the
// same names, in grpo_kernels/reference.py (torch, differentiated by autograd); docs of the formulas are there.
#pragma once
#include "numeric.h"

namespace gk {

// Choices that change the code of a kernel; the enumerators follow the tuples of names in grpo_kernels/config.py.
enum class Objective : int { clip };
enum class RatioLevel : int { token, sequence, sequence_token, sequence_product };
enum class KlEstimator : int { none, k1, abs, k2, k3 };
enum class KlGradient : int { pathwise, straight_through, importance_weighted, score_function, behaviour_weighted };

struct Form {
  Objective objective;
  RatioLevel ratio_level;
  KlEstimator kl_estimator;
  KlGradient kl_gradient;
};

// Numbers that may change from step to step, in the order of SCALARS in grpo_kernels/config.py. Infinity: no bound.
template <typename T> struct Scalars {
  T ratio_low, ratio_high, delta, dual_clip, log_ratio_clamp, sequence_log_ratio_max;
  T kl_coef, kl_input_clamp, kl_output_clamp, entropy_coef;
};

// A term of the loss, its derivative in the log-ratio (of the token, or of the sequence) and directly in logp.
template <typename T> struct Term {
  T value, d_log_ratio, d_logp;
};

enum ClipFlags : int { kClippedLow = 1, kClippedHigh = 2, kCapped = 4 };

// -min(min(r, delta) A, clip(r) A); with dual_clip c, for A < 0: min(-c A, that).
template <typename T> GK_HD Term<T> clip_objective(T log_ratio, T adv, const Scalars<T>& s, int& flags) {
  const T ratio = exp_(log_ratio), capped = min_(ratio, s.delta), clipped = clamp_(ratio, s.ratio_low, s.ratio_high);
  const bool unclipped = !(capped * adv > clipped * adv);  // the negations let a NaN through
  T value = -(unclipped ? capped : clipped) * adv;
  T slope = unclipped && !(ratio > s.delta) ? -ratio * adv : T(0);
  const bool dual = adv < 0 && -s.dual_clip * adv < value;
  if (dual) value = -s.dual_clip * adv, slope = 0;
  flags = (ratio < s.ratio_low && adv < 0 ? kClippedLow : 0) | (ratio > s.ratio_high && adv > 0 ? kClippedHigh : 0) |
          (dual || (adv < 0 && ratio > s.delta) ? kCapped : 0);
  return {value, slope, T(0)};
}

template <typename T>
GK_HD Term<T> policy_objective(const Form& form, T log_ratio, T adv, const Scalars<T>& s, int& flags) {
  switch (form.objective) {
    case Objective::clip:
      return clip_objective(log_ratio, adv, s, flags);
  }
  return {};
}

// KL(policy || reference) from one sample, u = ref - logp: the estimator, its derivative in logp, and the two added up
// without cancellation, which is the derivative of exp(logp - sg logp) times the estimator.
template <typename T> struct KlEstimate {
  T value, d_logp, score;
};

template <typename T> GK_HD KlEstimate<T> kl_estimate(KlEstimator estimator, T u) {
  switch (estimator) {
    case KlEstimator::k1:
      return {-u, T(1), 1 - u};
    case KlEstimator::abs: {
      const T value = u < 0 ? -u : u, slope = u < 0 ? T(1) : u > 0 ? T(-1) : T(0);
      return {value, slope, value + slope};
    }
    case KlEstimator::k2:
      return {u * u / 2, -u, u * (u / 2 - 1)};
    case KlEstimator::k3:
      return {expm1_(u) - u, -expm1_(u), -u};
    default:
      return {};
  }
}

// The estimator under one of its gradient forms; log_ratio is the one the policy term uses, before delta and clip.
template <typename T>
GK_HD Term<T> kl_penalty(const Form& form, T logp, T ref, T rollout, T log_ratio, const Scalars<T>& s) {
  const T u = ref - logp, inside = clamp_(u, -s.kl_input_clamp, s.kl_input_clamp);
  const KlEstimate<T> estimate = kl_estimate(form.kl_estimator, inside);
  Term<T> k{estimate.value, T(0), estimate.d_logp};
  switch (form.kl_gradient) {
    case KlGradient::importance_weighted: {
      const T ratio = exp_(log_ratio);
      k = {ratio * estimate.value, ratio * estimate.value, ratio * estimate.d_logp};
      break;
    }
    case KlGradient::behaviour_weighted: {
      const T ratio = exp_(logp - rollout);
      k = {ratio * estimate.value, T(0), ratio * estimate.score};
      break;
    }
    case KlGradient::score_function:
      k.d_logp = estimate.score;
      break;
    default:
      break;
  }
  const T value = clamp_(k.value, -s.kl_output_clamp, s.kl_output_clamp);
  if (u < inside || u > inside || value < k.value || value > k.value) k.d_log_ratio = k.d_logp = 0;
  if (form.kl_gradient == KlGradient::straight_through) k.d_logp = -u;
  return {value, k.d_log_ratio, k.d_logp};
}

// What one token adds to the loss before aggregation, entropy apart: token_weight * policy + kl_coef * kl.
template <typename T> struct TokenLoss {
  T policy, kl, d_log_ratio, d_logp;  // kl without its coefficient; the derivatives of the whole
  int flags;
  GK_HD T value(const Scalars<T>& s) const { return policy + s.kl_coef * kl; }
};

template <typename T> struct TokenValues {
  T logp, log_ratio, adv, token_weight, ref, rollout;
};

template <typename T> GK_HD TokenLoss<T> token_loss(const Form& form, const TokenValues<T>& t, const Scalars<T>& s) {
  TokenLoss<T> loss{};
  const Term<T> policy = policy_objective(form, t.log_ratio, t.adv, s, loss.flags);
  loss.policy = t.token_weight * policy.value;
  loss.d_log_ratio = t.token_weight * policy.d_log_ratio;
  loss.d_logp = t.token_weight * policy.d_logp;
  if (form.kl_estimator != KlEstimator::none) {
    const Term<T> kl = kl_penalty(form, t.logp, t.ref, t.rollout, t.log_ratio, s);
    loss.kl = kl.value;
    loss.d_log_ratio += s.kl_coef * kl.d_log_ratio;
    loss.d_logp += s.kl_coef * kl.d_logp;
  }
  return loss;
}

}  // namespace gk
