"""The objectives in plain torch, differentiated by autograd; csrc/math/policy.h has them with their derivatives.

Each returns its value per token, [B, T], the weight g for which its gradient is -g A (a number to report), and which
tokens it clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Form, Scalars

VESPO_LOG_MIN, VESPO_LOG_MAX = math.log(1e-8), 20.0  # bounds on each logarithm and on their sum


class TokenValues(NamedTuple):
    """[B, T] each, what an objective may read of a token."""

    logp: Tensor
    old: Tensor
    log_ratio: Tensor  # at the ratio's level
    adv: Tensor
    token_weight: Tensor
    selected: Tensor
    pooled_log_ratio: Tensor  # of the token's sequence, for gmpo and vespo
    pooled_adv: Tensor
    pooled_weight: Tensor


class Flags(NamedTuple):
    low: Tensor
    high: Tensor
    cap: Tensor


Objective = tuple[Tensor, Tensor, Flags]


def _no_flags(like: Tensor) -> Flags:
    none = torch.zeros_like(like, dtype=torch.bool)
    return Flags(none, none, none)


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """In the dtype of `like`: torch.where of two numbers would be float32."""
    return torch.where(condition, torch.full_like(like, yes), torch.full_like(like, no))


# Autograd multiplies by 0 what a clamp or a `where` holds back, and 0 * inf is NaN. What is removed is left out before.


def only_where(passes: Tensor, x: Tensor) -> Tensor:
    """x, differentiated there only."""
    return torch.where(passes, x, x.detach())


def clamp(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """Passes the gradient at its bounds, and that of a NaN, which torch's own clamp holds back."""
    return torch.where(x.isnan(), x, x.clamp(low, high))


def weighted(weight: Tensor | float, x: Tensor) -> Tensor:
    """weight * x, and exactly 0 where the weight is: what is removed may be infinite or NaN."""
    return torch.where(torch.as_tensor(weight == 0, device=x.device), 0.0, weight * x)


def times(a: Tensor, b: Tensor) -> Tensor:
    """a * b, but 0 times infinity is 0; a NaN stays one."""
    return torch.where(((a == 0) & b.isinf()) | (a.isinf() & (b == 0)), 0.0, a * b)


def outside_clip(ratio: Tensor, adv: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    """Which tokens the clip holds back: below its range with A < 0, above it with A > 0."""
    return (ratio < s.ratio_low) & (adv < 0), (ratio > s.ratio_high) & (adv > 0)


def clip_objective(v: TokenValues, s: Scalars) -> Objective:
    """-min(min(r, delta) A, clip(r) A); with dual_clip c, for A < 0: min(-c A, that).

    By the sign of A each is -A times the ratio under some bound, and passes the gradient where that is the ratio
    itself, at the bound too."""
    ratio, adv = v.log_ratio.detach().exp(), v.adv
    capped, clipped = ratio.clamp(max=s.delta), ratio.clamp(s.ratio_low, s.ratio_high)
    bounded = torch.where(
        adv < 0, torch.maximum(capped, clipped).clamp(max=s.dual_clip), torch.minimum(capped, clipped)
    )
    below, above, down = ratio < bounded, ratio > bounded, adv < 0  # a NaN is neither
    passes = ~(below | above)
    value = -torch.where(passes, only_where(passes, v.log_ratio).exp(), bounded) * adv
    return value, torch.where(passes, ratio, 0.0), Flags(below & down, above & (adv > 0), above & down)


def score_objective(weight: Tensor, v: TokenValues, flags: Flags) -> Objective:
    """-weight A logp, the weight without gradient."""
    weight = weight.detach()
    return times(times(v.adv, -weight), v.logp), weight, flags


def cispo_objective(v: TokenValues, s: Scalars) -> Objective:
    ratio = v.log_ratio.exp()
    above, up = ratio > s.cispo_high, v.adv > 0
    flags = Flags(ratio < s.cispo_low, above & up, above & ~up)
    return score_objective(ratio.clamp(s.cispo_low, s.cispo_high), v, flags)


def sapo_objective(v: TokenValues, s: Scalars) -> Objective:
    """-(4 / tau) sigmoid(tau (r - 1)) A (arXiv:2511.20347)."""
    tau = _choose(v.adv > 0, s.sapo_tau_pos, s.sapo_tau_neg, v.adv)
    one_minus_gate = torch.sigmoid(-tau * (v.log_ratio.detach().exp() - 1))
    ratio = only_where(one_minus_gate != 0, v.log_ratio).exp()  # an infinite ratio has no gradient
    gate = torch.sigmoid(tau * (ratio - 1))
    return -4 / tau * gate * v.adv, times(one_minus_gate, 4 * gate * ratio), _no_flags(v.adv)


def gmpo_objective(v: TokenValues, s: Scalars) -> Objective:
    """A sequence's -exp(mean of its clipped log-ratios) * mean A * geometric mean of its token weights."""
    counts = (v.pooled_adv != 0) | v.pooled_log_ratio.isnan()
    weight = only_where(counts, v.pooled_log_ratio).exp() * v.pooled_weight
    low, high = (v.adv < 0) & (v.log_ratio < -s.eps_low), (v.adv > 0) & (v.log_ratio > s.eps_high)
    return times(v.pooled_adv, -weight), weight, Flags(low, high, torch.zeros_like(low))


def vespo_objective(v: TokenValues, s: Scalars) -> Objective:
    """log phi = lambda + k log w - lambda w; w is the sequence's ratio."""
    up, log_w = v.adv >= 0, v.pooled_log_ratio
    k = _choose(up, s.vespo_k_pos, s.vespo_k_neg, v.adv)
    lam = _choose(up, s.vespo_lambda_pos, s.vespo_lambda_neg, v.adv)
    phi = (lam + k * log_w - lam * log_w.exp()).exp()
    return score_objective(torch.where(phi.isfinite() | log_w.isnan(), phi, 0.0), v, _no_flags(v.adv))


def reinforce_objective(v: TokenValues, s: Scalars) -> Objective:
    return score_objective(torch.ones_like(v.adv), v, _no_flags(v.adv))


def binary_kl(old: Tensor, logp: Tensor) -> Tensor:
    """KL between the two coins "this token" and "any other", of the old policy and the new."""
    other_old, other = -torch.expm1(old), -torch.expm1(logp)
    return times(old.exp(), old - logp) + other_old * ((other_old + 1e-8) / (other + 1e-8)).log()


def _dppo(above: Tensor, below: Tensor, v: TokenValues, s: Scalars) -> Objective:
    """The truncated ratio where the divergence from the old policy stays within its bound or shrinks: a NaN is kept."""
    ratio, up = v.log_ratio.exp(), v.adv > 0
    drop = torch.where(up, above, below)
    flags = Flags(drop & ~up, drop & up, ~drop & (ratio > s.ratio_cap))
    return score_objective(torch.where(drop, 0.0, ratio.clamp(max=s.ratio_cap)), v, flags)


def dppo_tv_objective(v: TokenValues, s: Scalars) -> Objective:
    moved = v.logp.exp() - v.old.exp()
    return _dppo(moved > s.eps_high, moved < -s.eps_low, v, s)


def dppo_kl_objective(v: TokenValues, s: Scalars) -> Objective:
    moved, divergence = v.logp.exp() - v.old.exp(), binary_kl(v.old, v.logp)
    return _dppo(~(divergence <= s.eps_high) & (moved > 0), ~(divergence <= s.eps_low) & (moved < 0), v, s)


def ratio_term(keep: Tensor, v: TokenValues) -> tuple[Tensor, Tensor]:
    """-A r of the tokens that are kept, and its weight."""
    passes = keep & ((v.adv != 0) | v.log_ratio.isnan())
    weight = torch.where(keep, only_where(passes, v.log_ratio).exp(), 0.0)
    return times(v.adv, -weight), weight


def _trust_region(drop: Tensor, v: TokenValues, s: Scalars) -> Objective:
    """-A r where the probability stays within its bounds of the sampler's, where a NaN is kept, plus a squared
    log-ratio."""
    (value, weight), up = ratio_term(~drop, v), v.adv > 0
    flags = Flags(drop & ~up, drop & up, torch.zeros_like(up))
    return value if s.ratio_sq_coef == 0 else value + s.ratio_sq_coef * v.log_ratio.square(), weight, flags


def tv_mask_objective(v: TokenValues, s: Scalars) -> Objective:
    moved = v.logp.exp() - v.old.exp()
    return _trust_region(torch.where(v.adv > 0, moved > s.tv_high, moved < -s.tv_low), v, s)


def ipo_objective(v: TokenValues, s: Scalars) -> Objective:
    return _trust_region((v.logp.exp() - v.old.exp()).abs() > s.tv_high, v, s)


def dro_objective(v: TokenValues, s: Scalars) -> Objective:
    value = times(-v.adv, v.logp) + s.dro_beta * v.log_ratio.square() / 2
    return value, torch.ones_like(v.adv), _no_flags(v.adv)


def clip_cov_objective(v: TokenValues, s: Scalars) -> Objective:
    """clip, without the tokens picked for their covariance (arXiv:2505.22617)."""
    dropped = v.selected != 0
    value, weight, flags = clip_objective(
        v._replace(log_ratio=only_where(~dropped | v.log_ratio.isnan(), v.log_ratio)), s
    )
    none = times(torch.zeros_like(value), value)  # a NaN is not hidden
    return (
        torch.where(dropped, none, value),
        torch.where(dropped, none, weight),
        flags._replace(cap=flags.cap | dropped),
    )


def kl_cov_objective(v: TokenValues, s: Scalars) -> Objective:
    """-A r, and on the picked tokens cov_kl |x| (arXiv:2505.22617)."""
    (value, ratio), picked = ratio_term(torch.ones_like(v.adv, dtype=torch.bool), v), v.selected != 0
    value = value + torch.where(picked, s.cov_kl * v.log_ratio.abs(), 0.0)
    return value, ratio, _no_flags(v.adv)._replace(cap=picked)


OBJECTIVES: dict[str, Callable[[TokenValues, Scalars], Objective]] = {
    "clip": clip_objective,
    "cispo": cispo_objective,
    "sapo": sapo_objective,
    "gmpo": gmpo_objective,
    "vespo": vespo_objective,
    "reinforce": reinforce_objective,
    "dppo_tv": dppo_tv_objective,
    "dppo_kl": dppo_kl_objective,
    "tv_mask": tv_mask_objective,
    "ipo": ipo_objective,
    "dro": dro_objective,
    "clip_cov": clip_cov_objective,
    "kl_cov": kl_cov_objective,
}


def policy_objective(form: Form, v: TokenValues, s: Scalars) -> Objective:
    value, weight, flags = OBJECTIVES[form.objective](v, s)
    return value, weight.detach(), flags


# ---- what a token adds to its sequence's pooled log-ratio ----


def pooled_term(form: Form, log_ratio: Tensor, adv: Tensor, importance: Tensor, s: Scalars) -> Tensor:
    """gmpo: clipped one-sidedly, a ratio that moves against A stays; vespo: with the importance weight's logarithm."""
    if form.objective == "vespo":
        log_importance = importance.log().clamp(VESPO_LOG_MIN, VESPO_LOG_MAX)
        return (log_ratio.clamp(-VESPO_LOG_MAX, VESPO_LOG_MAX) + log_importance).detach()
    kept = torch.where(adv > 0, clamp(log_ratio, high=s.eps_high), clamp(log_ratio, low=-s.eps_low))
    return torch.where(adv == 0, times(adv, log_ratio), kept)


def pooled_limit(form: Form, log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(VESPO_LOG_MIN, VESPO_LOG_MAX) if form.objective == "vespo" else log_ratio
