"""Bytes of every large tensor at every moment of a loss step, ours and eager PyTorch's, each with its reason.

The other providers are measured only: what they allocate changes with their versions, and with torch.compile's.

"linear": the step begins with the last hidden states [N, H] and the lm_head's weight [V, H], which are there already
and do not count, and ends with the loss and the gradients of both. "logits": it begins with the logits, which do not
count either, and ends with the loss and their gradient. What is a few bytes a token is left out where anything is as
large as a row of logits. The scratch memory of a BLAS is the processor's own and is not predicted. Every formula is
held to the measurement within 2 % (``python_tests/tools/test_predictions.py``).
"""

from __future__ import annotations

from collections.abc import Callable

from ...config import METRICS
from ...ops.linear_chunks import WIDENED_COLUMNS, default_chunk_rows
from .shape import LossShape, Moment

_METRICS = 4 * (len(METRICS) + 3)  # with the loss, its gradient and the denominator


# ---- from logits ----


def eager_logits(s: LossShape) -> list[Moment]:
    # log_softmax in float32 copies half-precision logits first, and keeps its output alone for the backward; gather's
    # backward makes a zero matrix to scatter into, and log_softmax's backward writes a third. The last is cast back to
    # the logits' dtype once the other two are gone.
    copied = {"copy of logits, fp32": s.logits32} if s.half else {}
    lsm = {"log-softmax, fp32": s.logits32}
    scattered = {**lsm, "gradient of log-softmax, fp32": s.logits32}
    written = {"gradient of logits, fp32": s.logits32}
    return [
        Moment("log-softmax", {**copied, **lsm}),
        Moment("backward of gather", scattered),
        Moment("backward of log-softmax", {**scattered, **written}),
        Moment("gradient cast", {**written, "gradient of logits": s.logits if s.half else 0}),
    ]


def ours_in_place(s: LossShape) -> list[Moment]:
    # The gradient is written over the logits. Five floats a token: log-prob, entropy, log-sum-exp, the token's loss
    # and its derivative; and the mask.
    return [Moment("loss", {"per token": 21 * s.rows + _METRICS})]


def ours_out_of_place(s: LossShape) -> list[Moment]:
    return [Moment("loss", {"gradient of logits": s.logits, "per token": 21 * s.rows + _METRICS})]


def ours_two_pass(s: LossShape) -> list[Moment]:
    # In place as well; four floats a token of the rows, two of the loss, and two of its backward.
    return [Moment("backward", {"per token": 33 * s.rows + _METRICS})]


# ---- from hidden states ----


def eager_linear(s: LossShape) -> list[Moment]:
    # The matmul does not save its output, so the logits go when log-softmax has read them.
    _, _, *backward = eager_logits(s)
    first = {"logits": s.logits, "log-softmax, fp32": s.logits32}
    return [
        Moment("lm_head", {"logits": s.logits}),
        Moment("log-softmax", {**first, "copy of logits, fp32": s.logits32 if s.half else 0}),
        *backward,
        # Two matmuls read the gradient of all logits.
        Moment(
            "backward of lm_head",
            {"gradient of logits": s.logits, "gradient of lm_head": s.head, "gradient of hidden": s.hidden_states},
        ),
    ]


def chunks_of(s: LossShape) -> tuple[int, int]:
    """How many chunks our linear path makes of the active rows, and the rows of the largest."""
    limit = s.chunk_rows or default_chunk_rows(s.vocab, s.hidden, s.dtype, not s.on_cpu, s.rows, weight_gradient=True)
    chunks = -(-s.active_rows // limit)
    return chunks, -(-s.active_rows // chunks)


def ours_linear(s: LossShape) -> list[Moment]:
    # Active rows only. Several chunks sum lm_head's gradient in float32 and round it at the end, when their buffer has
    # gone; a single chunk writes it at once.
    chunks, rows = chunks_of(s)
    rest = {"gradient of hidden": s.hidden_states, "hidden of a chunk": rows * s.hidden * s.dtype.itemsize}
    chunk = {"chunk of logits, then their gradient": rows * s.vocab * s.dtype.itemsize, **rest}
    if chunks == 1:
        return [Moment("the only chunk", {**chunk, "gradient of lm_head": s.head})]
    sums = {"gradient of lm_head, fp32": s.head32}
    columns = min(WIDENED_COLUMNS, s.vocab)  # widened at a time, on a CPU
    widened = rows * (columns + s.hidden) * 4 if s.half and s.on_cpu else 0
    return [
        Moment("a chunk", {**sums, **chunk, "columns widened to fp32": widened}),
        Moment("gradient rounded", {**sums, **rest, "gradient of lm_head": s.head if s.half else 0}),
    ]


FORMULAS: dict[tuple[str, str], Callable[[LossShape], list[Moment]]] = {
    ("logits", "eager"): eager_logits,
    ("logits", "ours"): ours_in_place,
    ("logits", "ours-out-of-place"): ours_out_of_place,
    ("logits", "ours-two-pass"): ours_two_pass,
    ("linear", "eager"): eager_linear,
    ("linear", "ours"): ours_linear,
    ("linear", "ours-two-pass"): ours_linear,
}
