"""Estimators that are built on group_advantages: pass@k, GPG, GDPO, process supervision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import resolve
from ..inputs.check import check_choice, check_positive, check_tensor
from ..inputs.data_parallel import Ranks, reduced
from ..inputs.grouping import check_groups, groups_of, per_sample, reward_weights_of
from ..ops import advantages as ops
from ..reference import advantages as reference
from .critic import check_whitening, over_ranks
from .group import EPS, GroupAdvantages, group_advantages


def _one_reward(rewards: Tensor) -> None:
    check_tensor("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be [S], one a sample; got shape {tuple(rewards.shape)}")


def _counted(there: Tensor, valid: Tensor | None) -> Tensor:
    return there if valid is None else there & valid.to(torch.bool)


def pass_at_k_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: str = "group",
    ddof: int = 1,
    eps: float = EPS,
    valid: Tensor | None = None,
    dp_group: Any = None,
    backend: str = "auto",
) -> GroupAdvantages:
    """The group's only best sample gets ``(best - second best) / (std + eps)``, all others 0 (arXiv:2503.19595; verl's
    ``grpo_passk``, with eps 1e-6).

    Args:
        rewards: ``[S]``; NaN as in ``group_advantages``, whose arguments the others are too.
        scale: ``"group"`` or ``"none"``, which does not divide.

    Returns:
        GroupAdvantages, each ``[S]``; ``informative`` where one sample is better than all others. A group of one: 0.

    Raises:
        ValueError: as ``group_advantages``.
    """
    check_choice("scale", scale, ("group", "none"))
    _one_reward(rewards)
    stats = group_advantages(
        rewards, group_size=group_size, group_ids=group_ids, scale=scale, ddof=ddof, eps=eps, valid=valid,
        dp_group=dp_group, backend=backend,
    )  # fmt: skip
    ranks = Ranks(dp_group, len(rewards), rewards.device)
    groups = groups_of(ranks.samples, group_size, ranks.gather(group_ids))
    wide, counts = rewards.detach().to(torch.float64), _counted(~rewards.isnan(), valid)
    everyone = ranks.gather(torch.where(counts, wide, float("-inf")))
    assert everyone is not None
    alone, best, second = map(ranks.own, groups.best_two(everyone))
    chosen = alone & counts & (second > float("-inf"))
    divisor = stats.std.to(torch.float64) + eps if scale == "group" else 1.0
    advantages = torch.where(chosen, (best - second) / divisor, 0.0).to(stats.mean.dtype)
    informative = groups.maxima(ranks.gather(chosen.to(torch.float64)))  # type: ignore[arg-type]
    return stats._replace(advantages=advantages, informative=ranks.own(informative) > 0)


def gpg_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    f_norm: float = 1.0,
    single: str = "zero",
    valid: Tensor | None = None,
    dp_group: Any = None,
    backend: str = "auto",
) -> GroupAdvantages:
    """``alpha (R - mean) / f_norm``, alpha = valid samples / samples whose reward is not 0 (GPG, arXiv:2504.02546;
    verl's ``gpg``, where ``single="raw"``).

    Args:
        rewards: ``[S]``; NaN as in ``group_advantages``, whose arguments the others are too.
        f_norm: a number above 0.

    Returns:
        GroupAdvantages, each ``[S]``.

    Raises:
        ValueError: as ``group_advantages``.
    """
    check_positive("f_norm", f_norm)
    _one_reward(rewards)
    plain = group_advantages(
        rewards, group_size=group_size, group_ids=group_ids, scale="none", single=single, valid=valid,
        dp_group=dp_group, backend=backend,
    )  # fmt: skip
    counts = _counted(~rewards.isnan(), valid)
    samples, nonzero = reduced(torch.stack([counts.sum(), (counts & (rewards != 0)).sum()]), dp_group).unbind()
    alpha = samples.to(torch.float64) / nonzero.clamp(min=1) / f_norm
    return plain._replace(advantages=(alpha * plain.advantages).to(plain.advantages.dtype))


def gdpo_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    baseline: str = "mean",
    scale: str = "group",
    ddof: int = 1,
    eps: float = EPS,
    single: str = "zero",
    valid: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_eps: float = EPS,
    batch_eps_mode: str = "std",
    dp_group: Any = None,
    backend: str = "auto",
) -> GroupAdvantages:
    """Several rewards, each normalised in its group, then summed, then normalised over the batch (GDPO,
    arXiv:2601.05242): ``s = sum_k w_k (R_k - mean_k) / (std_k + eps)``, ``A = (s - mean s) / (std s + batch_eps)``.

    The defaults are TRL's normalize_then_sum. NeMo-RL: ``baseline=scale="leave_one_out", eps=1e-6, batch_eps=0``.
    verl: ``lengths``, ``eps=1e-6, single="raw", batch_eps=1e-8, batch_eps_mode="variance"``.

    Args:
        rewards: ``[S, K]``; a NaN is left out of its own reward's groups and sum; all K NaN leave the sample out.
        reward_weights: ``[K]``, as in ``group_advantages``; 1 each when None.
        baseline, scale, ddof, eps, single: of each reward in its group, as in ``group_advantages``.
        valid: ``[S]``, 0 leaves a sample out.
        lengths: ``[S]``; each sample counts as many times in the batch's statistics, as verl's whitening over tokens
            has it. None: once each.
        batch_eps, batch_eps_mode: of the last step, as in ``whiten``.
        dp_group: ranks hold different samples of one batch.

    Returns:
        GroupAdvantages: advantages and informative (any reward is) ``[S]``, mean and std of the groups ``[S, K]``.

    Raises:
        ValueError: as ``group_advantages``.
    """
    check_tensor("rewards", rewards)
    if rewards.dim() != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards must be [S, K], K above 0; got shape {tuple(rewards.shape)}")
    check_whitening(ddof, batch_eps, batch_eps_mode)
    weights = reward_weights_of(reward_weights, rewards)
    if weights.shape != rewards.shape[1:]:
        raise ValueError(f"reward_weights must be {tuple(rewards.shape[1:])}; got {tuple(weights.shape)}")
    each = [
        group_advantages(
            r, group_size=group_size, group_ids=group_ids, baseline=baseline, scale=scale, ddof=ddof, eps=eps,
            single=single, valid=valid, dp_group=dp_group, backend=backend,
        )
        for r in rewards.unbind(1)
    ]  # fmt: skip
    advantages, mean, std, informative = (torch.stack(x, 1) for x in zip(*each, strict=True))
    counts = _counted(~rewards.isnan().all(1), valid)
    times = per_sample(lengths, "lengths", rewards, torch.float64)
    total = (advantages.to(torch.float64) * weights).sum(1)
    times = counts.to(torch.float64) if times is None else torch.where(counts, times, 0.0)
    moments = over_ranks(reference.masked_moments(total, times), dp_group)
    coefficients = reference.whitening(moments, True, True, ddof, batch_eps, batch_eps_mode)
    whitened = reference.whiten(total, times != 0, coefficients)
    return GroupAdvantages(whitened.to(mean.dtype), mean, std, informative.any(1))


def process_advantages(
    step_rewards: Tensor,
    step_ends: Tensor,
    mask: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: str = "group",
    ddof: int = 1,
    eps: float = EPS,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Process supervision (DeepSeekMath, arXiv:2402.03300): every step's reward is standardised over all steps of its
    group; a token's advantage is the sum over the steps that end at or after it.

    Args:
        step_rewards: ``[S, K]``; NaN for steps that a sample does not have.
        step_ends: ``[S, K]`` integers, the index in ``[0, T)`` of each step's last token; not read for missing steps.
        mask: ``[S, T]``, any dtype; 0 masks, and gets advantage 0. A step may end at a masked token.
        group_size, group_ids: groups of samples, as in ``group_advantages``, as are scale (``"group"``, ``"batch"``,
            ``"none"``), ddof and eps.
        valid: ``[S, K]``, 0 leaves a step out.

    Returns:
        ``[S, T]``; float32, float64 for float64 rewards.

    Raises:
        ValueError: for shapes that do not fit; on the CPU also for a step that ends outside ``[0, T)``.
    """
    check_tensor("step_rewards", step_rewards)
    device = step_rewards.device
    check_tensor("step_ends", step_ends, device=device, kind="integer")
    check_tensor("mask", mask, device=device)
    if step_rewards.dim() != 2 or step_ends.shape != step_rewards.shape:
        raise ValueError(
            f"step_rewards and step_ends must be [S, K]; got {tuple(step_rewards.shape)} and {tuple(step_ends.shape)}"
        )
    if mask.dim() != 2 or len(mask) != len(step_rewards):
        raise ValueError(f"mask must be [S, T] with S = {len(step_rewards)}; got {tuple(mask.shape)}")
    if valid is not None:
        check_tensor("valid", valid, device=device, shape=step_rewards.shape)
    check_groups(len(step_rewards), group_size, group_ids, device)
    steps, length = step_rewards.shape[1], mask.shape[1]
    counts = _counted(~step_rewards.isnan(), valid)
    z = group_advantages(
        step_rewards.reshape(-1), valid=counts.reshape(-1), scale=scale, ddof=ddof, eps=eps, backend=backend,
        group_size=None if group_size is None else group_size * max(steps, 1),
        group_ids=None if group_ids is None else group_ids.repeat_interleave(steps),
    ).advantages.view(step_rewards.shape)  # fmt: skip
    ends = torch.where(counts, step_ends.to(torch.int64), 0)
    if ends.device.type == "cpu" and not torch.compiler.is_compiling() and ((ends < 0) | (ends >= length)).any():
        bad = ends[(ends < 0) | (ends >= length)][0].item()
        raise ValueError(f"step_ends must be in [0, {length}); got {bad}")
    at_ends = z.new_zeros(mask.shape).scatter_add(1, ends, z)
    later = ops.gae(at_ends, None, None, None, 1.0, 1.0, resolve(backend, z.device, z.dtype))[0]
    return torch.where(mask.to(torch.bool), later, 0.0)
