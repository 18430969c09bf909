"""The specification: every quantity in plain torch, in any floating dtype, differentiated by autograd.

The kernels must agree with this file; csrc/math holds the same formulas with their derivatives, under the same names.
Everything is [B, T]. A masked token contributes nothing, whatever its values hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Form, Scalars
from .layout import Layout, PolicyInputs, Rows, real_dtype

# ---- log-probs ----


def transformed(logits: Tensor, rows: Rows) -> Tensor:
    """z = softcap(logit_scale * logit) / temperature, [B, T, V], in float32 or wider; 0 at masked tokens."""
    z = logits.to(real_dtype(logits.dtype))[:, : rows.targets.shape[1]]
    z = torch.where(rows.active[..., None], z, 0.0) * rows.logit_scale
    if rows.softcap:
        z = rows.softcap * torch.tanh(z / rows.softcap)
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
    entropy = -torch.where(p > 0, p * logp, p * 0).sum(-1)  # p * 0: a NaN stays
    return tuple(torch.where(rows.active, x, 0.0) for x in (chosen, entropy, p.square().sum(-1)))  # type: ignore[return-value]


# ---- policy maths, in the order of csrc/math/policy.h ----


def clip_objective(ratio: Tensor, adv: Tensor, s: Scalars) -> Tensor:
    """-min(min(r, delta) A, clip(r) A); with dual_clip c, for A < 0: min(-c A, that)."""
    value = -torch.minimum(ratio.clamp(max=s.delta) * adv, ratio.clamp(s.ratio_low, s.ratio_high) * adv)
    if s.dual_clip == float("inf"):
        return value
    return torch.where((adv < 0) & (value > -s.dual_clip * adv), -s.dual_clip * adv, value)


def kl_estimate(estimator: str, u: Tensor) -> Tensor:
    """KL(policy || reference) from one sample, u = ref - logp (Schulman, "Approximating KL divergence")."""
    if estimator == "k1":
        return -u
    if estimator == "abs":
        return u.abs()
    if estimator == "k2":
        return u.square() / 2
    return torch.expm1(u) - u  # k3


def kl_penalty(form: Form, logp: Tensor, ref: Tensor, rollout: Tensor | None, ratio: Tensor, s: Scalars) -> Tensor:
    """The estimator under its gradient form, weighted before the output clamp; no gradient outside either clamp."""
    u = ref - logp
    k = kl_estimate(form.kl_estimator, u.clamp(-s.kl_input_clamp, s.kl_input_clamp))
    weight = torch.ones_like(k)
    if form.kl_gradient == "importance_weighted":
        weight = ratio
    elif form.kl_gradient == "score_function":
        weight = (logp - logp.detach()).exp()
    elif form.kl_gradient == "behaviour_weighted":
        assert rollout is not None
        weight = (logp - rollout).exp()
    weight = torch.where(u.abs() > s.kl_input_clamp, weight.detach(), weight)
    k = (weight * k).clamp(-s.kl_output_clamp, s.kl_output_clamp)
    if form.kl_gradient == "straight_through":
        k2 = u.square() / 2
        return k2 - k2.detach() + k.detach()
    return k


def log_ratios(logps: Tensor, old: Tensor | None, active: Tensor, layout: Layout, level: str, s: Scalars) -> Tensor:
    """The log-ratio that the objective sees, [B, T]; `old=None` is on-policy: the current log-probs, detached."""
    x = logps - (logps.detach() if old is None else old)
    x = torch.where(active, x.clamp(-s.log_ratio_clamp, s.log_ratio_clamp), 0.0)
    if level == "token":
        return x
    total = sequence_sums(x, layout)
    if level != "sequence_product":
        total = total / layout.sequence_sums(active.to(torch.int64)).clamp(min=1)
    if level == "sequence_token":
        per_token = layout.of_sequences(total.detach()) + torch.where(active, logps - logps.detach(), 0.0)
        return per_token.clamp(max=s.sequence_log_ratio_max)
    return layout.of_sequences(total.clamp(max=s.sequence_log_ratio_max))


def sequence_sums(x: Tensor, layout: Layout) -> Tensor:
    if layout.padded:
        return x.sum(-1)
    index = layout.sequence_index(x.device)
    return x.new_zeros(layout.sequences + 1).index_add(0, index, x[0])[:-1]


# ---- the loss ----


def policy_loss(
    logps: Tensor, entropy: Tensor | None, active: Tensor, layout: Layout, inputs: PolicyInputs
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (0-d), per-token terms [B, T] and metrics [len(METRICS)], from log-probs and entropies [B, T]."""
    form, s = Form(*inputs.form), Scalars(*inputs.scalars.tolist())

    def read(x: Tensor | None, absent: Tensor) -> Tensor:
        return absent if x is None else torch.where(active, x, absent)

    zero, one = torch.zeros_like(logps), torch.ones_like(logps)
    logps = torch.where(active, logps, zero)
    old = None if inputs.old_logps is None else read(inputs.old_logps, zero)
    adv, weights = read(inputs.advantages, zero), torch.where(active, inputs.weights, zero)
    log_ratio = log_ratios(logps, old, active, layout, form.ratio_level, s)
    ratio = log_ratio.exp()
    policy = read(inputs.token_weights, one) * clip_objective(ratio, adv, s)
    kl = zero
    if form.kl_estimator != "none":
        rollout = None if inputs.rollout_logps is None else read(inputs.rollout_logps, zero)
        kl = kl_penalty(form, logps, read(inputs.ref_logps, zero), rollout, ratio, s)
    h = zero if entropy is None else torch.where(active, entropy, zero)
    bonus = s.entropy_coef * read(inputs.entropy_mask, one) * h
    entropy_weights = weights if inputs.entropy_weights is None else torch.where(active, inputs.entropy_weights, zero)

    parts = [(weights * policy).sum(), (weights * s.kl_coef * kl).sum(), -(entropy_weights * bonus).sum()]
    per_token = torch.where(active, policy + s.kl_coef * kl - bonus, zero)
    raw = zero if old is None else logps - old
    metrics = policy_metrics(parts, active, h, kl, raw, ratio, adv, s)
    return parts[0] + parts[1] + parts[2], per_token.detach(), metrics


def policy_metrics(
    parts: list[Tensor],
    active: Tensor,
    entropy: Tensor,
    kl: Tensor,
    raw: Tensor,
    ratio: Tensor,
    adv: Tensor,
    s: Scalars,
) -> Tensor:
    """In the order of config.METRICS; means over active tokens."""
    n = active.sum()

    def mean(x: Tensor) -> Tensor:
        return torch.where(active, x, 0.0).sum() / n.clamp(min=1)

    none = n == 0
    cap = min(s.delta, s.dual_clip)
    low, high = (
        mean(((ratio < s.ratio_low) & (adv < 0)).to(ratio.dtype)),
        mean(((ratio > s.ratio_high) & (adv > 0)).to(ratio.dtype)),
    )
    extremes = [torch.where(active, ratio, float("inf")).flatten(), torch.where(active, ratio, float("-inf")).flatten()]
    one = ratio.new_ones(1)
    return torch.stack([
        *parts, n.to(ratio.dtype), mean(entropy), mean(kl), mean(-raw), mean(torch.expm1(raw) - raw),
        torch.where(none, one[0], mean(ratio)),
        torch.where(none, one[0], torch.cat([extremes[0], one * float("inf")]).amin()),
        torch.where(none, one[0], torch.cat([extremes[1], one * float("-inf")]).amax()),
        low, high, low + high, mean(((ratio > cap) & (adv < 0)).to(ratio.dtype)),
    ]).detach()  # fmt: skip
