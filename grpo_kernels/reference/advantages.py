"""The specification of advantages, returns and the value loss, as loss.py is of the policy loss.

csrc/math/advantage.h and csrc/math/value.h hold the same formulas under the same names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs.grouping import AdvantageForm, Samples
from ..inputs.layout import acc_dtype
from .objectives import only_where, weighted

# ---- group advantages ----


def combined_rewards(samples: Samples, dtype: torch.dtype) -> Tensor:
    """[S]: the weighted sum of the components that are there; NaN where none is, or the sample is not valid."""
    wide = samples.rewards.to(dtype)
    missing = wide.isnan().all(1) if samples.valid is None else wide.isnan().all(1) | ~samples.valid
    weighted = wide if samples.reward_weights is None else wide * samples.reward_weights.to(dtype)
    return weighted.nansum(1).masked_fill(missing, float("nan"))


def moments(r: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation about it; 0 where there are not enough values. Equal values: exactly."""
    if not len(r):
        return r.new_zeros(()), r.new_zeros(())
    mean = r.mean().clamp(r.min(), r.max())
    squares = (r - mean).square().sum()
    return mean, (squares / (len(r) - ddof)).sqrt() if len(r) > ddof else torch.zeros_like(mean)


def centred(r: Tensor, lengths: Tensor | None, form: AdvantageForm) -> Tensor:
    """The valid rewards of a group on the group's own baseline."""
    n, mean = len(r), moments(r, 0)[0]
    if n == 1:
        return r if form.single_raw else torch.zeros_like(r)
    if form.baseline == "none":
        return r
    if (r == mean).all():
        return torch.zeros_like(r)
    if form.baseline == "leave_one_out":
        return (r - mean) * n / (n - 1)
    if form.baseline == "length_weighted":
        assert lengths is not None
        total = lengths.sum()
        return r - (mean + (lengths * (r - mean)).sum() / total) if total > 0 else r - mean
    return r - mean


def deviations(r: Tensor, batch_std: Tensor, form: AdvantageForm) -> Tensor:
    """What the scale divides by, for each valid reward of a group."""
    if form.scale == "batch":
        return batch_std.expand_as(r)
    if form.scale == "leave_one_out" and len(r):
        keep = ~torch.eye(len(r), dtype=torch.bool, device=r.device)
        return torch.stack([moments(r[others], form.ddof)[1] for others in keep])
    return moments(r, form.ddof)[1].expand_as(r)


def advantages_of_group(
    r: Tensor, lengths: Tensor | None, critic: Tensor | None, std: Tensor, form: AdvantageForm
) -> Tensor:
    """(R - baseline) / (scale + eps) of a group's valid rewards; a scale of exactly 0 does not divide."""
    a, alone = centred(r, lengths, form), torch.full_like(r, len(r) == 1, dtype=torch.bool)
    if critic is not None:
        blended = weighted(1 - form.critic_weight, a) + form.critic_weight * (r - critic)
        a, alone = torch.where(critic.isnan(), a, blended), alone & critic.isnan()
    if form.scale == "none":
        return a
    if form.scale == "mean":
        mean = moments(r, 0)[0]
        scaled = a / mean if mean > 0 else torch.zeros_like(a)
    else:
        scaled = torch.where(std > 0, a / (std + form.eps), a)
    return torch.where(alone, a, scaled)


def group_advantages(samples: Samples, form: AdvantageForm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per sample: advantage, the group's mean, the scale's deviation, informative."""
    rewards = combined_rewards(samples, torch.float64)
    counts, lengths, critic = ~rewards.isnan(), samples.lengths, samples.critic_values
    ids = torch.arange(len(rewards), device=rewards.device) // form.group_size
    ids = ids if samples.group_ids is None else samples.group_ids
    batch_std = moments(rewards[counts], form.ddof)[1]
    advantages, mean, std = (torch.zeros_like(rewards) for _ in range(3))
    informative = torch.zeros_like(counts)
    for group in ids.unique():
        members = ids == group
        chosen = members & counts
        r = rewards[chosen]
        v = None if critic is None else critic[chosen]
        mean[members], group_std = moments(r, form.ddof)
        std[members] = batch_std if form.scale == "batch" else group_std
        std[chosen] = deviations(r, batch_std, form)
        a = advantages_of_group(r, None if lengths is None else lengths[chosen], v, std[chosen], form)
        advantages[chosen] = a.clamp(form.clip_low, form.clip_high)
        disagrees = v is not None and bool((~v.isnan() & (r != v)).any())
        informative[members] = (len(r) >= 2 and bool((r != r[0]).any())) or disagrees
    dtype = acc_dtype(samples.rewards.dtype)
    return advantages.to(dtype), mean.to(dtype), std.to(dtype), informative


# ---- returns ----


def gae(
    rewards: Tensor, values: Tensor | None, active: Tensor | None, cu_seqlens: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """A_t = r_t + gamma V_next - V_t + gamma lam A_next, next: the following active token of the sequence, or 0.

    Advantages and A + V, [B, T]; the latter is empty without values. 0 at masked tokens and past the last boundary.
    """
    wide, zero = rewards.to(torch.float64), rewards.new_zeros(rewards.shape[0], dtype=torch.float64)
    v = torch.zeros_like(wide) if values is None else values.to(torch.float64)
    last = torch.zeros(rewards.shape[1], dtype=torch.bool, device=rewards.device)  # of a packed sequence
    counts = torch.ones_like(rewards, dtype=torch.bool) if active is None else active
    if cu_seqlens is not None:
        positions = torch.arange(len(last), device=last.device)
        last, counts = torch.isin(positions + 1, cu_seqlens), counts & (positions < cu_seqlens[-1])
    running, next_value, columns = zero, zero, []
    for t in reversed(range(rewards.shape[1])):
        running, next_value = (torch.where(last[t], zero, x) for x in (running, next_value))
        now = wide[:, t] + gamma * next_value - v[:, t] + gamma * lam * running
        running = torch.where(counts[:, t], now, running)
        next_value = torch.where(counts[:, t], v[:, t], next_value)
        columns.append(torch.where(counts[:, t], running, zero))
    advantages = torch.stack(columns[::-1], 1) if columns else wide
    returns = torch.where(counts, advantages + v, 0.0) if values is not None else wide.new_zeros(0)
    dtype = acc_dtype(rewards.dtype)
    return advantages.to(dtype), returns.to(dtype)


# ---- whitening ----


def masked_moments(values: Tensor, weights: Tensor) -> Tensor:
    """float64 [5] of the values, each counting `weights` times: count, mean, squares about it, lowest, highest."""
    active = weights != 0
    x, w = torch.where(active, values.to(torch.float64), 0.0), weights.to(torch.float64)
    infinity = x.new_full((1,), float("inf"))
    low = torch.cat([torch.where(active, x, float("inf")).flatten(), infinity]).amin()
    high = torch.cat([torch.where(active, x, -float("inf")).flatten(), -infinity]).amax()
    n = w.sum()
    mean = torch.where(n > 0, ((x * w).sum() / n).clamp(low, high), 0.0)  # of equal values exactly that value
    return torch.stack([n, mean, ((x - mean).square() * w).sum(), low, high])


def whitening(moments: Tensor, shift_mean: bool, divide: bool, ddof: int, eps: float, eps_mode: str) -> Tensor:
    """[3]: shift, factor and offset of `whiten`. A variance of exactly 0 does not divide."""
    n, mean, squares, *_ = moments.unbind()
    variance = torch.where(n > ddof, squares / (n - ddof), 0.0)
    if eps_mode == "std":
        std = variance.sqrt() + eps
    else:
        std = (variance + eps if eps_mode == "variance" else variance.clamp(min=eps)).sqrt()
    one = torch.ones_like(mean)
    factor = torch.where(variance > 0, 1 / std, one) if divide else one
    return torch.stack([mean, factor, torch.zeros_like(mean) if shift_mean else mean])


def whiten(values: Tensor, active: Tensor, coefficients: Tensor) -> Tensor:
    """(x - shift) * factor + offset; 0 where not active."""
    shift, factor, offset = coefficients.unbind()
    whitened = (values.to(torch.float64) - shift) * factor + offset
    return torch.where(active, whitened, 0.0).to(acc_dtype(values.dtype))


# ---- the value function ----


def value_term(value: Tensor, old: Tensor, target: Tensor, clip: float) -> Tensor:
    """max((v - R)^2, (clip(v, old - c, old + c) - R)^2) / 2. A NaN of the old value, which no comparison of the clip
    would see, is not hidden."""
    value = value + torch.where(old.isnan(), old, 0.0)
    error, bounded = value - target, value.clamp(old - clip, old + clip) - target
    return torch.where(bounded.square() > error.square(), bounded.square(), error.square()) / 2


def value_loss(
    values: Tensor, old_values: Tensor | None, returns: Tensor, weights: Tensor, active: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (0-d), per-token terms [B, T] and metrics [len(VALUE_METRICS)]."""
    v, target = (torch.where(active, x, 0.0) for x in (values, returns))
    v = only_where(weights != 0, v)
    old = v.detach() if old_values is None else torch.where(active, old_values, 0.0)
    term = value_term(v, old, target, clip)
    n = active.sum()
    clipped = (term > (v - target).square() / 2).to(v.dtype)
    metrics = torch.stack([n.to(v.dtype), *(x.sum() / n.clamp(min=1) for x in (clipped, v, target))])
    return torch.where(active, weighted(weights, term), 0.0).sum(), term.detach(), metrics.detach()
