"""The operators of advantages, returns, the value loss and diversity; see loss.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import implementation
from ..inputs.grouping import VALUE_METRICS, AdvantageForm, Samples
from ..inputs.layout import acc_dtype, check_boundaries
from .library import define


def _group_advantages(*args: Any) -> tuple[Tensor, ...]:
    samples, form = Samples(*args[: len(Samples._fields)]), AdvantageForm(*args[len(Samples._fields) : -1])
    lengths = samples.lengths
    if lengths is not None and lengths.device.type == "cpu" and not (lengths >= 0).all():
        raise ValueError(f"lengths must be at least 0; got {lengths[~(lengths >= 0)][0].item()!r}")
    return implementation(args[-1]).group_advantages(samples, form)


def _fake_group_advantages(rewards: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shape = rewards.shape[:1]
    return (*(rewards.new_empty(shape) for _ in range(3)), rewards.new_empty(shape, dtype=torch.bool))


group_advantages = define(
    "group_advantages(Tensor rewards, Tensor? reward_weights, Tensor? valid, Tensor? group_ids, Tensor? lengths, "
    "Tensor? critic_values, SymInt group_size, str baseline, str scale, int ddof, float eps, float critic_weight, "
    "float clip_low, float clip_high, bool single_raw, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _group_advantages,
    _fake_group_advantages,
)


def _gae(
    rewards: Tensor, values: Tensor | None, active: Tensor | None, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    *numbers, backend = rest
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, rewards.shape[1])
    return implementation(backend).gae(rewards, values, active, cu_seqlens, *numbers)


gae = define(
    "gae(Tensor rewards, Tensor? values, Tensor? active, Tensor? cu_seqlens, float gamma, float lam, str backend) "
    "-> (Tensor, Tensor)",
    _gae,
    lambda rewards, values, *_: (
        rewards.new_empty(rewards.shape),
        rewards.new_empty((0,) if values is None else rewards.shape),
    ),
)


def _value_loss(*args: Any) -> tuple[Tensor, ...]:
    *inputs, backend = args
    return implementation(backend).value_loss(*inputs)


value_loss = define(
    "value_loss(Tensor values, Tensor? old_values, Tensor returns, Tensor weights, Tensor active, float clip, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _value_loss,
    lambda values, *_: tuple(
        values.new_empty(shape, dtype=acc_dtype(values.dtype))
        for shape in ((), values.shape, values.shape, (len(VALUE_METRICS),))
    ),
)


def _masked_moments(values: Tensor, active: Tensor, backend: str) -> Tensor:
    return implementation(backend).masked_moments(values, active)


masked_moments = define(
    "masked_moments(Tensor values, Tensor active, str backend) -> Tensor",
    _masked_moments,
    lambda values, *_: values.new_empty(5, dtype=torch.float64),
)


def _whiten(values: Tensor, active: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    return implementation(backend).whiten(values, active, coefficients)


whiten = define(
    "whiten(Tensor values, Tensor active, Tensor coefficients, str backend) -> Tensor",
    _whiten,
    lambda values, *_: values.new_empty(values.shape, dtype=acc_dtype(values.dtype)),
)


def _group_diversity(
    token_ids: Tensor, active: Tensor | None, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *options, backend = rest
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, token_ids.shape[1])
    return implementation(backend).group_diversity(token_ids, active, cu_seqlens, *options)


def _fake_diversity(token_ids: Tensor, active: Tensor | None, cu_seqlens: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    samples = token_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return tuple(token_ids.new_empty((samples,), dtype=t) for t in (torch.bool, torch.float32, torch.float32))


group_diversity = define(
    "group_diversity(Tensor token_ids, Tensor? active, Tensor? cu_seqlens, Tensor? group_ids, SymInt group_size, "
    "int ngram, float threshold, str backend) -> (Tensor, Tensor, Tensor)",
    _group_diversity,
    _fake_diversity,
)
