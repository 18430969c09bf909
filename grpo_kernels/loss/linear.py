"""Log-probs and losses from hidden states and the lm_head, never holding the [N, V] logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import differentiable, resolve
from ..config import DEFAULT, LossConfig
from ..inputs.check import check_tensor
from ..inputs.layout import Layout, PolicyInputs, Rows, check_logits, layout_of, rows_of
from ..ops import loss as ops
from ..ops.library import first_order, none_for_unused_outputs
from ..ops.linear_chunks import chunk_rows_for
from ..reference import loss as reference
from .grpo import ConfiguredLoss, Rewards, loss_from_rows, scale_gradient
from .logps import N_ROWS, TokenLogps, shaped, unsupported_group
from .policy import N_INPUTS, LossArguments, LossOutput


def _given(gradients: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


class LinearLogps(torch.autograd.Function):
    """Forward and backward each compute the logits chunk by chunk; only the rows' statistics are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int, sum_p2: bool, validate: bool,
        backend: str, *rows: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        *stats, squares = ops.linear_forward(hidden, *rows, weight, bias, chunk_rows, sum_p2, validate, backend)
        ctx.save_for_backward(hidden, weight, bias, *rows[:2], rows[3], *stats)
        ctx.numbers, ctx.chunk_rows, ctx.backend = (rows[2], *rows[4:]), chunk_rows, backend
        ctx.mark_non_differentiable(squares)
        none_for_unused_outputs(ctx)
        return (*stats[:2], squares)

    @staticmethod
    @first_order
    def backward(ctx: Any, g_logps: Tensor | None, g_entropy: Tensor | None, _: Any) -> tuple:
        if g_logps is None and g_entropy is None:
            return (None,) * (7 + N_ROWS)
        hidden, weight, bias, targets, active, temperatures, *stats = ctx.saved_tensors
        temperature, logit_scale, softcap = ctx.numbers
        needs = list(ctx.needs_input_grad[:3])
        rows = (targets, active, temperature, temperatures, logit_scale, softcap)
        g_logps = torch.zeros_like(stats[0]) if g_logps is None else g_logps
        gradients = ops.linear_backward(
            hidden, *rows, weight, bias, ctx.chunk_rows, needs, *stats, g_logps, g_entropy, ctx.backend
        )
        return *_given(gradients, needs), *[None] * (4 + N_ROWS)


class LinearSinglePass(torch.autograd.Function):
    """Loss and the gradients of hidden, weight and bias in the forward: three matmuls a chunk instead of four."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_rows: int,
        validate: bool,
        backend: str,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        rows, inputs, needs = rest[:N_ROWS], rest[N_ROWS:], list(ctx.needs_input_grad[:3])
        *gradients, logps, entropy = ops.linear_policy(
            hidden, *rows, weight, bias, chunk_rows, needs, *inputs, validate, backend
        )
        loss, per_token, _, _, metrics = ops.token_policy(logps, entropy, rows[1], cu_seqlens, *inputs, backend)
        ctx.save_for_backward(*gradients)
        ctx.inplace, ctx.grad_aliased, ctx.backend = False, False, backend
        ctx.mark_non_differentiable(logps, entropy, per_token, metrics)
        none_for_unused_outputs(ctx)
        return loss, logps, entropy, per_token, metrics

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple:
        if g is None:
            return (None,) * (7 + N_ROWS + N_INPUTS)
        needs = ctx.needs_input_grad[:3]
        gradients = [
            scale_gradient(ctx, x, g) if need else None for x, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        return *gradients, *[None] * (4 + N_ROWS + N_INPUTS)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    check_logits(hidden, "hidden")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None or name == "weight":
            check_tensor(name, x, device=hidden.device, kind="float", differentiable=True)
    check_tensor("targets", targets, device=hidden.device, kind="integer")


def _prepared(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None, **transform: Any
) -> tuple[Rows, Tensor, Tensor | None]:
    """Checked [B, T] rows, weight and bias, in autocast's dtype where it is on (as torch.nn.functional.linear)."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.dim() != 2 or hidden.dim() < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[-1]}] for hidden {tuple(hidden.shape)}; got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}]; got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name} must be {hidden.dtype}, as hidden; got {x.dtype}")
    return rows_of(hidden, targets, mask, name="hidden", **transform), weight, bias


class FromHidden:
    """Rows of hidden states (`rows.logits`) that become logits chunk by chunk."""

    fuses_group_advantages = False  # a chunk's rows have no neighbours

    def __init__(
        self, rows: Rows, weight: Tensor, bias: Tensor | None, layout: Layout, chunk_rows: int | None, validate: bool,
        backend: str,
    ) -> None:  # fmt: skip
        self.rows, self.layout, self.backend = rows, layout, backend
        self._weight, self._bias, self._chunk_rows, self._validate = weight, bias, chunk_rows, validate

    @property
    def wants_grad(self) -> bool:
        inputs = (self.rows.logits, self._weight, self._bias)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    def fused(self, inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        chunk = chunk_rows_for(self._weight, self._chunk_rows, self.rows.targets.numel(), gradient=True)
        outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = LinearSinglePass.apply(
            self.rows.logits, self._weight, self._bias, self.layout.cu_seqlens, chunk, self._validate, self.backend,
            *self.rows[1:], *inputs,
        )  # fmt: skip
        return outputs

    def logps(self) -> tuple[Tensor, Tensor, Tensor]:
        return _logps(self.rows, self._weight, self._bias, self._chunk_rows, False, self._validate, self.backend)


def _logps(
    rows: Rows, weight: Tensor, bias: Tensor | None, chunk_rows: int | None, sum_p2: bool, validate: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    chunk = chunk_rows_for(weight, chunk_rows, rows.targets.numel(), torch.is_grad_enabled())
    if differentiable(backend):
        rows = rows._replace(targets=ops.legal_targets(rows, weight.shape[0], validate))
        hidden = torch.where(rows.active[..., None], rows.logits[:, : rows.targets.shape[1]], 0.0)
        return reference.token_logps(torch.nn.functional.linear(hidden, weight, bias), rows)
    outputs: tuple[Tensor, Tensor, Tensor] = LinearLogps.apply(
        rows.logits, weight, bias, chunk, sum_p2, validate, backend, *rows[1:]
    )
    return outputs


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    validate: bool = False,
    return_entropy: bool = False,
    return_sum_p2: bool = False,
    chunk_rows: int | None = None,
    tp_group: object = None,
    backend: str = "auto",
) -> TokenLogps:
    """``token_logps`` of ``hidden @ weight.T + bias``, chunk by chunk; masked rows are never computed.

    Differentiable in ``hidden``, ``weight`` and ``bias``; a frozen one costs no matmul. The backward computes the
    logits again (8 N H V operations in all). On a GPU, forward and backward each synchronise to learn the number of
    active rows. What TRL's ``ChunkedLogProbFunction`` and verl's ``FusedLinearForPPO`` do.

    Args:
        hidden: ``[..., H]``, last hidden states; one position more than the targets is allowed, the last is ignored.
        weight: ``[V, H]`` of the lm_head, same dtype (under autocast both are cast).
        targets: ``[...]`` integer token ids.
        bias: ``[V]`` or None.
        chunk_rows: rows of logits held at a time; None: as many as fit 128 MiB (1 GiB on a GPU), or
            all where that takes less memory than two chunks.
        mask, temperature, logit_scale, softcap, ignore_index, validate, return_entropy, return_sum_p2, backend: as in
            ``token_logps``.

    Returns:
        TokenLogps(logps, entropy, sum_p2), each of the targets' shape.

    Raises:
        ValueError, TypeError: as ``token_logps``; for a weight or bias that does not fit hidden.
    """
    unsupported_group("tp_group", tp_group)
    _check_head(hidden, weight, bias, targets)
    backend = resolve(backend, hidden.device, hidden.dtype)
    rows, weight, bias = _prepared(
        hidden, weight, bias, targets, mask, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        ignore_index=ignore_index,
    )  # fmt: skip
    outputs = _logps(rows, weight, bias, chunk_rows, return_sum_p2, validate, backend)
    return shaped(outputs, targets.shape, return_entropy, return_sum_p2)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    advantage_eps: float = 1e-4,
    advantage_scale: str = "group",
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    sequence_weights: Tensor | None = None,
    return_entropy: bool = False,
    cu_seqlens: Tensor | None = None,
    denominator: Tensor | float | None = None,
    scale: float | Tensor = 1.0,
    config: LossConfig | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    validate: bool = False,
    single_pass: bool = True,
    tp_group: object = None,
    cp_group: object = None,
    backend: str = "auto",
) -> LossOutput:
    """``grpo_loss`` of ``hidden @ weight.T + bias``, never holding the logits.

    With a token-level ratio the forward already computes the gradients of hidden, weight and bias, chunk by chunk:
    three matmuls (6 N H V operations, 4 N H V with a frozen head) where recomputing the logits takes four. Masked rows
    are never computed, so on a GPU the forward synchronises for their number. Losses that need more than the token (see
    ``grpo_loss``) and ``single_pass=False`` recompute, and synchronise again in the backward.

    Args:
        hidden, weight, bias, chunk_rows: as in ``linear_token_logps``.
        targets, advantages, mask and all others: as in ``grpo_loss``.

    Returns:
        LossOutput.

    Raises:
        ValueError, TypeError: as ``linear_token_logps`` and ``grpo_loss``.
    """
    unsupported_group("tp_group", tp_group)
    unsupported_group("cp_group", cp_group)
    _check_head(hidden, weight, bias, targets)
    backend = resolve(backend, hidden.device, hidden.dtype)
    layout = layout_of(targets.shape, cu_seqlens, targets.device)
    rows, weight, bias = _prepared(
        hidden, weight, bias, targets, mask, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        ignore_index=ignore_index, layout=layout,
    )  # fmt: skip
    given = LossArguments(
        old_logps, ref_logps, rollout_logps, token_weights, entropy_mask, sequence_weights, denominator, scale
    )
    return loss_from_rows(
        FromHidden(rows, weight, bias, layout, chunk_rows, validate, backend), advantages,
        Rewards(rewards, group_size, advantage_eps, advantage_scale), given, config or DEFAULT,
        single_pass=single_pass, return_entropy=return_entropy,
    )  # fmt: skip


class LinearGRPOLoss(ConfiguredLoss):
    """A ``LossConfig`` as a module: ``LinearGRPOLoss(config)(hidden, weight, ...)`` is ``linear_grpo_loss``."""

    loss = staticmethod(linear_grpo_loss)
