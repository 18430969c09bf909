"""Log-probabilities of chosen tokens, with entropy, differentiable in the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import differentiable, resolve
from ..inputs.check import check_tensor
from ..inputs.layout import Rows, check_logits, check_rows_apart, rows_of
from ..ops import loss as ops
from ..ops.library import apply, first_order, none_for_unused_outputs
from ..reference import loss as reference

CONSUMED_ERROR = (
    "the logits of this loss were overwritten by their gradient (inplace): it can be propagated once. "
    "Drop retain_graph, or pass inplace=False"
)


N_ROWS = len(Rows._fields) - 1  # of Rows, all but the logits: arguments without a gradient


class TokenLogps(NamedTuple):
    """Per token, of the targets' shape; float32 (float64 for float64 logits); 0 at masked tokens."""

    logps: Tensor
    entropy: Tensor | None
    sum_p2: Tensor | None


def check_inplace(logits: Tensor) -> None:
    """Checks [B, T', V] logits that are to be overwritten by their gradient."""
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad and torch.is_grad_enabled():
        raise ValueError("inplace overwrites the logits, and these are a leaf that requires grad; pass inplace=False")
    if not torch.compiler.is_compiling():  # a graph's operators look at the strides of each call
        check_rows_apart(logits)


class RowLogps(torch.autograd.Function):
    """Forward: one sweep, 2 bytes a bf16 logit. Backward: one more sweep that writes the gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, sum_p2: bool, validate: bool, inplace: bool, backend: str, *rows: Any
    ) -> tuple[Tensor, ...]:
        *stats, squares = ops.row_forward(logits, *rows, sum_p2, validate, backend)
        ctx.save_for_backward(logits, *rows[:2], rows[3], *stats)
        ctx.transform, ctx.inplace, ctx.backend, ctx.consumed = (rows[2], *rows[4:]), inplace, backend, False
        ctx.mark_non_differentiable(squares)
        none_for_unused_outputs(ctx)
        return (*stats[:2], squares)

    @staticmethod
    @first_order
    def backward(ctx: Any, g_logps: Tensor | None, g_entropy: Tensor | None, _: Any) -> tuple:
        if ctx.consumed:
            raise RuntimeError(CONSUMED_ERROR)
        if g_logps is None and g_entropy is None:
            return (None,) * (5 + N_ROWS)
        logits, targets, active, temperatures, *stats = ctx.saved_tensors
        temperature, logit_scale, softcap = ctx.transform
        g_logps = torch.zeros_like(stats[0]) if g_logps is None else g_logps
        rows = (targets, active, temperature, temperatures, logit_scale, softcap)
        args = (logits, *rows, *stats, g_logps, g_entropy, ctx.backend)
        if not ctx.inplace:
            return ops.row_backward(*args), *[None] * (4 + N_ROWS)
        ops.row_backward_(*args)
        ctx.consumed = True
        return logits.detach(), *[None] * (4 + N_ROWS)


def row_logps(
    rows: Rows, *, sum_p2: bool, validate: bool, inplace_backward: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and (maybe empty) sum p^2, [B, T]; differentiable in `rows.logits` but for the last."""
    if differentiable(backend):
        rows = rows._replace(targets=ops.legal_targets(rows, rows.logits.shape[-1], validate))
        return reference.token_logps(rows.logits, rows)
    if inplace_backward:
        check_inplace(rows.logits)
    outputs: tuple[Tensor, Tensor, Tensor] = apply(
        "token_logps and grpo_loss", RowLogps, rows.logits, sum_p2, validate, inplace_backward, backend, *rows[1:]
    )
    return outputs


def unsupported_group(name: str, group: object) -> None:
    if group is not None:
        raise NotImplementedError(f"{name} is not supported yet: gather the tensors, or pass None")


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    validate: bool = False,
    return_entropy: bool = False,
    return_sum_p2: bool = False,
    inplace_backward: bool = False,
    tp_group: object = None,
    backend: str = "auto",
) -> TokenLogps:
    """Log-probability of each target under ``softmax(softcap(logit_scale * logits) / temperature)``.

    ``logp = z_y - log sum_j exp z_j``, ``entropy = -sum_j p_j log p_j``, ``softcap(v) = c tanh(v / c)`` (Gemma).
    What TRL calls ``selective_log_softmax``, verl ``logprobs_from_logits``.

    Args:
        logits: ``[..., V]`` float32, bfloat16, float16 or float64, dense in V, any other strides. One position more
            than the targets (``[B, T + 1, V]`` against ``[B, T]``) is allowed: the last is ignored, its gradient 0.
        targets: ``[...]`` integer token ids.
        mask: ``[...]`` of any dtype, 0 masks a token: nothing of it is read and its results are 0.
        temperature: above 0; a number, or a tensor per row ``[B]`` or per token, which is copied to the logits' device
            if it is on another, which synchronises.
        logit_scale: multiplies the logits (Cohere; 1 / logits_scaling for Granite).
        softcap: the cap ``c``, or None.
        ignore_index: a target of this value counts as masked.
        validate: raise for an illegal target on an accelerator too, at the price of a synchronisation.
        return_entropy, return_sum_p2: fill the fields of that name; entropy is differentiable, ``sum_j p_j^2`` is not.
        inplace_backward: the backward overwrites the logits with their gradient instead of allocating one.
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        TokenLogps(logps, entropy, sum_p2), each ``[...]``, float32 (float64 for float64 logits), natural logarithms.

    Raises:
        ValueError: for shapes, strides or numbers that do not fit; for a target outside the vocabulary that is not
            masked (on the CPU, or with ``validate``; elsewhere its log-prob is NaN); for ``inplace_backward`` on a
            leaf, or on rows that overlap in memory (``expand``).
        TypeError: for dtypes that do not fit.
    """
    unsupported_group("tp_group", tp_group)
    check_logits(logits)
    check_tensor("targets", targets, device=logits.device, kind="integer")
    backend = resolve(backend, logits.device, logits.dtype)
    rows = rows_of(
        logits, targets, mask, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        ignore_index=ignore_index,
    )  # fmt: skip
    outputs = row_logps(
        rows, sum_p2=return_sum_p2, validate=validate, inplace_backward=inplace_backward, backend=backend
    )
    return shaped(outputs, targets.shape, return_entropy, return_sum_p2)


def shaped(outputs: tuple[Tensor, Tensor, Tensor], shape: torch.Size, entropy: bool, sum_p2: bool) -> TokenLogps:
    logps, h, squares = outputs
    return TokenLogps(
        logps.view(shape), h.view(shape) if entropy else None, squares.detach().view(shape) if sum_p2 else None
    )
