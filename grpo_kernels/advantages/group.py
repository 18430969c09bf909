"""Advantages from one or several rewards per sample, group by group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from ..inputs import grouping
from ..inputs.check import check_choice, check_number, check_tensor, check_unused
from ..inputs.data_parallel import Ranks
from ..inputs.grouping import AdvantageForm, Samples, acc_rewards, check_groups, per_sample, reward_weights_of
from ..ops import advantages as ops

EPS = 1e-4


class GroupAdvantages(NamedTuple):
    """Per sample, [S]: the advantage, its group's mean reward, the standard deviation of the scale, and whether its
    group carries a signal (two valid rewards that differ, or a reward that differs from its critic's value)."""

    advantages: Tensor
    mean: Tensor
    std: Tensor
    informative: Tensor


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "group",
    ddof: int = 1,
    eps: float = EPS,
    single: str = "zero",
    valid: Tensor | None = None,
    lengths: Tensor | None = None,
    clip: float | tuple[float | None, float | None] | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    critic_values: Tensor | None = None,
    critic_weight: float = 0.0,
    dp_group: Any = None,
    backend: str = "auto",
) -> GroupAdvantages:
    """Group-normalised advantages, ``A = (R - baseline) / (scale + eps)`` (GRPO, arXiv:2402.03300), in one launch.

    Equal rewards give exactly 0. A scale of exactly 0 does not divide. The result does not depend on the order of the
    samples. Computed in float64, on a GPU in the dtype of the result.

    Args:
        rewards: ``[S]``; a NaN is left out of its group's statistics and gets advantage 0. ``[S, K]``: the sum of K
            rewards by ``reward_weights``; a NaN among them is skipped, unless all are (TRL's sum_then_normalize).
        group_size: consecutive samples form a group; must divide S. Or
        group_ids: ``[S]`` integers, any values in any order; groups may differ in size.
        baseline: ``"mean"`` of the group, ``"leave_one_out"`` (RLOO: mean of the others), ``"length_weighted"`` (OPO,
            arXiv:2505.23585: ``sum(l R) / sum(l)`` with ``lengths``), ``"none"``.
        scale: standard deviation of the ``"group"`` (GRPO), of the whole ``"batch"`` of valid rewards, or of the other
            samples of the group (``"leave_one_out"``, NeMo-RL); ``"mean"`` (MaxRL) divides by the group's mean, where
            that is above 0, and gives 0 elsewhere; ``"none"`` (Dr.GRPO) does not divide.
        ddof: 1 for the sample deviation (TRL, verl), 0 for the population's.
        eps: added to the standard deviation; 1e-4 as TRL, 1e-6 as verl and NeMo-RL. Not read by "mean" and "none".
        single: a group with one valid sample gets ``"zero"``, or its reward as it is (``"raw"``, verl's GRPO and RLOO).
        valid: ``[S]``, 0 leaves a sample out as a NaN does.
        lengths: ``[S]``, tokens of each sample, for ``baseline="length_weighted"``; all 0 means the plain mean.
        clip: advantages are clipped to +- this, or to a pair (low, high) around 0, None for no bound (NeMo-RL).
        reward_weights: ``[K]`` with rewards ``[S, K]``, numbers or a tensor; 1 each when None. A tensor on
            another device is copied to that of the rewards, which synchronises.
        critic_values: ``[S]``, with ``critic_weight`` w in (0, 1]: the baseline is ``(1 - w) group + w V``. NaN: no
            value for this sample, whose baseline is the group's. A constant group is left with ``w (R - V)``.
        dp_group: ranks hold different samples of one batch, as many as they like; groups may straddle them, the samples
            counting in the order of the ranks. Waits for the counts.
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        GroupAdvantages(advantages, mean, std, informative), each ``[S]``; float32, float64 for float64 rewards.

    Raises:
        ValueError: unless exactly one of group_size and group_ids is given and fits; for shapes that do not fit,
            unknown names, options that the chosen form ignores, and tensors on another device or that require grad.
        TypeError: for dtypes that do not fit.
    """
    samples = _samples(rewards, reward_weights, valid, group_ids, lengths, critic_values)
    form = _form(group_size, baseline, scale, ddof, eps, single, clip, critic_weight)
    _check_read(samples, form)
    ranks = Ranks(dp_group, len(rewards), rewards.device)
    if dp_group is not None:
        shared = samples.reward_weights  # by all samples, so not gathered
        samples = Samples(*map(ranks.gather, samples))._replace(reward_weights=shared)  # type: ignore[arg-type]
    check_groups(ranks.samples, group_size, samples.group_ids)
    outputs = ops.group_advantages(*samples, *form, resolve(backend, rewards.device, acc_rewards(rewards).dtype))
    return GroupAdvantages(*map(ranks.own, outputs))


def _samples(
    rewards: Tensor,
    reward_weights: Tensor | Sequence[float] | None,
    valid: Tensor | None,
    group_ids: Tensor | None,
    lengths: Tensor | None,
    critic_values: Tensor | None,
) -> Samples:
    check_tensor("rewards", rewards)
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards must be [S] or [S, K], one or K per sample; got shape {tuple(rewards.shape)}")
    weights = None
    if reward_weights is not None:
        weights = reward_weights_of(reward_weights, rewards)
        if rewards.dim() != 2 or weights.shape != rewards.shape[1:]:
            raise ValueError(
                f"reward_weights must be [K] for rewards [S, K]; got {tuple(weights.shape)} for {tuple(rewards.shape)}"
            )
    return Samples(
        acc_rewards(rewards if rewards.dim() == 2 else rewards[:, None]),
        weights,
        per_sample(valid, "valid", rewards, torch.bool),
        per_sample(group_ids, "group_ids", rewards, torch.int64, "integer"),
        per_sample(lengths, "lengths", rewards, torch.float64),
        per_sample(critic_values, "critic_values", rewards, torch.float64),
    )


def _form(
    group_size: int | None,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    single: str,
    clip: float | tuple[float | None, float | None] | None,
    critic_weight: float,
) -> AdvantageForm:
    check_choice("baseline", baseline, grouping.BASELINES)
    check_choice("scale", scale, grouping.SCALES)
    check_choice("single", single, grouping.SINGLES)
    grouping.check_ddof_eps(ddof, eps)
    check_number("critic_weight", critic_weight, lambda x: 0 <= x <= 1, "in [0, 1]")
    low, high = clip if isinstance(clip, (tuple, list)) else (clip if clip is None else -clip, clip)
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    if not (low <= 0 <= high and low < high):
        raise ValueError(
            f"clip must be a number above 0, a pair (low, high) with 0 between them, or None; got {clip!r}"
        )
    return AdvantageForm(
        group_size or 1, baseline, scale, ddof, float(eps), float(critic_weight), low, high, single == "raw"
    )


def _check_read(samples: Samples, form: AdvantageForm) -> None:
    if form.scale in ("mean", "none"):
        check_unused("eps", form.eps, EPS, f"with scale={form.scale!r}, which ignores it")
    if form.baseline == "length_weighted" and samples.lengths is None:
        raise ValueError("baseline='length_weighted' needs lengths; got None")
    if form.baseline != "length_weighted":
        check_unused("lengths", samples.lengths, None, f"with baseline={form.baseline!r}, which ignores them")
    if samples.critic_values is None:
        check_unused("critic_weight", form.critic_weight, 0.0, "without critic_values")
    elif form.critic_weight == 0:
        raise ValueError(f"critic_values need a critic_weight above 0; got {form.critic_weight!r}")
