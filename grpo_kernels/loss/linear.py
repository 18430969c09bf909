"""Log-probs and losses from hidden states and the lm_head, never holding the [N, V] logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import differentiable, resolve
from ..config import DEFAULT, LossConfig
from ..inputs.check import check_number, check_tensor
from ..inputs.layout import Head, Layout, PolicyInputs, Rows, check_logits, layout_of, rows_of
from ..ops import loss as ops
from ..ops.library import apply, first_order, none_for_unused_outputs
from ..ops.linear_chunks import Extras, Needs, chunk_rows_for, is_top1, mean_logits
from ..reference import loss as reference
from .grpo import ConfiguredLoss, Rewards, loss_from_rows, scale_gradient
from .logps import N_ROWS, shaped, unsupported_group
from .policy import N_INPUTS, LossArguments, LossOutput

N_HEAD, N_GRADIENTS = len(Head._fields), len(Needs._fields)
_PARAMETERS = ("weight", "bias", "lora[0]", "lora[1]")  # a head's, as the caller knows them
Lora = tuple[Tensor, Tensor, float]


class LinearTokenLogps(NamedTuple):
    """Per token, of the targets' shape, as in TokenLogps; None unless asked for, but for the first."""

    logps: Tensor
    entropy: Tensor | None
    sum_p2: Tensor | None
    is_top1: Tensor | None  # bool; whether no token is likelier than the target, nor as likely and before it
    mean_logits: Tensor | None  # over the vocabulary, of what the softmax is taken of


def _given(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """None for what needs no gradient; and for lora_scale."""
    return [*(g if need else None for g, need in zip(gradients, needs, strict=True)), None]


class LinearLogps(torch.autograd.Function):
    """Forward and backward each compute the logits chunk by chunk; only the rows' statistics are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        head, (chunk_rows, extras, validate, backend, *rows) = Head(*rest[:N_HEAD]), rest[N_HEAD:]
        *stats, squares, top1, mean = ops.linear_forward(hidden, *rows, *head, chunk_rows, extras, validate, backend)
        ctx.save_for_backward(hidden, *head.parameters, *rows[:2], rows[3], *stats)
        ctx.transform, ctx.lora_scale = (rows[2], *rows[4:]), head.lora_scale
        ctx.chunk_rows, ctx.backend, ctx.arguments = chunk_rows, backend, 1 + len(rest)
        ctx.mark_non_differentiable(squares, top1, mean)
        none_for_unused_outputs(ctx)
        return (*stats[:2], squares, top1, mean)

    @staticmethod
    @first_order
    def backward(ctx: Any, g_logps: Tensor | None, g_entropy: Tensor | None, *_: Any) -> tuple:
        if g_logps is None and g_entropy is None:
            return (None,) * ctx.arguments
        hidden, weight, bias, lora_a, lora_b, targets, active, temperatures, *stats = ctx.saved_tensors
        temperature, logit_scale, softcap = ctx.transform
        needs = list(ctx.needs_input_grad[:N_GRADIENTS])
        rows = (targets, active, temperature, temperatures, logit_scale, softcap)
        head = Head(weight, bias, lora_a, lora_b, ctx.lora_scale)
        g_logps = torch.zeros_like(stats[0]) if g_logps is None else g_logps
        gradients = ops.linear_backward(
            hidden, *rows, *head, ctx.chunk_rows, needs, *stats, g_logps, g_entropy, ctx.backend
        )
        return *_given(gradients, needs), *[None] * (ctx.arguments - 1 - N_HEAD)


class LinearSinglePass(torch.autograd.Function):
    """Loss and the gradients of hidden states and head in the forward: three matmuls a chunk instead of four."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        head, (cu_seqlens, chunk_rows, validate, backend, *tokens) = Head(*rest[:N_HEAD]), rest[N_HEAD:]
        rows, inputs, needs = tokens[:N_ROWS], tokens[N_ROWS:], list(ctx.needs_input_grad[:N_GRADIENTS])
        *gradients, logps, entropy = ops.linear_policy(
            hidden, *rows, *head, chunk_rows, needs, *inputs, validate, backend
        )
        loss, per_token, _, _, metrics = ops.token_policy(logps, entropy, rows[1], cu_seqlens, *inputs, backend)
        ctx.save_for_backward(*gradients)
        ctx.inplace, ctx.backend = False, backend
        ctx.mark_non_differentiable(logps, entropy, per_token, metrics)
        none_for_unused_outputs(ctx)
        return loss, logps, entropy, per_token, metrics

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple:
        others = 4 + N_ROWS + N_INPUTS
        if g is None:
            return (None,) * (1 + N_HEAD + others)
        needs = ctx.needs_input_grad[:N_GRADIENTS]
        gradients = [scale_gradient(ctx, x, g) if need else x for x, need in zip(ctx.saved_tensors, needs, strict=True)]
        return *_given(gradients, needs), *[None] * others


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None, targets: Tensor) -> Head:
    """The caller's lm_head, of tensors that are where the hidden states are; their shapes are for `_prepared`."""
    check_logits(hidden, "hidden")
    if lora is None:
        head = Head(weight, bias)
    elif isinstance(lora, (tuple, list)) and len(lora) == 3:
        check_number("lora[2]", lora[2], lambda _: True, "a finite number, the scale")
        head = Head(weight, bias, lora[0], lora[1], float(lora[2]))
    else:
        raise TypeError(f"lora must be (A, B, scale) or None; got {type(lora).__name__}")
    for name, x in zip(_PARAMETERS, head.parameters, strict=True):
        if x is not None or name == "weight" or (lora is not None and name != "bias"):
            check_tensor(name, x, device=hidden.device, kind="float", differentiable=True)
    check_tensor("targets", targets, device=hidden.device, kind="integer")
    return head


def _prepared(hidden: Tensor, head: Head, targets: Tensor, mask: Tensor | None, **transform: Any) -> tuple[Rows, Head]:
    """Checked [B, T] rows and head, in autocast's dtype where it is on (as torch.nn.functional.linear)."""
    device, width = hidden.device.type, hidden.shape[-1] if hidden.dim() else None
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        cast = (None if x is None else x.to(dtype) for x in head.parameters)
        hidden, head = hidden.to(dtype), Head(*cast, lora_scale=head.lora_scale)  # type: ignore[arg-type, misc]
    if head.weight.dim() != 2 or head.weight.shape[1] != width:
        raise ValueError(
            f"weight must be [V, {width}] for hidden {tuple(hidden.shape)}; got {tuple(head.weight.shape)}"
        )
    vocab = head.weight.shape[0]
    if head.bias is not None and head.bias.shape != (vocab,):
        raise ValueError(f"bias must be [{vocab}]; got {tuple(head.bias.shape)}")
    if head.lora_a is not None and head.lora_b is not None:
        if head.lora_a.dim() != 2 or head.lora_a.shape[1] != width:
            raise ValueError(f"lora[0] must be A, [r, {width}]; got {tuple(head.lora_a.shape)}")
        if head.lora_b.shape != (vocab, head.lora_a.shape[0]):
            raise ValueError(f"lora[1] must be B, [{vocab}, {head.lora_a.shape[0]}]; got {tuple(head.lora_b.shape)}")
    for name, x in zip(_PARAMETERS, head.parameters, strict=True):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name} must be {hidden.dtype}, as hidden; got {x.dtype}")
    return rows_of(hidden, targets, mask, name="hidden", **transform), head


class FromHidden:
    """Rows of hidden states (`rows.logits`) that become logits chunk by chunk."""

    fuses_group_advantages = False  # a chunk's rows have no neighbours

    def __init__(
        self, rows: Rows, head: Head, layout: Layout, chunk_rows: int | None, validate: bool, backend: str
    ) -> None:
        self.rows, self.layout, self.backend = rows, layout, backend
        self._head, self._chunk_rows, self._validate = head, chunk_rows, validate

    @property
    def wants_grad(self) -> bool:
        inputs = (self.rows.logits, *self._head.parameters)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    def fused(self, inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        chunk = chunk_rows_for(self._head.weight, self._chunk_rows, self.rows.targets.numel(), gradient=True)
        outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = apply(
            "linear_grpo_loss", LinearSinglePass, self.rows.logits, *self._head, self.layout.cu_seqlens, chunk,
            self._validate, self.backend, *self.rows[1:], *inputs,
        )  # fmt: skip
        return outputs

    def logps(self) -> tuple[Tensor, Tensor, Tensor]:
        return _logps(self.rows, self._head, self._chunk_rows, Extras(), self._validate, self.backend)[:3]  # type: ignore[return-value]


def _logps(
    rows: Rows, head: Head, chunk_rows: int | None, extras: Extras, validate: bool, backend: str
) -> tuple[Tensor, ...]:
    """Log-probs, entropy, and what `extras` asks for; anything else is undefined."""
    chunk = chunk_rows_for(head.weight, chunk_rows, rows.targets.numel(), torch.is_grad_enabled())
    if not differentiable(backend):
        outputs: tuple[Tensor, ...] = apply(
            "linear_token_logps and linear_grpo_loss", LinearLogps, rows.logits, *head, chunk, list(extras), validate,
            backend, *rows[1:],
        )  # fmt: skip
        return outputs
    rows = rows._replace(targets=ops.legal_targets(rows, head.weight.shape[0], validate))
    hidden = torch.where(rows.active[..., None], rows.logits[:, : rows.targets.shape[1]], 0.0)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    if head.lora_a is not None and head.lora_b is not None:
        logits = logits + (head.lora_scale * (hidden @ head.lora_a.t())) @ head.lora_b.t()
    of_logits = rows._replace(logits=logits.detach())
    top1 = is_top1(of_logits) & rows.active if extras.is_top1 else rows.active
    mean = mean_logits(of_logits).masked_fill(~rows.active, 0) if extras.mean_logits else logits.new_empty(0)
    return *reference.token_logps(logits, rows), top1, mean


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
    return_is_top1: bool = False,
    return_mean_logits: bool = False,
    lora: tuple[Tensor, Tensor, float] | None = None,
    chunk_rows: int | None = None,
    tp_group: object = None,
    backend: str = "auto",
) -> LinearTokenLogps:
    """``token_logps`` of ``hidden @ weight.T + bias``, chunk by chunk; masked rows are never computed.

    Differentiable in ``hidden``, ``weight``, ``bias`` and LoRA's matrices; a frozen one costs no matmul. The backward
    computes the logits again (8 N H V operations in all). On a GPU, forward and backward each synchronise to learn the
    number of active rows. What TRL's ``ChunkedLogProbFunction`` and verl's ``FusedLinearForPPO`` do.

    Args:
        hidden: ``[..., H]``, last hidden states; one position more than the targets is allowed, the last is ignored.
        weight: ``[V, H]`` of the lm_head, same dtype (under autocast both are cast).
        targets: ``[...]`` integer token ids.
        bias: ``[V]`` or None.
        return_is_top1: fill ``is_top1``, a bool per token: the target has the largest logit, and is the first that
            does (``argmax``; the accuracy that SFT and DPO log).
        return_mean_logits: fill ``mean_logits``: the mean over the vocabulary of
            ``softcap(logit_scale * logits) / temperature``, which DPO and KTO log. Neither is differentiable; each
            reads the chunk of logits once more.
        lora: ``(A, B, scale)`` of a LoRA adapter on the lm_head: ``[r, H]``, ``[V, r]`` and a number
            (``lora_alpha / r``; PEFT's ``lora_A.weight``, ``lora_B.weight``, ``scaling``). The weight is then
            ``weight + scale * B @ A``, which is never formed. Dropout is not applied.
        chunk_rows: rows of logits held at a time; None: as many as fit 128 MiB (1 GiB on a GPU), or
            all where that takes less memory than two chunks.
        mask, temperature, logit_scale, softcap, ignore_index, validate, return_entropy, return_sum_p2, backend: as in
            ``token_logps``.

    Returns:
        LinearTokenLogps(logps, entropy, sum_p2, is_top1, mean_logits), each of the targets' shape.

    Raises:
        ValueError, TypeError: as ``token_logps``; for a weight, bias or LoRA matrix that does not fit hidden.
    """
    unsupported_group("tp_group", tp_group)
    head = _check_head(hidden, weight, bias, lora, targets)
    backend = resolve(backend, hidden.device, hidden.dtype)
    rows, head = _prepared(
        hidden, head, targets, mask, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        ignore_index=ignore_index,
    )  # fmt: skip
    extras = Extras(return_sum_p2, return_is_top1, return_mean_logits)
    logps, entropy, squares, top1, mean = _logps(rows, head, chunk_rows, extras, validate, backend)
    return LinearTokenLogps(
        *shaped((logps, entropy, squares), targets.shape, return_entropy, return_sum_p2),
        top1.view(targets.shape) if return_is_top1 else None,
        mean.view(targets.shape) if return_mean_logits else None,
    )


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
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

    With a token-level ratio the forward already computes the gradients of hidden states, head and LoRA, chunk by chunk:
    three matmuls (6 N H V operations, 4 N H V with a frozen head) where recomputing the logits takes four. Masked rows
    are never computed, so on a GPU the forward synchronises for their number. Losses that need more than the token (see
    ``grpo_loss``) and ``single_pass=False`` recompute, and synchronise again in the backward.

    Args:
        hidden, weight, bias, lora, chunk_rows: as in ``linear_token_logps``.
        targets, advantages, mask and all others: as in ``grpo_loss``.

    Returns:
        LossOutput.

    Raises:
        ValueError, TypeError: as ``linear_token_logps`` and ``grpo_loss``.
    """
    unsupported_group("tp_group", tp_group)
    unsupported_group("cp_group", cp_group)
    head = _check_head(hidden, weight, bias, lora, targets)
    backend = resolve(backend, hidden.device, hidden.dtype)
    layout = layout_of(targets.shape, cu_seqlens, targets.device)
    rows, head = _prepared(
        hidden, head, targets, mask, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        ignore_index=ignore_index, layout=layout,
    )  # fmt: skip
    given = LossArguments(
        old_logps, ref_logps, rollout_logps, token_weights, entropy_mask, sequence_weights, denominator, scale
    )
    return loss_from_rows(
        FromHidden(rows, head, layout, chunk_rows, validate, backend), advantages,
        Rewards(rewards, group_size, advantage_eps, advantage_scale), given, config or DEFAULT,
        single_pass=single_pass, return_entropy=return_entropy,
    )  # fmt: skip


class LinearGRPOLoss(ConfiguredLoss):
    """A ``LossConfig`` as a module: ``LinearGRPOLoss(config)(hidden, weight, ...)`` is ``linear_grpo_loss``."""

    loss = staticmethod(linear_grpo_loss)
