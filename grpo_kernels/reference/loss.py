"""The specification: every quantity in plain torch, in any floating dtype, differentiated by autograd.

The kernels must agree with this file; csrc/math holds the same formulas with their derivatives, under the same names.
Everything is [B, T]. A masked token contributes nothing, whatever its values hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import OBJECTIVES, Form, LossConfig, Scalars
from ..inputs.layout import Layout, PolicyInputs, Rows, acc_dtype
from .objectives import (
    Flags,
    TokenValues,
    clamp,
    only_where,
    policy_objective,
    pooled_limit,
    pooled_term,
    times,
    weighted,
)

# ---- log-probs ----


def transformed(logits: Tensor, rows: Rows) -> Tensor:
    """z = softcap(logit_scale * logit) / temperature, [B, T, V], in float32 or wider, up to a constant of each row; 0
    at masked tokens."""
    z = logits.to(acc_dtype(logits.dtype))[:, : rows.targets.shape[1]]
    z = torch.where(rows.active[..., None], z, 0.0)
    if rows.softcap:
        z = rows.softcap * torch.tanh(z * rows.logit_scale / rows.softcap)
    else:  # a softmax does not see the shift, the rounding of large logits and their overflow do
        z = (z - z.amax(-1, keepdim=True).detach()) * rows.logit_scale
    if rows.temperatures is None:
        return z / rows.temperature
    return z / torch.where(rows.active, rows.temperatures, 1.0)[..., None]


def token_logps(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target), entropy and sum p^2 of each token, [B, T]; 0 at masked tokens, NaN for an illegal target."""
    z = transformed(logits, rows)
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    legal = (rows.targets >= 0) & (rows.targets < z.shape[-1])
    chosen = logp.gather(-1, torch.where(legal & rows.active, rows.targets, 0)[..., None])[..., 0]
    chosen = torch.where(legal, chosen, float("nan"))
    entropy = -(p * torch.where(p == 0, 0.0, logp)).sum(-1)  # p log p is 0 where p is, and has no derivative there
    return tuple(torch.where(rows.active, x, 0.0) for x in (chosen, entropy, p.square().sum(-1)))  # type: ignore[return-value]


# ---- policy maths, in the order of csrc/math/policy.h; the objectives are in objectives.py ----

GMPO_WEIGHT_FLOOR = 1e-10  # added to a token weight before its logarithm


def kl_estimate(estimator: str, u: Tensor) -> Tensor:
    """KL(policy || reference) from one sample, u = ref - logp (Schulman, "Approximating KL divergence")."""
    if estimator == "k1":
        return -u
    if estimator == "abs":
        return u.abs()
    if estimator == "k2":
        return u.square() / 2
    return torch.expm1(u) - u.clamp(max=1000)  # k3; of infinity: e^1000 is no number already


def own_part(x: Tensor) -> Tensor:
    """0, with the gradient of x; an infinite x has none."""
    return torch.where(x.isinf(), 0.0, x - x.detach())


def weighted_kl(form: Form, u: Tensor, logp: Tensor, rollout: Tensor | None, log_ratio: Tensor) -> Tensor:
    """The estimator of u, times the weight of its gradient form."""
    k = kl_estimate(form.kl_estimator, u)
    log_weight = torch.zeros_like(k)
    if form.kl_gradient == "importance_weighted":
        log_weight = log_ratio
    elif form.kl_gradient == "score_function":
        log_weight = own_part(logp)
    elif form.kl_gradient == "behaviour_weighted":
        assert rollout is not None
        log_weight = logp - rollout
    return times(k, only_where(k != 0, log_weight).exp())


def kl_penalty(form: Form, logp: Tensor, ref: Tensor, rollout: Tensor | None, log_ratio: Tensor, s: Scalars) -> Tensor:
    """The estimator under its gradient form, weighted before the output clamp; no gradient outside either clamp."""
    u = ref - logp.detach()
    bounded = u.clamp(-s.kl_input_clamp, s.kl_input_clamp)
    k = weighted_kl(form, bounded, logp, rollout, log_ratio).detach()
    clamped = k.clamp(-s.kl_output_clamp, s.kl_output_clamp)
    if form.kl_gradient == "straight_through":
        k2 = (ref - logp).square() / 2
        return own_part(k2) + clamped
    held = (u.abs() > s.kl_input_clamp) | (k.abs() > s.kl_output_clamp)
    # A weight of 0 removes whatever it weighs, and at u = 0 all but k1 have no slope.
    flat = held | ((k == 0) & ((u != 0) | (form.kl_estimator != "k1")))
    lp, x = only_where(~flat, logp), only_where(~flat, log_ratio)
    k = weighted_kl(form, torch.where(flat, bounded, ref - lp), lp, rollout, x)
    return torch.where(held, clamped, k)


def log_ratios(logps: Tensor, old: Tensor, active: Tensor, layout: Layout, level: str, s: Scalars) -> Tensor:
    """The log-ratio at its level, [B, T], that the objective, the KL and the metrics see."""
    x = logps - old
    x = torch.where(active, clamp(x, -s.log_ratio_clamp, s.log_ratio_clamp), 0.0)
    if level == "token":
        return x
    total = sequence_sums(x, layout)
    if level != "sequence_product":
        total = total / layout.sequence_sums(active.to(torch.int64)).clamp(min=1)
    if level == "sequence_token":
        per_token = layout.of_sequences(total.detach()) + torch.where(active, own_part(logps), 0.0)
        return clamp(per_token, high=s.sequence_log_ratio_max)
    return layout.of_sequences(clamp(total, high=s.sequence_log_ratio_max))


def sequence_sums(x: Tensor, layout: Layout) -> Tensor:
    if layout.padded:
        return x.sum(-1)
    index = layout.sequence_index(x.device)
    return x.new_zeros(layout.sequences + 1).index_add(0, index, x[0])[:-1]


# ---- the loss ----


def scalars_of(config: LossConfig, dtype: torch.dtype) -> Scalars:
    """The loss's numbers, with the coefficients that were given as tensors, 0-d. In a graph they are constants."""
    given = dict(zip(("kl_coef", "entropy_coef"), config.tensors, strict=True))
    tensors: Any = {name: x.detach().to(dtype).reshape(()) for name, x in given.items() if x is not None}
    return config.scalar_values()._replace(**tensors)


class PolicyTerm(NamedTuple):
    """The policy's part of each token's loss, [B, T], and what it was made of."""

    values: TokenValues
    rollout: Tensor
    value: Tensor  # token weight included
    gradient_weight: Tensor
    flags: Flags
    weight: Tensor  # of the policy term or of its sequence's


def _read(x: Tensor | None, active: Tensor, absent: Tensor) -> Tensor:
    return absent if x is None else torch.where(active, x, absent)


def policy_term(
    logps: Tensor, active: Tensor, layout: Layout, inputs: PolicyInputs, form: Form, s: Scalars
) -> PolicyTerm:
    """`logps`: differentiated where the loss is; 0 where masked."""
    zero, one = torch.zeros_like(logps), torch.ones_like(logps)
    old = _read(inputs.old_logps, active, logps.detach())
    log_ratio = log_ratios(logps, old, active, layout, form.ratio_level, s)
    values = TokenValues(
        logps, old, log_ratio, _read(inputs.advantages, active, zero), _read(inputs.token_weights, active, one),
        _read(inputs.selected, active, zero), zero, zero, one,
    )  # fmt: skip
    importance = _read(inputs.pooled_weights, active, one)
    if OBJECTIVES[form.objective].pooling != "none":
        values = with_pooled(values, importance, active, layout, form, s)
        if inputs.pooled_weights is None:  # exactly, where the logarithm of 1 and the floor is not 0
            values = values._replace(pooled_weight=one)
    token_weight = one if form.objective == "gmpo" else values.token_weight  # of gmpo's means, which it is in already
    kept = token_weight != 0
    policy, gradient_weight, flags = policy_objective(
        form, values._replace(logp=only_where(kept, logps), log_ratio=only_where(kept, log_ratio)), s
    )
    rollout = _read(inputs.rollout_logps, active, logps.detach())
    policy = weighted(token_weight, policy)
    return PolicyTerm(values, rollout, policy, gradient_weight, flags, values.token_weight * importance)


def policy_loss(
    logps: Tensor, entropy: Tensor | None, active: Tensor, layout: Layout, inputs: PolicyInputs, config: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (0-d), per-token terms [B, T] and metrics [len(METRICS)], from log-probs and entropies [B, T]."""
    form, s = config.form, scalars_of(config, logps.dtype)
    zero, one = torch.zeros_like(logps), torch.ones_like(logps)
    weights = torch.where(active, inputs.weights, zero)
    logps = only_where(weights != 0, torch.where(active, logps, zero))
    term = policy_term(logps, active, layout, inputs, form, s)
    policy, old, log_ratio = term.value, term.values.old, term.values.log_ratio
    kl = zero
    if form.kl_estimator != "none":
        part = torch.as_tensor(s.kl_coef != 0, device=logps.device)
        lp, x = only_where(part, logps), only_where(part, log_ratio)
        kl = kl_penalty(form, lp, _read(inputs.ref_logps, active, zero), term.rollout, x, s)
    h = zero if entropy is None else torch.where(active, entropy, zero)
    entropy_weights = weights if inputs.entropy_weights is None else torch.where(active, inputs.entropy_weights, zero)
    coef = s.entropy_coef * _read(inputs.entropy_mask, active, one)
    bonus = weighted(coef, only_where(coef * entropy_weights != 0, h))

    parts = [
        weighted(weights, policy).sum(), weighted(weights, weighted(s.kl_coef, kl)).sum(),
        -weighted(entropy_weights, bonus).sum(),
    ]  # fmt: skip
    per_token = torch.where(active, policy + weighted(s.kl_coef, kl) - bonus, zero)
    moved = clamp(logps - old, -s.log_ratio_clamp, s.log_ratio_clamp)
    metrics = policy_metrics(
        parts, active, layout, h, kl, moved, logps - term.rollout, log_ratio.exp(), term.flags, term.gradient_weight,
        term.weight,
    )  # fmt: skip
    return parts[0] + parts[1] + parts[2], per_token.detach(), metrics


def with_pooled(
    v: TokenValues, importance: Tensor, active: Tensor, layout: Layout, form: Form, s: Scalars
) -> TokenValues:
    """What the sequence-weighted objectives ask of a token's sequence, brought to each token."""
    n = layout.sequence_sums(active.to(torch.int64)).clamp(min=1)
    counts = torch.where(active, v.token_weight if form.objective == "gmpo" else torch.ones_like(v.adv), 0.0)
    terms = only_where(counts != 0, pooled_term(form, v.log_ratio, v.adv, importance, s))
    pooled = sequence_sums(weighted(counts, terms), layout)
    if form.objective == "gmpo":
        pooled = pooled / sequence_sums(counts, layout).clamp(min=1)
    log_weight = sequence_sums(torch.where(active, (importance + GMPO_WEIGHT_FLOOR).log(), 0.0), layout) / n
    adv = sequence_sums(torch.where(active, v.adv, 0.0), layout) / n
    shared = (pooled_limit(form, pooled), adv, log_weight.exp())
    log_ratio, adv, weight = (layout.of_sequences(x) for x in shared)
    return v._replace(pooled_log_ratio=log_ratio, pooled_adv=adv, pooled_weight=weight)


def policy_metrics(
    parts: list[Tensor],
    active: Tensor,
    layout: Layout,
    entropy: Tensor,
    kl: Tensor,
    moved: Tensor,
    drift: Tensor,
    ratio: Tensor,
    flags: Flags,
    gradient_weight: Tensor,
    w: Tensor,
) -> Tensor:
    """In the order of config.METRICS; means over active tokens, extremes over active tokens or their sequences."""
    n = active.sum()
    none, one = n == 0, ratio.new_ones(())

    def mean(x: Tensor, empty: float = 0.0) -> Tensor:
        return torch.where(none, empty, torch.where(active, x.to(ratio.dtype), 0.0).sum() / n.clamp(min=1))

    def extreme(x: Tensor, among: Tensor, largest: bool, empty: float) -> Tensor:
        worst = float("-inf") if largest else float("inf")
        x = torch.cat([torch.where(among, x, worst).flatten(), x.new_full((1,), worst)])
        return torch.where(none, empty, x.amax() if largest else x.amin())

    lengths = layout.sequence_sums(active.to(torch.int64)) if layout.knows_sequences else n[None]

    def share(flag: Tensor) -> Tensor:  # of each sequence
        count = (active & flag).to(torch.int64)
        total = layout.sequence_sums(count) if layout.knows_sequences else count.sum()[None]
        return total.to(ratio.dtype) / lengths.clamp(min=1)  # of integers it would be float32

    squares = torch.where(active, w.square(), 0.0).sum()
    total = torch.where(active, w, 0.0).sum()
    ess = torch.where(squares == 0, 0.0, total.square() / (n * squares))
    low, high = mean(flags.low), mean(flags.high)
    return torch.stack([
        *parts, n.to(ratio.dtype), mean(entropy), mean(kl), mean(-moved), mean(kl_estimate("k3", moved)),
        mean(ratio, 1.0), extreme(ratio, active, False, 1.0), extreme(ratio, active, True, 1.0),
        low, high, low + high, mean(flags.cap),
        extreme(share(flags.low), lengths > 0, False, 0.0),
        extreme(share(flags.high), lengths > 0, True, 0.0),
        mean(gradient_weight, 1.0), mean(w == 0), mean(w, 1.0), extreme(w, active, False, 1.0),
        extreme(w, active, True, 1.0), torch.where(none, one, ess), mean(-drift), mean(kl_estimate("k3", drift)),
        mean(drift.abs()),
    ]).detach()  # fmt: skip
