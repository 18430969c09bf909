// Per-token policy maths; every function returns value and derivative. grpo_kernels/reference has the same functions,
// under the same names and in the same order (torch, differentiated by autograd), and documents the formulas.
#pragma once
#include "numeric.h"

namespace gk {

constexpr double kVespoLogMin = -18.420680743952367, kVespoLogMax = 20;  // log 1e-8: bounds on each log and their sum
constexpr double kGmpoWeightFloor = 1e-10;                               // added to a token weight before its logarithm

// Choices that change the code of a kernel; the enumerators follow the tuples of names in grpo_kernels/config.py.
enum class Objective : int {
  clip,
  cispo,
  sapo,
  gmpo,
  vespo,
  reinforce,
  dppo_tv,
  dppo_kl,
  tv_mask,
  ipo,
  dro,
  clip_cov,
  kl_cov
};
enum class RatioLevel : int { token, sequence, sequence_token, sequence_product };
enum class KlEstimator : int { none, k1, abs, k2, k3 };
enum class KlGradient : int { pathwise, straight_through, importance_weighted, score_function, behaviour_weighted };
enum class Pooling : int { none, mean, sum };  // how a sequence's log-ratios are pooled

enum class Advantages : int { given, centred, normalised };  // the last two: computed from rewards, per group

struct Form {
  Objective objective;
  RatioLevel ratio_level;
  KlEstimator kl_estimator;
  KlGradient kl_gradient;
  Advantages advantages;

  GK_HD Pooling pooling() const {
    if (objective == Objective::gmpo) return Pooling::mean;
    if (objective == Objective::vespo || ratio_level == RatioLevel::sequence_product) return Pooling::sum;
    return ratio_level == RatioLevel::token ? Pooling::none : Pooling::mean;
  }
};

// Scalars that may change from step to step, in the order of Scalars in grpo_kernels/config.py. Infinity: no bound.
template <typename T> struct Scalars {
  T eps_low, eps_high, ratio_low, ratio_high, delta, dual_clip, cispo_low, cispo_high, sapo_tau_pos, sapo_tau_neg;
  T vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg, ratio_cap, tv_low, tv_high, ratio_sq_coef, dro_beta;
  T cov_kl, log_ratio_clamp, sequence_log_ratio_max, kl_coef, kl_input_clamp, kl_output_clamp, entropy_coef;
};
constexpr int kScalars = 26;

// What the objectives see of a sequence after pooling.
template <typename T> struct Pooled {
  T log_ratio, adv, weight;  // weight: the geometric mean of the token weights
};

template <typename T> struct TokenValues {
  T logp, old, log_ratio;  // log_ratio: at the ratio's level, clamped
  T adv, token_weight;
  T selected;  // nonzero: selected by its covariance
  T ref, rollout;
  Pooled<T> pooled;  // for the objectives that use their sequence
};

enum ClipFlags : int { kClippedLow = 1, kClippedHigh = 2, kCapped = 4 };

// A term of the loss with its derivatives in the log-ratio, in the sequence's pooled log-ratio, and directly in logp.
// For the policy term these add up to -A weight: `weight` is what is left of the gradient.
template <typename T> struct Term {
  T value = 0, d_log_ratio = 0, d_pooled = 0, d_logp = 0, weight = 0;
  int flags = 0;
};

GK_HD int clip_flags(bool low, bool high, bool capped) {
  return (low ? kClippedLow : 0) | (high ? kClippedHigh : 0) | (capped ? kCapped : 0);
}

// -min(min(r, delta) A, clip(r) A); with dual_clip c, for A < 0: min(-c A, that). For either sign of A this is -A times
// a bounded ratio, and it passes the gradient where the bound leaves the ratio unchanged, including at the bound.
template <typename T> GK_HD Term<T> clip_objective(T log_ratio, T adv, const Scalars<T>& s) {
  const T ratio = exp_(log_ratio), capped = min_(ratio, s.delta), clipped = clamp_(ratio, s.ratio_low, s.ratio_high);
  const T bounded = adv < 0 ? min_(max_(capped, clipped), s.dual_clip) : min_(capped, clipped);
  const bool below = ratio < bounded;  // a NaN is neither, and gets through
  const bool above = ratio > bounded;
  const T weight = below || above ? T(0) : ratio;
  return {-bounded * adv, -weight * adv, T(0),
          T(0),           weight,        clip_flags(below && adv < 0, above && adv > 0, above && adv < 0)};
}

// -weight A logp, with a weight that has no gradient.
template <typename T> GK_HD Term<T> score_objective(T weight, T adv, T logp, int flags) {
  const T slope = times_(adv, -weight);
  return {times_(slope, logp), T(0), T(0), slope, weight, flags};
}

template <typename T> GK_HD Term<T> cispo_objective(const TokenValues<T>& t, const Scalars<T>& s) {
  const T ratio = exp_(t.log_ratio);
  const bool above = ratio > s.cispo_high;
  return score_objective(clamp_(ratio, s.cispo_low, s.cispo_high), t.adv, t.logp,
                         clip_flags(ratio < s.cispo_low, above && t.adv > 0, above && !(t.adv > 0)));
}

// -(4 / tau) sigmoid(tau (r - 1)) A.
template <typename T> GK_HD Term<T> sapo_objective(T log_ratio, T adv, const Scalars<T>& s) {
  const T ratio = exp_(log_ratio), tau = adv > 0 ? s.sapo_tau_pos : s.sapo_tau_neg, x = tau * (ratio - 1);
  const T small = exp_(x < 0 ? x : -x), gate = (x < 0 ? small : T(1)) / (1 + small),
          one_minus_gate = (x < 0 ? T(1) : small) / (1 + small);
  const T weight = one_minus_gate == 0 ? T(0) : 4 * gate * one_minus_gate * ratio;  // 0 for an infinite ratio
  return {-4 / tau * gate * adv, -weight * adv, T(0), T(0), weight, 0};
}

// A sequence's -exp(mean of its clipped log-ratios) * mean A * geometric mean of its token weights.
template <typename T> GK_HD Term<T> gmpo_objective(const TokenValues<T>& t, const Scalars<T>& s) {
  const T weight = exp_(t.pooled.log_ratio) * t.pooled.weight, value = times_(t.pooled.adv, -weight);
  return {value,  T(0),
          value,  T(0),
          weight, clip_flags(t.adv < 0 && t.log_ratio < -s.eps_low, t.adv > 0 && t.log_ratio > s.eps_high, false)};
}

// log phi = lambda + k log w - lambda w; w is the sequence's ratio.
template <typename T> GK_HD Term<T> vespo_objective(const TokenValues<T>& t, const Scalars<T>& s) {
  const bool pos = t.adv >= 0;
  const T k = pos ? s.vespo_k_pos : s.vespo_k_neg, lambda = pos ? s.vespo_lambda_pos : s.vespo_lambda_neg;
  const T log_w = t.pooled.log_ratio, phi = exp_(lambda + k * log_w - lambda * exp_(log_w));
  return score_objective(is_finite_(phi) || log_w != log_w ? phi : T(0), t.adv, t.logp, 0);
}

// KL(old || new) of the Bernoulli distributions "this token or any other".
template <typename T> GK_HD T binary_kl(T old, T logp) {
  const T other_old = -expm1_(old), other = -expm1_(logp), tiny = T(1e-8);
  return times_(exp_(old), old - logp) + other_old * log_((other_old + tiny) / (other + tiny));
}

// The truncated ratio, dropped where the divergence from the old policy exceeds its bound and grows. NaN inputs
// propagate; an undefined divergence, as of a log-prob above 0, counts as out of bounds.
template <typename T> GK_HD Term<T> dppo_objective(bool kl, const TokenValues<T>& t, const Scalars<T>& s) {
  const T moved = exp_(t.logp) - exp_(t.old);
  const bool up = t.adv > 0;
  bool drop;
  if (kl) {
    const T divergence = binary_kl(t.old, t.logp);
    drop = up ? !(divergence <= s.eps_high) && moved > 0 : !(divergence <= s.eps_low) && moved < 0;
  } else {
    drop = up ? moved > s.eps_high : moved < -s.eps_low;
  }
  const T ratio = exp_(t.log_ratio);
  return score_objective(drop ? T(0) : min_(ratio, s.ratio_cap), t.adv, t.logp,
                         clip_flags(drop && !up, drop && up, !drop && ratio > s.ratio_cap));
}

// -A r where the probability stays within bounds of the sampler's (a NaN passes), plus a squared log-ratio.
template <typename T>
GK_HD Term<T> trust_region_objective(bool two_sided, const TokenValues<T>& t, const Scalars<T>& s) {
  const T moved = exp_(t.logp) - exp_(t.old);
  const bool up = t.adv > 0, above = moved > s.tv_high;
  const bool drop = two_sided ? above || moved < -s.tv_high : up ? above : moved < -s.tv_low;
  const T weight = drop ? T(0) : exp_(t.log_ratio), policy = times_(t.adv, -weight);
  const T squares = weighted_(s.ratio_sq_coef, t.log_ratio);
  return {policy + weighted_(squares, t.log_ratio),  policy + 2 * squares, T(0), T(0), weight,
          clip_flags(drop && !up, drop && up, false)};
}

// -(A logp - beta x^2 / 2).
template <typename T> GK_HD Term<T> dro_objective(const TokenValues<T>& t, const Scalars<T>& s) {
  const T slope = s.dro_beta * t.log_ratio;
  return {times_(-t.adv, t.logp) + slope * t.log_ratio / 2, slope, T(0), -t.adv, T(1), 0};
}

// clip, except on the tokens selected by their covariance.
template <typename T> GK_HD Term<T> clip_cov_objective(const TokenValues<T>& t, const Scalars<T>& s) {
  Term<T> term = clip_objective(t.log_ratio, t.adv, s);
  if (t.selected == 0) return term;
  const T none = times_(T(0), term.value);  // a NaN is not hidden
  return {none, none, T(0), T(0), none, term.flags | kCapped};
}

// -A r, plus cov_kl |x| on the selected tokens.
template <typename T> GK_HD Term<T> kl_cov_objective(const TokenValues<T>& t, const Scalars<T>& s) {
  const T ratio = exp_(t.log_ratio), x = t.log_ratio, sign = x > 0 ? T(1) : x < 0 ? T(-1) : T(0);
  const T slope = t.selected != 0 ? s.cov_kl * sign : T(0), policy = times_(t.adv, -ratio);
  return {policy + weighted_(slope, x), policy + slope, T(0), T(0), ratio, clip_flags(false, false, t.selected != 0)};
}

template <typename T> GK_HD Term<T> policy_objective(const Form& form, const TokenValues<T>& t, const Scalars<T>& s) {
  switch (form.objective) {
    case Objective::clip:
      return clip_objective(t.log_ratio, t.adv, s);
    case Objective::cispo:
      return cispo_objective(t, s);
    case Objective::sapo:
      return sapo_objective(t.log_ratio, t.adv, s);
    case Objective::gmpo:
      return gmpo_objective(t, s);
    case Objective::vespo:
      return vespo_objective(t, s);
    case Objective::reinforce:
      return score_objective(T(1), t.adv, t.logp, 0);
    case Objective::dppo_tv:
      return dppo_objective(false, t, s);
    case Objective::dppo_kl:
      return dppo_objective(true, t, s);
    case Objective::tv_mask:
      return trust_region_objective(false, t, s);
    case Objective::ipo:
      return trust_region_objective(true, t, s);
    case Objective::dro:
      return dro_objective(t, s);
    case Objective::clip_cov:
      return clip_cov_objective(t, s);
    case Objective::kl_cov:
      return kl_cov_objective(t, s);
  }
  return {};
}

// What a token adds to its sequence's pooled log-ratio, and whether that passes the gradient. `weight`: the token's
// importance weight, which only vespo pools here.
template <typename T> struct PooledTerm {
  T value;
  bool passes_grad;
};

// Whether a clamp passes the gradient: also at its bounds, and for a NaN.
template <typename T> GK_HD bool clamp_passes_grad(T raw, T clamped) { return !(raw < clamped || raw > clamped); }

template <typename T>
GK_HD PooledTerm<T> pooled_term(const Form& form, T raw_log_ratio, T adv, T weight, const Scalars<T>& s) {
  const T x = clamp_(raw_log_ratio, -s.log_ratio_clamp, s.log_ratio_clamp);
  const bool passes_grad = clamp_passes_grad(raw_log_ratio, x);
  if (form.objective == Objective::vespo) {
    const T of_weight = clamp_(log_(weight), T(kVespoLogMin), T(kVespoLogMax));
    return {clamp_(x, -T(kVespoLogMax), T(kVespoLogMax)) + of_weight, false};
  }
  if (form.objective == Objective::gmpo) {  // one-sided: a ratio that moves against A is not clipped
    if (adv == 0) return {times_(T(0), x), false};
    const T kept = adv > 0 ? min_(x, s.eps_high) : max_(x, -s.eps_low);
    return {kept, passes_grad && clamp_passes_grad(x, kept)};
  }
  return {x, passes_grad};
}

// The bound on a pooled log-ratio; outside it no gradient passes.
template <typename T> GK_HD T pooled_limit(const Form& form, T log_ratio, const Scalars<T>& s) {
  if (form.objective == Objective::vespo) return clamp_(log_ratio, T(kVespoLogMin), T(kVespoLogMax));
  return form.objective == Objective::gmpo ? log_ratio : min_(log_ratio, s.sequence_log_ratio_max);
}

// How much a token counts in the pooled mean of its sequence: gmpo leaves out the tokens that the entropy mask does.
template <typename T> GK_HD T pooled_count(const Form& form, T token_weight) {
  return form.objective == Objective::gmpo ? token_weight : T(1);
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
      return {expm1_minus_x_(u), -expm1_(u), -u};
    default:
      return {};
  }
}

// The estimator under one of its gradient forms; log_ratio is the one at the ratio's level, before delta and clip.
template <typename T>
GK_HD Term<T> kl_penalty(const Form& form, T logp, T ref, T rollout, T log_ratio, const Scalars<T>& s) {
  const T u = ref - logp, clamped = clamp_(u, -s.kl_input_clamp, s.kl_input_clamp);
  const KlEstimate<T> estimate = kl_estimate(form.kl_estimator, clamped);
  Term<T> k{estimate.value, T(0), T(0), estimate.d_logp};
  switch (form.kl_gradient) {
    case KlGradient::importance_weighted: {
      const T ratio = exp_(log_ratio);
      const T value = times_(estimate.value, ratio);
      k = {value, value, T(0), times_(estimate.d_logp, ratio)};
      break;
    }
    case KlGradient::behaviour_weighted: {
      const T ratio = exp_(logp - rollout);
      k = {times_(estimate.value, ratio), T(0), T(0), times_(estimate.score, ratio)};
      break;
    }
    case KlGradient::score_function:
      k.d_logp = estimate.score;
      break;
    default:
      break;
  }
  const T value = clamp_(k.value, -s.kl_output_clamp, s.kl_output_clamp);
  if (u < clamped || u > clamped || value < k.value || value > k.value) k.d_log_ratio = k.d_logp = 0;
  if (form.kl_gradient == KlGradient::straight_through) k.d_logp = -u;
  return {value, k.d_log_ratio, T(0), k.d_logp};
}

// What one token adds to the loss before aggregation, without the entropy bonus: token_weight * policy + kl_coef * kl.
template <typename T> struct TokenTerm {
  T policy, kl, d_log_ratio, d_pooled, d_logp;  // kl without its coefficient; the derivatives of both
  T gradient_weight;
  int flags;
  GK_HD T value(const Scalars<T>& s) const { return policy + weighted_(s.kl_coef, kl); }
};

template <typename T> GK_HD TokenTerm<T> token_term(const Form& form, const TokenValues<T>& t, const Scalars<T>& s) {
  const Term<T> policy = policy_objective(form, t, s);
  // gmpo's token weights weigh its means instead.
  const T w = form.objective == Objective::gmpo ? T(1) : t.token_weight;
  TokenTerm<T> term{weighted_(w, policy.value),
                    T(0),
                    weighted_(w, policy.d_log_ratio),
                    weighted_(w, policy.d_pooled),
                    weighted_(w, policy.d_logp),
                    policy.weight,
                    policy.flags};
  if (form.kl_estimator != KlEstimator::none) {
    const Term<T> kl = kl_penalty(form, t.logp, t.ref, t.rollout, t.log_ratio, s);
    term.kl = kl.value;
    term.d_log_ratio += weighted_(s.kl_coef, kl.d_log_ratio);
    term.d_logp += weighted_(s.kl_coef, kl.d_logp);
  }
  return term;
}

}  // namespace gk
