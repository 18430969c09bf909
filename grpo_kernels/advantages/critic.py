"""What goes with a critic: the clipped value loss, and whitening of advantages."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..aggregation import aggregation_weights
from ..backends import differentiable, resolve
from ..config import LossConfig
from ..inputs.check import check_choice, check_number, check_tensor, check_unused
from ..inputs.data_parallel import reduced
from ..inputs.grouping import VALUE_METRICS, check_ddof_eps
from ..inputs.layout import acc_dtype, active_tokens, layout_of
from ..ops import advantages as ops
from ..ops.library import apply, first_order, none_for_unused_outputs
from ..reference import advantages as reference

EPS_MODES = ("variance", "floor", "std")


class ValueLoss(NamedTuple):
    """`loss` carries the gradient; the rest is detached. `per_token_loss` is before aggregation, 0 at masked tokens.
    `metrics`, 0-d tensors over the active tokens: ``tokens``, ``clip_fraction`` (share of tokens whose clipped error is
    the larger one), ``value_mean`` and ``return_mean``."""

    loss: Tensor
    per_token_loss: Tensor
    metrics: dict[str, Tensor]


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, backend: str, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        old_values, *rest = inputs
        loss, per_token, g_values, metrics = ops.value_loss(values, old_values, *rest, backend)
        ctx.save_for_backward(g_values)
        ctx.mark_non_differentiable(per_token, metrics)
        none_for_unused_outputs(ctx)
        return loss, per_token, metrics

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple:
        return None if g is None else g * ctx.saved_tensors[0], *[None] * 6


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    aggregation: str = "token_mean",
    max_length: int | None = None,
    count_empty_sequences: bool = True,
    cu_seqlens: Tensor | None = None,
    denominator: Tensor | float | None = None,
    scale: float | Tensor = 1.0,
    backend: str = "auto",
) -> ValueLoss:
    """PPO's clipped value loss, ``max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2``, in one launch with its
    derivative (TRL's PPO and verl's ``compute_value_loss``).

    Differentiable in ``values`` alone: another tensor that requires grad is refused. Nothing of a masked token is read.

    Args:
        values: ``[B, T]``, or ``[N]`` packed; of the critic being trained. float32 or float64, others in float32.
        old_values: per token, of the critic that made the returns; not read, and may be None, when ``clip`` is None.
        returns: per token, from ``gae``.
        mask: per token, any dtype, 0 masks.
        clip: c; None for the plain squared error. (verl's ``cliprange_value``, 0.5 there.)
        aggregation: as in ``LossConfig``: "token_mean", "token_sum", "sequence_mean", "sequence_sum", "fixed_length".
        max_length, count_empty_sequences: as in ``LossConfig``.
        cu_seqlens: ``[R + 1]`` int, the boundaries of packed sequences; needed where a sequence matters.
        denominator: replaces the aggregation's own, for gradient accumulation and data parallelism.
        scale: multiplies the loss.
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        ValueLoss(loss, per_token_loss, metrics).

    Raises:
        ValueError: for shapes or devices that do not fit, a clip that is not above 0, or old values missing.
        TypeError: for dtypes that do not fit.
    """
    check_tensor("values", values, kind="float", differentiable=True)
    if clip is not None:
        check_number("clip", clip, lambda c: c > 0, "above 0, or None for no clipping")
        if old_values is None:
            raise ValueError(f"clip={clip!r} needs old_values; got None")
    dtype = acc_dtype(values.dtype)
    backend, layout = resolve(backend, values.device, dtype), layout_of(values.shape, cu_seqlens, values.device)
    active = active_tokens(mask, layout, values.device)
    config = LossConfig(aggregation=aggregation, max_length=max_length, count_empty_sequences=count_empty_sequences)
    weights = aggregation_weights(
        layout, active, aggregation, config, dtype=dtype, denominator=denominator, scale=scale
    )
    old = layout.tokens(old_values, "old_values", dtype, "float")
    old = None if clip is None else old
    inputs = (old, layout.tokens(returns, "returns", dtype), weights, active, math.inf if clip is None else float(clip))
    values_bt = values.to(dtype).reshape(layout.bt_shape)
    if differentiable(backend):
        loss, per_token, metrics = reference.value_loss(values_bt, *inputs)  # type: ignore[arg-type]
    else:
        loss, per_token, metrics = apply("value_loss", _ValueLoss, values_bt, backend, *inputs)
    return ValueLoss(loss, per_token.view(layout.shape), dict(zip(VALUE_METRICS, metrics.unbind(), strict=True)))


def over_ranks(moments: Tensor, group: Any) -> Tensor:
    """The moments of all ranks' values together."""
    if group is None:
        return moments
    n, mean, squares, low, high = moments.unbind()
    bounds = reduced(torch.stack([-low, high]), group, "max")
    total, first = reduced(torch.stack([n, n * mean]), group).unbind()
    low, high = -bounds[0], bounds[1]
    overall = torch.where(total > 0, (first / total).clamp(low, high), 0.0)
    squares = reduced(squares + n * (mean - overall).square(), group)
    return torch.stack([total, overall, squares, low, high])


def check_whitening(ddof: int, eps: float, eps_mode: str) -> None:
    check_ddof_eps(ddof, eps)
    check_choice("eps_mode", eps_mode, EPS_MODES)


def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    divide: bool = True,
    ddof: int = 1,
    eps: float = 1e-8,
    eps_mode: str = "variance",
    dp_group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """``(x - mean) / std`` over the tokens of the mask; 0 at masked ones. Equal values give exactly 0.

    The defaults are verl's and slime's ``masked_whiten``; OpenRLHF: ``ddof=0, eps_mode="floor"``; TRL's normalisation
    of a batch: ``eps=1e-4, eps_mode="std"``. Computed in float64 (on a GPU: in the dtype of the result),
    the same for any number of threads.

    Args:
        values: any shape.
        mask: of the same shape, any dtype, 0 masks: nothing of a masked value is read.
        shift_mean: False adds the mean again after dividing.
        divide: False only subtracts the mean (OpenRLHF's ``no_std_norm``).
        ddof: 1 for the sample variance, 0 for the population's.
        eps: with ``eps_mode`` "variance": ``std = sqrt(var + eps)``; "floor": ``sqrt(max(var, eps))``; "std":
            ``sqrt(var) + eps``. A variance of exactly 0 does not divide.
        dp_group: the statistics are those of all its ranks.
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        The shape of values; float32, float64 for float64 values. Detached.

    Raises:
        ValueError: for a mask of another shape, ddof other than 0 and 1, unknown names, and options that are not read.
    """
    check_whitening(ddof, eps, eps_mode)
    if not divide:
        if not shift_mean:
            raise ValueError("shift_mean=False and divide=False together leave the values as they are; set one of them")
        for name, value, default in (("ddof", ddof, 1), ("eps", eps, 1e-8), ("eps_mode", eps_mode, "variance")):
            check_unused(name, value, default, "with divide=False, which ignores it")
    check_tensor("values", values)
    if mask is not None:
        check_tensor("mask", mask, device=values.device, shape=values.shape)
    x = values.detach().to(acc_dtype(values.dtype))
    active = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.to(torch.bool)
    if x.dim() != 2:
        x, active = x.reshape(1, -1), active.reshape(1, -1)
    whitened = whitened_grid(
        x, active, resolve(backend, x.device, x.dtype), dp_group,
        shift_mean=shift_mean, divide=divide, ddof=ddof, eps=eps, eps_mode=eps_mode,
    )  # fmt: skip
    return whitened.view(values.shape)


def whitened_grid(
    values: Tensor, active: Tensor, backend: str, group: Any, *, ddof: int, eps: float, eps_mode: str,
    shift_mean: bool = True, divide: bool = True,
) -> Tensor:  # fmt: skip
    """`whiten` of [B, T], checked."""
    moments = over_ranks(ops.masked_moments(values, active, backend), group)
    return ops.whiten(values, active, reference.whitening(moments, shift_mean, divide, ddof, eps, eps_mode), backend)
