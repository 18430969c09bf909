"""The peak of a loss step by formula, for shapes that do not fit: bytes of every large tensor at every moment.

A loss step begins with the last hidden states [N, H] and the lm_head's weight [V, H], which are there already and do
not count, and ends with the loss and the gradients of both. What is alive is written down moment by moment below, each
with its reason; the peak is the largest moment. Tensors of a few bytes a token are left out: they are less than a
thousandth of a row of logits. Every formula is held to the measurement within 2 % (``python_tests/test_profiling.py``).
The scratch memory of a BLAS is the processor's own and is not predicted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..linear_loops import CHUNK_BYTES, WIDENED_COLUMNS
from .profile import Holding

_TRL_TILE = (4096, 8192)  # tokens, columns: trl 1.16, kernels/chunked_logprob.py and trainer/utils.py
_LIGER_TILE = (2048, 4096)  # tokens, columns: liger-kernel 0.8.5, chunked_loss/fused_linear_ppo.py


@dataclass(frozen=True)
class LossShape:
    """A batch, a vocabulary, a hidden size; `fill`: the share of tokens that the mask keeps."""

    sequences: int
    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype = torch.bfloat16
    fill: float = 1.0
    chunk_rows: int | None = None  # of our linear path; None: its own choice
    device: str = "cpu"  # where operators differ

    def __post_init__(self) -> None:
        for name in ("sequences", "tokens", "vocab", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"predictions are for bfloat16 and float32; got {self.dtype}")
        if not 0 < self.fill <= 1:
            raise ValueError(f"fill must be above 0 and at most 1; got {self.fill}")

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens

    @property
    def active_rows(self) -> int:
        return round(self.fill * self.rows)

    @property
    def half(self) -> bool:
        return self.dtype.itemsize == 2

    @property
    def logits(self) -> int:
        """Bytes of all logits in the model's dtype; `logits32`: in float32."""
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def logits32(self) -> int:
        return self.rows * self.vocab * 4

    @property
    def head(self) -> int:
        """Bytes of lm_head, so of its gradient; `head32`: in float32."""
        return self.vocab * self.hidden * self.dtype.itemsize

    @property
    def head32(self) -> int:
        return self.vocab * self.hidden * 4

    @property
    def hidden_states(self) -> int:
        return self.rows * self.hidden * self.dtype.itemsize

    @property
    def hidden32(self) -> int:
        return self.rows * self.hidden * 4

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": self.rows, "V": self.vocab, "H": self.hidden}


class Moment(NamedTuple):
    """What is alive at one moment of the step."""

    name: str
    holds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.holds.values())


@dataclass(frozen=True)
class Prediction:
    provider: str
    moments: tuple[Moment, ...]

    @property
    def peak_moment(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        return self.peak_moment.total

    @property
    def at_peak(self) -> list[Holding]:
        held = [Holding(*pair) for pair in self.peak_moment.holds.items() if pair[1]]
        return sorted(held, key=lambda h: -h.nbytes)


def predict(provider: str, shape: LossShape) -> Prediction:
    """The moments of a loss step of `provider`.

    Raises:
        ValueError: for a provider without a formula.
    """
    if provider not in FORMULAS:
        raise ValueError(f"there is a formula for {', '.join(map(repr, FORMULAS))}; got {provider!r}")
    return Prediction(provider, tuple(FORMULAS[provider](shape)))


# ---- the formulas ----


def _gradients(s: LossShape, logits_gradient: int) -> Moment:
    """The end of every path that holds logits: two matmuls read their gradient and write hidden's and lm_head's."""
    holds = {
        "gradient of logits": logits_gradient,
        "gradient of lm_head": s.head,
        "gradient of hidden": s.hidden_states,
    }
    return Moment("backward of lm_head", holds)


def eager(s: LossShape) -> list[Moment]:
    # log_softmax in float32 copies half-precision logits first, and keeps its output alone for the backward;
    # gather's backward makes a zero matrix to scatter into, and log_softmax's backward writes a third.
    copied = s.logits32 if s.half else 0
    lsm = {"log-softmax, fp32": s.logits32}
    scattered = {**lsm, "gradient of log-softmax, fp32": s.logits32}
    # the gradient is cast back to the model's dtype once the other two are gone
    cast = {"gradient of logits, fp32": s.logits32, "gradient of logits": s.logits if s.half else 0}
    return [
        Moment("lm_head", {"logits": s.logits}),
        Moment("log-softmax", {"logits": s.logits, "copy of logits, fp32": copied, **lsm}),
        Moment("backward of gather", scattered),
        Moment("backward of log-softmax", {**scattered, "gradient of logits, fp32": s.logits32}),
        Moment("cast of the gradient", cast),
        _gradients(s, s.logits),
    ]


def row_by_row(s: LossShape) -> list[Moment]:
    # TRL's selective_log_softmax and verl's logprobs_from_logits_v2 go sequence by sequence.
    one = s.logits // s.sequences
    every = {"logits": s.logits}
    if s.half:
        # log-softmax in half precision, kept of every sequence; a sequence's backward scatters into a matrix, on the
        # CPU through a float32 one; all sequences' gradients are stacked at the end.
        scatter = 3 * one if s.device == "cpu" else one
        return [
            Moment("lm_head", every),
            Moment("log-softmax of the last sequence", {**every, "log-softmax": s.logits}),
            Moment("backward of gather", {"log-softmax, gradients": s.logits, "gradient of log-softmax": scatter}),
            Moment("gradients stacked", {"gradient of logits": s.logits, "gradient of logits, by sequence": s.logits}),
            _gradients(s, s.logits),
        ]
    # logsumexp keeps the logits; its backward makes exp(z - lse) of each sequence, stacked at the end; then gather's
    # backward scatters into a matrix of its own, and the two gradients are added.
    return [
        Moment("lm_head", every),
        Moment("logsumexp of a sequence", {**every, "exponentials": one}),
        Moment("gradients stacked", {**every, "gradient of logits": s.logits, "by sequence": s.logits}),
        Moment("gradients added", {**every, "gradient of logits": s.logits, "gradient of gather": s.logits}),
        _gradients(s, s.logits),
    ]


def trl_chunked(s: LossShape) -> list[Moment]:
    # Gradients are summed in float32 and rounded at the end; a tile of logits at a time.
    tokens, columns = min(s.rows, _TRL_TILE[0]), min(s.vocab, _TRL_TILE[1])
    tile32 = tokens * columns * 4
    sums = {"gradient of lm_head, fp32": s.head32, "gradient of hidden, fp32": s.hidden32}
    tile = {"tile of logits": tokens * columns * s.dtype.itemsize}
    if s.device == "cpu":  # no Triton: the tile is folded by torch operators, seven float32 tiles and a bool one
        tile["temporaries of a tile, fp32"] = 7 * tile32 + tile32 // 4
    rounded = {"gradient of lm_head": s.head, "gradient of hidden": s.hidden_states} if s.half else {}
    return [
        Moment("backward of a tile", {**sums, **tile}),
        Moment("gradients rounded", {**sums, **rounded, "tile of logits": tile["tile of logits"]}),
    ]


def liger_linear(s: LossShape) -> list[Moment]:
    # A sequence at a time (chunk_size=1). The sum of lm_head's gradient is in the model's dtype; a sequence's own is
    # summed in float32 over tiles and rounded before it is added.
    tokens, columns = min(s.tokens, _LIGER_TILE[0]), min(s.vocab, _LIGER_TILE[1])
    total = {"gradient of lm_head, sum": s.head, "gradient of hidden": s.hidden_states}
    sequence = {"gradient of lm_head, fp32": s.head32, "gradient of hidden, fp32": s.hidden32 // s.sequences}
    # logits, their exponentials and gradient, and those of the tile before, which Python still names
    tiles = {"temporaries of a tile, fp32": 5 * tokens * columns * 4}
    rounded = {"gradient of lm_head": s.head} if s.half else {}
    return [
        Moment("backward of a tile", {**total, **sequence, **tiles}),
        Moment("gradient rounded", {**total, **sequence, **rounded}),
    ]


def ours_in_place(s: LossShape) -> list[Moment]:
    # The forward writes the gradient over the logits.
    return [Moment("lm_head and loss", {"logits": s.logits}), _gradients(s, s.logits)]


def ours_out_of_place(s: LossShape) -> list[Moment]:
    # The caller still has the logits when the forward writes their gradient; the backward has the gradient alone.
    return [
        Moment("lm_head", {"logits": s.logits}),
        Moment("loss", {"logits": s.logits, "gradient of logits": s.logits}),
        _gradients(s, s.logits),
    ]


def ours_linear(s: LossShape) -> list[Moment]:
    # Active rows only. Several chunks sum lm_head's gradient in float32 and round it at the end, when the buffer of
    # the chunk is still there; a single chunk writes it at once.
    limit = s.chunk_rows or max(1, CHUNK_BYTES // (s.vocab * s.dtype.itemsize))
    chunks = -(-s.active_rows // limit)
    rows = -(-s.active_rows // chunks)
    chunk = {"chunk of logits": rows * s.vocab * s.dtype.itemsize, "gradient of hidden": s.hidden_states}
    gathered = {"hidden of a chunk": rows * s.hidden * s.dtype.itemsize}
    if chunks == 1:
        return [Moment("the only chunk", {**chunk, **gathered, "gradient of lm_head": s.head})]
    sums = {"gradient of lm_head, fp32": s.head32}
    widened = (rows * (min(WIDENED_COLUMNS, s.vocab) + s.hidden) * 4) if s.half else 0
    return [
        Moment("a chunk", {**sums, **chunk, **gathered, "columns widened to fp32": widened}),
        Moment("gradient rounded", {**sums, **chunk, **gathered, "gradient of lm_head": s.head if s.half else 0}),
    ]


FORMULAS: dict[str, Callable[[LossShape], list[Moment]]] = {
    "eager": eager,
    "trl selective": row_by_row,
    "trl chunked": trl_chunked,
    "verl": row_by_row,
    "liger linear": liger_linear,
    "ours in place": ours_in_place,
    "ours out of place": ours_out_of_place,
    "ours linear": ours_linear,
}


# ---- the largest batch ----


def largest_batch(provider: str, shape: LossShape, budget: int, *, beside: int = 0) -> int:
    """The most sequences like `shape`'s whose loss step fits into `budget` bytes, 0 if not even one does.

    Args:
        budget: bytes in all.
        beside: bytes a sequence that are there beside the loss step, such as the hidden states [T, H] themselves.
    """

    @functools.cache
    def fits(sequences: int) -> bool:
        changed = LossShape(**{**vars(shape), "sequences": sequences})
        return predict(provider, changed).peak + sequences * beside <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:  # fits(low), not fits(high)
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
