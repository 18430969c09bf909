"""Advantages from rewards."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .backends import resolve

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("group", "batch", "none")
SINGLES = ("zero", "raw")


class GroupAdvantages(NamedTuple):
    """Per sample, [S]: the advantage, its group's mean reward, the standard deviation of the scale, and whether its
    group carries a signal (two valid rewards that differ)."""

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
    eps: float = 1e-4,
    single: str = "zero",
    valid: Tensor | None = None,
    clip: float | None = None,
    backend: str = "auto",
) -> GroupAdvantages:
    """Group-normalised advantages, ``A = (R - baseline) / (scale + eps)`` (GRPO, arXiv:2402.03300), in one launch.

    Equal rewards give exactly 0. The result does not depend on the order of the samples. Computed in float64.

    Args:
        rewards: ``[S]``; a NaN is left out of its group's statistics and gets advantage 0.
        group_size: consecutive samples form a group; must divide S. Or
        group_ids: ``[S]`` integers, any values in any order; groups may differ in size.
        baseline: ``"mean"`` of the group, ``"leave_one_out"`` (RLOO: mean of the others), ``"none"``.
        scale: standard deviation of the ``"group"`` (GRPO) or of the whole ``"batch"`` of valid rewards; ``"none"``
            (Dr.GRPO) does not divide.
        ddof: 1 for the sample deviation (TRL, verl), 0 for the population's.
        eps: added to the scale; 1e-4 as TRL, 1e-6 as verl.
        single: a group with one valid sample gets ``"zero"``, or its reward as it is (``"raw"``, verl's RLOO).
        valid: ``[S]``, 0 leaves a sample out as a NaN does.
        clip: advantages are clipped to +- this.

    Returns:
        GroupAdvantages(advantages, mean, std, informative), each ``[S]``; float32, float64 for float64 rewards.

    Raises:
        ValueError: unless exactly one of group_size and group_ids is given and fits; for unknown names.
    """
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be [S], one a sample; got shape {tuple(rewards.shape)}")
    for name, value, allowed in (
        ("baseline", baseline, BASELINES),
        ("scale", scale, SCALES),
        ("single", single, SINGLES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    if ddof not in (0, 1) or not eps >= 0 or (clip is not None and not clip > 0):
        raise ValueError(f"ddof must be 0 or 1, eps at least 0, clip above 0 or None; got {ddof!r}, {eps!r}, {clip!r}")
    _check_groups(rewards, group_size, group_ids)
    if valid is not None:
        if valid.shape != rewards.shape:
            raise ValueError(f"valid must have the shape of rewards, {tuple(rewards.shape)}; got {tuple(valid.shape)}")
        valid = valid != 0
    if not rewards.is_floating_point():
        rewards = rewards.to(torch.float32)
    ids = None if group_ids is None else group_ids.to(torch.int64)
    outputs = ops.group_advantages(
        rewards.detach(), valid, ids, group_size or 1, baseline, scale, ddof, float(eps),
        math.inf if clip is None else float(clip), single == "raw", resolve(backend, rewards.device),
    )  # fmt: skip
    return GroupAdvantages(*outputs)


def _check_groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> None:
    if (group_size is None) == (group_ids is None):
        raise ValueError(f"give exactly one of group_size and group_ids; got {group_size!r} and {group_ids!r}")
    if group_size is not None and (group_size < 1 or rewards.numel() % group_size):
        raise ValueError(f"group_size must be at least 1 and divide the {rewards.numel()} rewards; got {group_size!r}")
    if group_ids is not None and (group_ids.shape != rewards.shape or group_ids.is_floating_point()):
        raise ValueError(
            f"group_ids must be integers of shape {tuple(rewards.shape)}; "
            f"got {group_ids.dtype} {tuple(group_ids.shape)}"
        )
