"""Per-token policy maths, each piece as value and derivative: csrc/math/policy.h, in its order and under its names.

For blocks and for scalars alike, in the type of the arguments. `s` is config.Scalars, `FORM` config.Form. A field of a
constexpr tuple is compared or computed with where it is needed: Triton 3.4 to 3.6 pass it to no function of ours.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numeric import clamp_, expm1, expm1_minus_x, is_finite, max_, min_, times, weighted

VESPO_LOG_MIN = tl.constexpr(-18.420680743952367)  # log 1e-8: bounds on each log and their sum
VESPO_LOG_MAX = tl.constexpr(20.0)
GMPO_WEIGHT_FLOOR = tl.constexpr(1e-10)  # added to a token weight before its logarithm


class Token(NamedTuple):
    """What the loss reads of a token in addition to its log-prob; see layout.PolicyInputs."""

    adv: Any
    weight: Any
    old: Any
    ref: Any
    rollout: Any
    token_weight: Any
    entropy_weight: Any
    entropy_mask: Any
    selected: Any
    pooled_weight: Any


class Pooled(NamedTuple):
    """What the tokens of a sequence share: the pooled log-ratio, mean advantage and geometric mean of the token
    weights; the factor that takes the derivative back to each token, and 1 where the bound passes it, else 0."""

    log_ratio: Any
    adv: Any
    weight: Any
    share: Any
    passes_grad: Any


class Term(NamedTuple):
    """A policy term: value, derivatives, the weight of its gradient, and which bounds hold it."""

    value: Any
    d_log_ratio: Any
    d_pooled: Any
    d_logp: Any
    weight: Any
    low: Any
    high: Any
    cap: Any


class TokenTerm(NamedTuple):
    """What a token adds to the loss before aggregation, entropy apart: token_weight * policy + kl_coef * kl. `kl` is
    without its coefficient, the derivatives are those of the whole."""

    policy: Any
    kl: Any
    d_log_ratio: Any
    d_pooled: Any
    d_logp: Any
    weight: Any
    low: Any
    high: Any
    cap: Any


@triton.jit
def clip_objective(log_ratio, adv, s):
    """-min(min(r, delta) A, clip(r) A); with dual_clip c, for A < 0: min(-c A, that). By the sign of A each is -A times
    the ratio under some bound, and passes the gradient where that is the ratio itself, at the bound too."""
    ratio = tl.exp(log_ratio)
    capped, clipped = min_(ratio, s.delta), clamp_(ratio, s.ratio_low, s.ratio_high)
    bounded = tl.where(adv < 0, min_(max_(capped, clipped), s.dual_clip), min_(capped, clipped))
    below, above = ratio < bounded, ratio > bounded  # a NaN is neither, and gets through
    weight, zero = tl.where(below | above, 0.0, ratio), tl.zeros_like(adv)
    down = adv < 0
    return Term(-bounded * adv, -weight * adv, zero, zero, weight, below & down, above & (adv > 0), above & down)


@triton.jit
def score_objective(weight, adv, logp, low, high, cap):
    """-weight A logp, the weight without gradient."""
    slope, zero = times(adv, -weight), tl.zeros_like(adv)
    return Term(times(slope, logp), zero, zero, slope, weight, low, high, cap)


@triton.jit
def cispo_objective(logp, log_ratio, adv, s):
    ratio = tl.exp(log_ratio)
    above = ratio > s.cispo_high
    weight = clamp_(ratio, s.cispo_low, s.cispo_high)
    return score_objective(weight, adv, logp, ratio < s.cispo_low, above & (adv > 0), above & ~(adv > 0))


@triton.jit
def sapo_objective(log_ratio, adv, s):
    """-(4 / tau) sigmoid(tau (r - 1)) A."""
    ratio, tau = tl.exp(log_ratio), tl.where(adv > 0, s.sapo_tau_pos, s.sapo_tau_neg)
    x = tau * (ratio - 1)
    small = tl.exp(-tl.abs(x))
    near, far = 1 / (1 + small), small / (1 + small)
    gate, one_minus_gate = tl.where(x < 0, far, near), tl.where(x < 0, near, far)
    weight = tl.where(one_minus_gate == 0, 0.0, 4 * gate * one_minus_gate * ratio)  # an infinite ratio shuts it
    zero, never = tl.zeros_like(adv), adv < adv
    return Term(-4 / tau * gate * adv, -weight * adv, zero, zero, weight, never, never, never)


@triton.jit
def gmpo_objective(log_ratio, adv, pooled, s):
    """A sequence's -exp(mean of its clipped log-ratios) * mean A * geometric mean of its token weights."""
    weight = tl.exp(pooled.log_ratio) * pooled.weight
    value, zero = times(pooled.adv, -weight), tl.zeros_like(adv)
    low, high = (adv < 0) & (log_ratio < -s.eps_low), (adv > 0) & (log_ratio > s.eps_high)
    return Term(value, zero, value, zero, weight, low, high, adv < adv)


@triton.jit
def vespo_objective(logp, adv, log_w, s):
    """log phi = lambda + k log w - lambda w; w is the sequence's ratio."""
    up, never = adv >= 0, adv < adv
    k = tl.where(up, s.vespo_k_pos, s.vespo_k_neg)
    lam = tl.where(up, s.vespo_lambda_pos, s.vespo_lambda_neg)
    phi = tl.exp(lam + k * log_w - lam * tl.exp(log_w))
    return score_objective(tl.where(is_finite(phi) | (log_w != log_w), phi, 0.0), adv, logp, never, never, never)


@triton.jit
def binary_kl(old, logp):
    """KL between the two coins "this token" and "any other", of the old policy and the new; 1 - p as -expm1(logp)."""
    p_old, other_old, other = tl.exp(old), -expm1(old), -expm1(logp)
    return times(p_old, old - logp) + other_old * tl.log((other_old + 1e-8) / (other + 1e-8))


@triton.jit
def dppo_objective(logp, old, log_ratio, adv, s, KL: tl.constexpr):
    """The truncated ratio where the divergence from the old policy stays within its bound or shrinks: a NaN is kept."""
    moved, up = tl.exp(logp) - tl.exp(old), adv > 0
    if KL:
        divergence = binary_kl(old, logp)
        high = up & ~(divergence <= s.eps_high) & (moved > 0)
        low = ~up & ~(divergence <= s.eps_low) & (moved < 0)
    else:
        high, low = up & (moved > s.eps_high), ~up & (moved < -s.eps_low)
    dropped, ratio = low | high, tl.exp(log_ratio)
    weight = tl.where(dropped, 0.0, min_(ratio, s.ratio_cap))
    return score_objective(weight, adv, logp, low, high, ~dropped & (ratio > s.ratio_cap))


@triton.jit
def trust_region_objective(logp, old, log_ratio, adv, s, TWO_SIDED: tl.constexpr):
    """-A r where the probability stays within its bounds of the sampler's, where a NaN is kept, plus a squared
    log-ratio."""
    moved, up = tl.exp(logp) - tl.exp(old), adv > 0
    above = moved > s.tv_high
    if TWO_SIDED:
        dropped = above | (moved < -s.tv_high)
    else:
        dropped = (up & above) | (~up & (moved < -s.tv_low))
    weight = tl.where(dropped, 0.0, tl.exp(log_ratio))
    policy, squares, zero = times(adv, -weight), weighted(s.ratio_sq_coef, log_ratio), tl.zeros_like(adv)
    value, slope = policy + weighted(squares, log_ratio), policy + 2 * squares
    return Term(value, slope, zero, zero, weight, dropped & ~up, dropped & up, adv < adv)


@triton.jit
def dro_objective(logp, log_ratio, adv, s):
    """-(A logp - beta x^2 / 2)."""
    slope, zero, never = s.dro_beta * log_ratio, tl.zeros_like(adv), adv < adv
    return Term(times(-adv, logp) + slope * log_ratio / 2, slope, zero, -adv, zero + 1, never, never, never)


@triton.jit
def clip_cov_objective(log_ratio, adv, selected, s):
    """clip, without the tokens picked for their covariance."""
    clip, picked, zero = clip_objective(log_ratio, adv, s), selected != 0, tl.zeros_like(adv)
    none = times(zero, clip.value)  # a NaN is not hidden
    value, slope = tl.where(picked, none, clip.value), tl.where(picked, none, clip.d_log_ratio)
    weight = tl.where(picked, none, clip.weight)
    return Term(value, slope, zero, zero, weight, clip.low, clip.high, clip.cap | picked)


@triton.jit
def kl_cov_objective(log_ratio, adv, selected, s):
    """-A r, and on the picked tokens cov_kl |x|."""
    x, ratio, zero, never = log_ratio, tl.exp(log_ratio), tl.zeros_like(adv), adv < adv
    picked = selected != 0
    slope = tl.where(picked, s.cov_kl, 0.0) * tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    policy = times(adv, -ratio)
    return Term(policy + weighted(slope, x), policy + slope, zero, zero, ratio, never, never, picked)


@triton.jit
def policy_objective(logp, log_ratio, token, pooled, s, FORM: tl.constexpr):
    adv = token.adv
    if FORM.objective == "clip":
        return clip_objective(log_ratio, adv, s)
    elif FORM.objective == "cispo":
        return cispo_objective(logp, log_ratio, adv, s)
    elif FORM.objective == "sapo":
        return sapo_objective(log_ratio, adv, s)
    elif FORM.objective == "gmpo":
        return gmpo_objective(log_ratio, adv, pooled, s)
    elif FORM.objective == "vespo":
        return vespo_objective(logp, adv, pooled.log_ratio, s)
    elif FORM.objective == "reinforce":
        never = adv < adv
        return score_objective(tl.zeros_like(adv) + 1, adv, logp, never, never, never)
    elif FORM.objective == "dppo_tv":
        return dppo_objective(logp, token.old, log_ratio, adv, s, False)
    elif FORM.objective == "dppo_kl":
        return dppo_objective(logp, token.old, log_ratio, adv, s, True)
    elif FORM.objective == "tv_mask":
        return trust_region_objective(logp, token.old, log_ratio, adv, s, False)
    elif FORM.objective == "ipo":
        return trust_region_objective(logp, token.old, log_ratio, adv, s, True)
    elif FORM.objective == "dro":
        return dro_objective(logp, log_ratio, adv, s)
    elif FORM.objective == "clip_cov":
        return clip_cov_objective(log_ratio, adv, token.selected, s)
    else:
        tl.static_assert(FORM.objective == "kl_cov")
        return kl_cov_objective(log_ratio, adv, token.selected, s)


@triton.jit
def clamp_passes_grad(raw, clamped):
    """Whether a clamp passes the gradient: at its bounds it does, and a NaN is not held back."""
    return ~((raw < clamped) | (raw > clamped))


@triton.jit
def pooled_term(raw_log_ratio, adv, weight, s, FORM: tl.constexpr):
    """What a token adds to its sequence's pooled log-ratio, and whether that passes the gradient. `weight`: the
    token's importance weight, which only vespo pools here."""
    x = clamp_(raw_log_ratio, -s.log_ratio_clamp, s.log_ratio_clamp)
    passes_grad = clamp_passes_grad(raw_log_ratio, x)
    if FORM.objective == "vespo":
        of_weight = clamp_(tl.log(weight), VESPO_LOG_MIN, VESPO_LOG_MAX)
        return clamp_(x, -VESPO_LOG_MAX, VESPO_LOG_MAX) + of_weight, adv < adv
    elif FORM.objective == "gmpo":  # one-sided: a ratio that moves against A stays
        kept = tl.where(adv > 0, min_(x, s.eps_high), max_(x, -s.eps_low))
        return tl.where(adv == 0, times(adv, x), kept), passes_grad & clamp_passes_grad(x, kept) & (adv != 0)
    else:
        return x, passes_grad


@triton.jit
def pooled_limit(log_ratio, s, FORM: tl.constexpr):
    """The bound on a pooled log-ratio; outside no gradient passes."""
    if FORM.objective == "vespo":
        return clamp_(log_ratio, VESPO_LOG_MIN, VESPO_LOG_MAX)
    elif FORM.objective == "gmpo":
        return log_ratio
    else:
        return min_(log_ratio, s.sequence_log_ratio_max)


@triton.jit
def pooled_count(token_weight, FORM: tl.constexpr):
    """How much a token counts in the pooled mean of its sequence: gmpo leaves out what the entropy mask does."""
    if FORM.objective == "gmpo":
        return token_weight
    else:
        return tl.zeros_like(token_weight) + 1


@triton.jit
def kl_estimate(u, FORM: tl.constexpr):
    """KL(policy || reference) from one sample, u = ref - logp: the estimator, its derivative in logp, and the two added
    up without cancellation, which is the derivative of exp(logp - sg logp) times the estimator."""
    if FORM.kl_estimator == "k1":
        return -u, tl.zeros_like(u) + 1, 1 - u
    elif FORM.kl_estimator == "abs":
        value, slope = tl.abs(u), tl.where(u < 0, 1.0, tl.where(u > 0, -1.0, tl.zeros_like(u)))
        return value, slope, value + slope
    elif FORM.kl_estimator == "k2":
        return u * u / 2, -u, u * (u / 2 - 1)
    else:
        tl.static_assert(FORM.kl_estimator == "k3")
        return expm1_minus_x(u), -expm1(u), -u


@triton.jit
def kl_penalty(logp, log_ratio, token, s, FORM: tl.constexpr):
    """(value, d_log_ratio, d_logp) of the estimator under one of its gradient forms; log_ratio is the one at the
    ratio's level, before delta and clip."""
    u = token.ref - logp
    bounded = clamp_(u, -s.kl_input_clamp, s.kl_input_clamp)
    estimate, d_logp, score = kl_estimate(bounded, FORM)
    k, d_log_ratio = estimate, tl.zeros_like(u)
    if FORM.kl_gradient == "importance_weighted":
        ratio = tl.exp(log_ratio)
        k = times(estimate, ratio)
        d_log_ratio, d_logp = k, times(d_logp, ratio)
    elif FORM.kl_gradient == "behaviour_weighted":
        ratio = tl.exp(logp - token.rollout)
        k, d_logp = times(estimate, ratio), times(score, ratio)
    elif FORM.kl_gradient == "score_function":
        d_logp = score
    value = clamp_(k, -s.kl_output_clamp, s.kl_output_clamp)
    passes = clamp_passes_grad(u, bounded) & clamp_passes_grad(k, value)
    d_log_ratio, d_logp = tl.where(passes, d_log_ratio, 0.0), tl.where(passes, d_logp, 0.0)
    if FORM.kl_gradient == "straight_through":
        d_logp = -u
    return value, d_log_ratio, d_logp


@triton.jit
def token_term(logp, log_ratio, token, pooled, s, FORM: tl.constexpr):
    policy = policy_objective(logp, log_ratio, token, pooled, s, FORM)
    value, d_log_ratio, d_pooled, d_logp, weight, low, high, cap = policy
    kl = tl.zeros_like(logp)
    if FORM.objective != "gmpo":  # its token weights say which tokens its means are of
        value, d_log_ratio = weighted(token.token_weight, value), weighted(token.token_weight, d_log_ratio)
        d_pooled, d_logp = weighted(token.token_weight, d_pooled), weighted(token.token_weight, d_logp)
    if FORM.kl_estimator != "none":
        kl, kl_d_log_ratio, kl_d_logp = kl_penalty(logp, log_ratio, token, s, FORM)
        d_log_ratio += weighted(s.kl_coef, kl_d_log_ratio)
        d_logp += weighted(s.kl_coef, kl_d_logp)
    return TokenTerm(value, kl, d_log_ratio, d_pooled, d_logp, weight, low, high, cap)


# ---- csrc/math/advantage.h ----


@triton.jit
def centred(reward, mean, residual, shift, count, constant, single_raw, BASELINE: tl.constexpr):
    """A reward on its group's own baseline; exactly 0 where all are equal. `residual`: what the mean lost by rounding,
    `shift`: of the length-weighted mean from the plain one."""
    if BASELINE == "none":
        d = reward
    else:
        d = reward - mean - residual
        if BASELINE == "leave_one_out":
            d = d * count / max_(count - 1, 1.0)
        elif BASELINE == "length_weighted":
            d = d - shift
        d = tl.where(constant, 0.0, d)
    return tl.where(count == 1, tl.where(single_raw, reward, 0.0), d)


@triton.jit
def scaled(d, mean, std, eps, SCALE: tl.constexpr):
    """A scale of exactly 0 does not divide."""
    if SCALE == "none":
        return d
    elif SCALE == "mean":
        return tl.where(mean > 0, d / mean, 0.0)
    else:
        return tl.where(std > 0, d / (std + eps), d)


@triton.jit
def advantage(reward, d, critic, mean, std, count, critic_weight, eps, SCALE: tl.constexpr, CRITIC: tl.constexpr):
    """A centred reward, blended with the critic's baseline where there is one, and scaled; a group of one is not."""
    if CRITIC:
        judged = critic == critic
        d = tl.where(judged, weighted(1 - critic_weight, d) + critic_weight * (reward - critic), d)
        a = scaled(d, mean, std, eps, SCALE)
        return tl.where(judged, a, tl.where(count == 1, d, a))
    else:
        return tl.where(count == 1, d, scaled(d, mean, std, eps, SCALE))


@triton.jit
def temporal_difference(reward, value, next_value, gamma):
    """GAE's one-step error, r + gamma V_next - V."""
    return reward + gamma * next_value - value


# ---- csrc/math/value.h ----


@triton.jit
def value_term(value, old, target, clip):
    """(max((v - R)^2, (clip(v, old - c, old + c) - R)^2) / 2, its derivative, whether the clipped one is larger). A NaN
    of the old value, which no comparison of the clip would see, is not hidden."""
    value = tl.where(old == old, value, old)
    error, bounded = value - target, clamp_(value, old - clip, old + clip) - target
    clipped = bounded * bounded > error * error
    return tl.where(clipped, bounded * bounded, error * error) / 2, tl.where(clipped, 0.0, error), clipped
