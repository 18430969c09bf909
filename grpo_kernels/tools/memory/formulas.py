"""Bytes of every large tensor at every moment of a loss step, by provider, each with its reason.

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

_TRL_TILE = (4096, 32768)  # tokens, columns: trl 1.16, kernels/chunked_logprob.py and trainer/utils.py
_LIGER_TILE = (2048, 4096)  # tokens, columns: liger-kernel 0.8.5, chunked_loss/fused_linear_ppo.py
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


def compiled(s: LossShape) -> list[Moment]:
    # Inductor keeps the logits and a few numbers a row, and recomputes: the gradient in float32, then rounded.
    rounded = {"gradient of logits, fp32": s.logits32, "gradient of logits": s.logits}
    return [Moment("backward", rounded)]


def row_by_row(s: LossShape) -> list[Moment]:
    # TRL's selective_log_softmax and verl's logprobs_from_logits_v2 go sequence by sequence.
    one = s.logits // s.sequences
    stacked = {"gradient of logits": s.logits, "gradient of logits, by sequence": s.logits}
    if s.half:
        # log-softmax in half precision, kept of every sequence; a sequence's backward scatters into a float32 matrix
        # and rounds it; all sequences' gradients are stacked at the end.
        return [
            Moment("log-softmax of the last sequence", {"log-softmax": s.logits}),
            Moment("backward of gather", {"log-softmax": s.logits, "gradient of log-softmax": 3 * one}),
            Moment("gradients stacked", stacked),
        ]
    # logsumexp keeps the logits; its backward makes z - lse, the exponential and its product with the gradient of each
    # sequence, stacked at the end; then gather's backward scatters into a matrix, and the two gradients are added.
    return [
        Moment("backward of the last logsumexp", {"gradients before": s.logits - one, "of this sequence": 3 * one}),
        Moment("gradients stacked", stacked),
        Moment("gradients added", {"gradient through logsumexp": s.logits, "gradient through gather": s.logits}),
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
        _lm_head_gradients(s),
    ]


def compiled_linear(s: LossShape) -> list[Moment]:
    # As from logits, which are kept from the matmul to the end of their gradient, written over them.
    held = {"logits, then their gradient": s.logits}
    return [Moment("backward", {**held, "gradient of logits, fp32": s.logits32}), _lm_head_gradients(s)]


def cce_compiled(s: LossShape) -> list[Moment]:
    # Its torch_compile: log-softmax and its gradient never reach memory in float32.
    return [Moment("lm_head", {"logits": s.logits}), _lm_head_gradients(s)]


def _lm_head_gradients(s: LossShape) -> Moment:
    """The end of every path that holds all logits: two matmuls read their gradient."""
    holds = {"gradient of logits": s.logits, "gradient of lm_head": s.head, "gradient of hidden": s.hidden_states}
    return Moment("backward of lm_head", holds)


def trl_chunked(s: LossShape) -> list[Moment]:
    # Gradients are summed in float32 and rounded at the end; a tile of logits at a time.
    tokens, columns = min(s.rows, _TRL_TILE[0]), min(s.vocab, _TRL_TILE[1])
    tile32 = tokens * columns * 4
    sums = {"gradient of lm_head, fp32": s.head32, "gradient of hidden, fp32": s.hidden32}
    tile = {"tile of logits": tokens * columns * s.dtype.itemsize}
    folded: dict[str, int] = {}
    if s.on_cpu:  # no Triton: the tile is folded by torch operators, seven float32 tiles and a bool one
        folded["temporaries of a tile, fp32"] = 7 * tile32 + tile32 // 4
    rounded = {"gradient of lm_head": s.head, "gradient of hidden": s.hidden_states} if s.half else {}
    return [
        Moment("backward of a tile", {**sums, **tile, **folded}),
        Moment("gradients rounded", {**sums, **rounded, **tile}),
    ]


def liger_linear(s: LossShape) -> list[Moment]:
    # A sequence at a time (chunk_size=1). The sum of lm_head's gradient is in the model's dtype; a sequence's own is
    # summed in float32 over tiles and rounded before it is added.
    tokens, columns = min(s.tokens, _LIGER_TILE[0]), min(s.vocab, _LIGER_TILE[1])
    total = {"gradient of lm_head, sum": s.head, "gradient of hidden": s.hidden_states}
    sequence = {"gradient of lm_head, fp32": s.head32, "gradient of hidden, fp32": s.hidden32 // s.sequences}
    # of logits, their differences and exponentials, and what Python still names of the tile before: of 8193 columns on
    tiles = {"temporaries of a tile, fp32": 5 * tokens * columns * 4}
    # logits, probabilities and gradient, and what the tile adds to the gradient of lm_head
    widened = tokens * s.hidden * 4 if s.half else 0
    product = {"tile, fp32": 3 * tokens * columns * 4, "its matmul, fp32": columns * s.hidden * 4 + widened}
    rounded = {"gradient of lm_head": s.head} if s.half else {}
    return [
        Moment("exponentials of a tile", {**total, **sequence, **tiles}),
        Moment("gradient of a tile", {**total, **sequence, **product}),
        Moment("gradient rounded", {**total, **sequence, **rounded}),
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
    ("logits", "compile"): compiled,
    ("logits", "trl"): row_by_row,
    ("logits", "verl"): row_by_row,
    ("logits", "ours"): ours_in_place,
    ("logits", "ours-out-of-place"): ours_out_of_place,
    ("logits", "ours-two-pass"): ours_two_pass,
    ("linear", "eager"): eager_linear,
    ("linear", "compile"): compiled_linear,
    ("linear", "trl"): trl_chunked,
    ("linear", "liger"): liger_linear,
    ("linear", "cce"): cce_compiled,
    ("linear", "ours"): ours_linear,
    ("linear", "ours-two-pass"): ours_linear,
}

# On a GPU they run Triton kernels of their own, which nobody has measured here.
CPU_ONLY = frozenset({("logits", "trl"), ("logits", "verl"), ("linear", "cce")})
