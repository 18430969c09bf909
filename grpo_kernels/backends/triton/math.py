"""Per-token policy maths, each piece as value and derivative: csrc/math/policy.h, in its order and under its names.

For blocks and for scalars alike, in the type of the arguments. `s` holds the numbers of config.Scalars in their order,
to be read as `s[EPS_LOW]`. A term of the loss is a tuple of what csrc calls Term, with its flags one by one:
(value, d_log_ratio, d_pooled, d_logp, weight, low, high, cap).
"""

import triton
import triton.language as tl

from ...config import Scalars
from .launch import Constant
from .numeric import clamp_, expm1, expm1_minus_x, is_finite, max_, min_, times, weighted

(
    EPS_LOW, EPS_HIGH, RATIO_LOW, RATIO_HIGH, DELTA, DUAL_CLIP, CISPO_LOW, CISPO_HIGH, SAPO_TAU_POS, SAPO_TAU_NEG,
    VESPO_K_POS, VESPO_LAMBDA_POS, VESPO_K_NEG, VESPO_LAMBDA_NEG, RATIO_CAP, TV_LOW, TV_HIGH, RATIO_SQ_COEF, DRO_BETA,
    COV_KL, LOG_RATIO_CLAMP, SEQUENCE_LOG_RATIO_MAX, KL_COEF, KL_INPUT_CLAMP, KL_OUTPUT_CLAMP, ENTROPY_COEF,
) = (Constant(i) for i in range(len(Scalars._fields)))  # fmt: skip

VESPO_LOG_MIN = tl.constexpr(-18.420680743952367)  # log 1e-8: bounds on each log and their sum
VESPO_LOG_MAX = tl.constexpr(20.0)
GMPO_WEIGHT_FLOOR = tl.constexpr(1e-10)  # added to a token weight before its logarithm


@triton.jit
def clip_objective(log_ratio, adv, s):
    """-min(min(r, delta) A, clip(r) A); with dual_clip c, for A < 0: min(-c A, that). By the sign of A each is -A times
    the ratio under some bound, and passes the gradient where that is the ratio itself, at the bound too."""
    ratio = tl.exp(log_ratio)
    capped, clipped = min_(ratio, s[DELTA]), clamp_(ratio, s[RATIO_LOW], s[RATIO_HIGH])
    bounded = tl.where(adv < 0, min_(max_(capped, clipped), s[DUAL_CLIP]), min_(capped, clipped))
    below, above = ratio < bounded, ratio > bounded  # a NaN is neither, and gets through
    weight, zero = tl.where(below | above, 0.0, ratio), tl.zeros_like(adv)
    down = adv < 0
    return -bounded * adv, -weight * adv, zero, zero, weight, below & down, above & (adv > 0), above & down


@triton.jit
def score_objective(weight, adv, logp, low, high, cap):
    """-weight A logp, the weight without gradient."""
    slope, zero = times(adv, -weight), tl.zeros_like(adv)
    return times(slope, logp), zero, zero, slope, weight, low, high, cap


@triton.jit
def cispo_objective(logp, log_ratio, adv, s):
    ratio = tl.exp(log_ratio)
    above = ratio > s[CISPO_HIGH]
    weight = clamp_(ratio, s[CISPO_LOW], s[CISPO_HIGH])
    return score_objective(weight, adv, logp, ratio < s[CISPO_LOW], above & (adv > 0), above & ~(adv > 0))


@triton.jit
def sapo_objective(log_ratio, adv, s):
    """-(4 / tau) sigmoid(tau (r - 1)) A."""
    ratio, tau = tl.exp(log_ratio), tl.where(adv > 0, s[SAPO_TAU_POS], s[SAPO_TAU_NEG])
    x = tau * (ratio - 1)
    small = tl.exp(-tl.abs(x))
    gate = tl.where(x < 0, small, 1.0) / (1 + small)
    one_minus_gate = tl.where(x < 0, 1.0, small) / (1 + small)
    weight = tl.where(one_minus_gate == 0, 0.0, 4 * gate * one_minus_gate * ratio)  # an infinite ratio shuts it
    zero, never = tl.zeros_like(adv), adv < adv
    return -4 / tau * gate * adv, -weight * adv, zero, zero, weight, never, never, never


@triton.jit
def gmpo_objective(log_ratio, adv, pooled_log_ratio, pooled_adv, pooled_weight, s):
    """A sequence's -exp(mean of its clipped log-ratios) * mean A * geometric mean of its token weights."""
    weight = tl.exp(pooled_log_ratio) * pooled_weight
    value, zero = times(pooled_adv, -weight), tl.zeros_like(adv)
    low, high = (adv < 0) & (log_ratio < -s[EPS_LOW]), (adv > 0) & (log_ratio > s[EPS_HIGH])
    return value, zero, value, zero, weight, low, high, adv < adv


@triton.jit
def vespo_objective(logp, adv, log_w, s):
    """log phi = lambda + k log w - lambda w; w is the sequence's ratio."""
    up, never = adv >= 0, adv < adv
    k = tl.where(up, s[VESPO_K_POS], s[VESPO_K_NEG])
    lam = tl.where(up, s[VESPO_LAMBDA_POS], s[VESPO_LAMBDA_NEG])
    phi = tl.exp(lam + k * log_w - lam * tl.exp(log_w))
    return score_objective(tl.where(is_finite(phi), phi, 0.0), adv, logp, never, never, never)


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
        high = up & ~(divergence <= s[EPS_HIGH]) & (moved > 0)
        low = ~up & ~(divergence <= s[EPS_LOW]) & (moved < 0)
    else:
        high, low = up & (moved > s[EPS_HIGH]), ~up & (moved < -s[EPS_LOW])
    dropped, ratio = low | high, tl.exp(log_ratio)
    weight = tl.where(dropped, 0.0, min_(ratio, s[RATIO_CAP]))
    return score_objective(weight, adv, logp, low, high, ~dropped & (ratio > s[RATIO_CAP]))


@triton.jit
def trust_region_objective(logp, old, log_ratio, adv, s, TWO_SIDED: tl.constexpr):
    """-A r where the probability stays within its bounds of the sampler's, where a NaN is kept, plus a squared
    log-ratio."""
    moved, up = tl.exp(logp) - tl.exp(old), adv > 0
    above = moved > s[TV_HIGH]
    if TWO_SIDED:
        dropped = above | (moved < -s[TV_HIGH])
    else:
        dropped = (up & above) | (~up & (moved < -s[TV_LOW]))
    weight = tl.where(dropped, 0.0, tl.exp(log_ratio))
    policy, squares, zero = times(adv, -weight), weighted(s[RATIO_SQ_COEF], log_ratio), tl.zeros_like(adv)
    value, slope = policy + weighted(squares, log_ratio), policy + 2 * squares
    return value, slope, zero, zero, weight, dropped & ~up, dropped & up, adv < adv


@triton.jit
def dro_objective(logp, log_ratio, adv, s):
    """-(A logp - beta x^2 / 2)."""
    slope, zero, never = s[DRO_BETA] * log_ratio, tl.zeros_like(adv), adv < adv
    return times(-adv, logp) + slope * log_ratio / 2, slope, zero, -adv, zero + 1, never, never, never


@triton.jit
def clip_cov_objective(log_ratio, adv, selected, s):
    """clip, without the tokens picked for their covariance."""
    value, slope, zero, _, weight, low, high, cap = clip_objective(log_ratio, adv, s)
    picked = selected != 0
    value, slope, weight = tl.where(picked, 0.0, value), tl.where(picked, 0.0, slope), tl.where(picked, 0.0, weight)
    return value, slope, zero, zero, weight, low, high, cap | picked


@triton.jit
def kl_cov_objective(log_ratio, adv, selected, s):
    """-A r, and on the picked tokens cov_kl |x|."""
    x, ratio, zero, never = log_ratio, tl.exp(log_ratio), tl.zeros_like(adv), adv < adv
    picked = selected != 0
    slope = tl.where(picked, s[COV_KL], 0.0) * tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    policy = times(adv, -ratio)
    return policy + weighted(slope, x), policy + slope, zero, zero, ratio, never, never, picked


@triton.jit
def policy_objective(
    logp, old, log_ratio, adv, selected, pooled_log_ratio, pooled_adv, pooled_weight, s, OBJECTIVE: tl.constexpr
):
    if OBJECTIVE == "clip":
        return clip_objective(log_ratio, adv, s)
    elif OBJECTIVE == "cispo":
        return cispo_objective(logp, log_ratio, adv, s)
    elif OBJECTIVE == "sapo":
        return sapo_objective(log_ratio, adv, s)
    elif OBJECTIVE == "gmpo":
        return gmpo_objective(log_ratio, adv, pooled_log_ratio, pooled_adv, pooled_weight, s)
    elif OBJECTIVE == "vespo":
        return vespo_objective(logp, adv, pooled_log_ratio, s)
    elif OBJECTIVE == "reinforce":
        never = adv < adv
        return score_objective(tl.zeros_like(adv) + 1, adv, logp, never, never, never)
    elif OBJECTIVE == "dppo_tv":
        return dppo_objective(logp, old, log_ratio, adv, s, False)
    elif OBJECTIVE == "dppo_kl":
        return dppo_objective(logp, old, log_ratio, adv, s, True)
    elif OBJECTIVE == "tv_mask":
        return trust_region_objective(logp, old, log_ratio, adv, s, False)
    elif OBJECTIVE == "ipo":
        return trust_region_objective(logp, old, log_ratio, adv, s, True)
    elif OBJECTIVE == "dro":
        return dro_objective(logp, log_ratio, adv, s)
    elif OBJECTIVE == "clip_cov":
        return clip_cov_objective(log_ratio, adv, selected, s)
    else:
        tl.static_assert(OBJECTIVE == "kl_cov")
        return kl_cov_objective(log_ratio, adv, selected, s)


@triton.jit
def clamp_passes_grad(raw, clamped):
    """Whether a clamp passes the gradient: at its bounds it does, and a NaN is not held back."""
    return ~((raw < clamped) | (raw > clamped))


@triton.jit
def pooled_term(raw_log_ratio, adv, weight, s, OBJECTIVE: tl.constexpr):
    """What a token adds to its sequence's pooled log-ratio, and whether that passes the gradient. `weight`: the
    token's importance weight, which only vespo pools here."""
    x = clamp_(raw_log_ratio, -s[LOG_RATIO_CLAMP], s[LOG_RATIO_CLAMP])
    passes_grad = clamp_passes_grad(raw_log_ratio, x)
    if OBJECTIVE == "vespo":
        of_weight = clamp_(tl.log(weight), VESPO_LOG_MIN, VESPO_LOG_MAX)
        return clamp_(x, -VESPO_LOG_MAX, VESPO_LOG_MAX) + of_weight, adv < adv
    elif OBJECTIVE == "gmpo":  # one-sided: a ratio that moves against A stays
        kept = tl.where(adv > 0, min_(x, s[EPS_HIGH]), max_(x, -s[EPS_LOW]))
        return tl.where(adv == 0, 0.0, kept), passes_grad & clamp_passes_grad(x, kept) & (adv != 0)
    else:
        return x, passes_grad


@triton.jit
def pooled_limit(log_ratio, s, OBJECTIVE: tl.constexpr):
    """The bound on a pooled log-ratio; outside no gradient passes."""
    if OBJECTIVE == "vespo":
        return clamp_(log_ratio, VESPO_LOG_MIN, VESPO_LOG_MAX)
    elif OBJECTIVE == "gmpo":
        return log_ratio
    else:
        return min_(log_ratio, s[SEQUENCE_LOG_RATIO_MAX])


@triton.jit
def pooled_count(token_weight, OBJECTIVE: tl.constexpr):
    """How much a token counts in the pooled mean of its sequence: gmpo leaves out what the entropy mask does."""
    if OBJECTIVE == "gmpo":
        return token_weight
    else:
        return tl.zeros_like(token_weight) + 1


@triton.jit
def kl_estimate(u, KL: tl.constexpr):
    """KL(policy || reference) from one sample, u = ref - logp: the estimator, its derivative in logp, and the two added
    up without cancellation, which is the derivative of exp(logp - sg logp) times the estimator."""
    if KL == "k1":
        return -u, tl.zeros_like(u) + 1, 1 - u
    elif KL == "abs":
        value, slope = tl.abs(u), tl.where(u < 0, 1.0, tl.where(u > 0, -1.0, tl.zeros_like(u)))
        return value, slope, value + slope
    elif KL == "k2":
        return u * u / 2, -u, u * (u / 2 - 1)
    else:
        tl.static_assert(KL == "k3")
        return expm1_minus_x(u), -expm1(u), -u


@triton.jit
def kl_penalty(logp, ref, rollout, log_ratio, s, KL: tl.constexpr, KL_GRADIENT: tl.constexpr):
    """(value, d_log_ratio, d_logp) of the estimator under one of its gradient forms; log_ratio is the one at the
    ratio's level, before delta and clip."""
    u = ref - logp
    bounded = clamp_(u, -s[KL_INPUT_CLAMP], s[KL_INPUT_CLAMP])
    estimate, d_logp, score = kl_estimate(bounded, KL)
    k, d_log_ratio = estimate, tl.zeros_like(u)
    if KL_GRADIENT == "importance_weighted":
        ratio = tl.exp(log_ratio)
        k = times(estimate, ratio)
        d_log_ratio, d_logp = k, times(d_logp, ratio)
    elif KL_GRADIENT == "behaviour_weighted":
        ratio = tl.exp(logp - rollout)
        k, d_logp = times(estimate, ratio), times(score, ratio)
    elif KL_GRADIENT == "score_function":
        d_logp = score
    value = clamp_(k, -s[KL_OUTPUT_CLAMP], s[KL_OUTPUT_CLAMP])
    passes = clamp_passes_grad(u, bounded) & clamp_passes_grad(k, value)
    d_log_ratio, d_logp = tl.where(passes, d_log_ratio, 0.0), tl.where(passes, d_logp, 0.0)
    if KL_GRADIENT == "straight_through":
        d_logp = -u
    return value, d_log_ratio, d_logp


@triton.jit
def token_term(
    logp, old, log_ratio, adv, token_weight, selected, ref, rollout, pooled_log_ratio, pooled_adv, pooled_weight, s,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_GRADIENT: tl.constexpr,
):  # fmt: skip
    """What one token adds to the loss before aggregation, entropy apart: token_weight * policy + kl_coef * kl.

    (policy, kl, d_log_ratio, d_pooled, d_logp, gradient_weight, low, high, cap): kl without its coefficient, the
    derivatives of the total, the flags as booleans."""
    policy, d_log_ratio, d_pooled, d_logp, weight, low, high, cap = policy_objective(
        logp, old, log_ratio, adv, selected, pooled_log_ratio, pooled_adv, pooled_weight, s, OBJECTIVE
    )
    kl = tl.zeros_like(logp)
    if OBJECTIVE != "gmpo":  # its token weights say which tokens its means are of
        policy, d_log_ratio = weighted(token_weight, policy), weighted(token_weight, d_log_ratio)
        d_pooled, d_logp = weighted(token_weight, d_pooled), weighted(token_weight, d_logp)
    if KL != "none":
        kl, kl_d_log_ratio, kl_d_logp = kl_penalty(logp, ref, rollout, log_ratio, s, KL, KL_GRADIENT)
        d_log_ratio += weighted(s[KL_COEF], kl_d_log_ratio)
        d_logp += weighted(s[KL_COEF], kl_d_logp)
    return policy, kl, d_log_ratio, d_pooled, d_logp, weight, low, high, cap


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
        d = tl.where(judged, (1 - critic_weight) * d + critic_weight * (reward - critic), d)
        scaled_d = scaled(d, mean, std, eps, SCALE)
        return tl.where(judged, scaled_d, tl.where(count == 1, d, scaled_d))
    else:
        return tl.where(count == 1, d, scaled(d, mean, std, eps, SCALE))


@triton.jit
def temporal_difference(reward, value, next_value, gamma):
    """GAE's one-step error, r + gamma V_next - V."""
    return reward + gamma * next_value - value


# ---- csrc/math/value.h ----


@triton.jit
def value_term(value, old, target, clip):
    """(max((v - R)^2, (clip(v, old - c, old + c) - R)^2) / 2, its derivative, whether the clipped one is larger)."""
    error, bounded = value - target, clamp_(value, old - clip, old + clip) - target
    clipped = bounded * bounded > error * error
    return tl.where(clipped, bounded * bounded, error * error) / 2, tl.where(clipped, 0.0, error), clipped
