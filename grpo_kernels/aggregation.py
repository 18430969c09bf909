"""Every reduction of a GRPO-family loss is `scale * sum(weights * terms) / denominator`: the weights, from the mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import LossConfig
from .inputs.check import check_factor, check_tensor
from .inputs.layout import Layout, filled


def aggregation_weights(
    layout: Layout,
    active: Tensor,  # [B, T] bool
    aggregation: str,
    config: LossConfig,
    *,
    dtype: torch.dtype,
    denominator: Tensor | float | None = None,
    sequence_weights: Tensor | None = None,  # [R]
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Each token's share in the loss, a [B, T] view, broadcast where it can be; kernels leave masked tokens out.

    `denominator` replaces N for a token mean, R for a sequence mean or sum, R * max_length for the fixed length.
    """
    if aggregation not in ("token_mean", "token_sum") and not layout.knows_sequences:
        raise ValueError(f"aggregation={aggregation!r} over flat tokens needs cu_seqlens")
    if sequence_weights is not None and not layout.knows_sequences:
        raise ValueError("sequence_weights over flat tokens need cu_seqlens")
    check_factor("scale", scale, active.device)
    if denominator is not None:
        check_factor("denominator", denominator, active.device, above_0=True)
        if torch.compiler.is_compiling() and not isinstance(denominator, Tensor):
            denominator = filled(denominator, dtype, active.device)
    else:
        denominator = _own_denominator(layout, active, aggregation, config)
    weight = (_on_device(scale, active, dtype) / denominator).to(dtype)
    if aggregation != "sequence_mean" and sequence_weights is None:
        return weight.expand(layout.bt_shape)
    if aggregation == "sequence_mean":
        weight = weight / layout.sequence_sums(active).clamp(min=1)
    if sequence_weights is not None:
        weight = weight * _checked(sequence_weights, layout).to(dtype)
    return layout.of_sequences(weight)


def _on_device(scale: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """0-d, without a copy to the device, which the host would wait for: a number is filled in there, and a 0-d tensor
    of the CPU is an argument of the product."""
    if not isinstance(scale, Tensor):
        return filled(scale, dtype, like.device)
    if scale.dim() == 0 and scale.device != like.device:
        return like.new_ones((), dtype=dtype) * scale.to(dtype)
    return scale.to(like.device, dtype)


def _own_denominator(layout: Layout, active: Tensor, aggregation: str, config: LossConfig) -> Tensor | int:
    if aggregation == "token_sum":
        return 1
    if aggregation == "token_mean":
        return active.sum().clamp(min=1)
    sequences: Tensor | int = max(layout.sequences, 1)
    if not config.count_empty_sequences:
        sequences = (layout.sequence_sums(active) > 0).sum().clamp(min=1)
    if aggregation != "fixed_length":
        return sequences
    if config.max_length is None:
        raise ValueError("aggregation='fixed_length' needs LossConfig(max_length=...) or a denominator")
    return sequences * config.max_length


def _checked(sequence_weights: Tensor, layout: Layout) -> Tensor:
    check_tensor("sequence_weights", sequence_weights, device=layout.device, shape=(layout.sequences,))
    return sequence_weights.detach()
