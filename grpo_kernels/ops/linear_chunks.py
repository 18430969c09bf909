"""Hidden states x lm_head in chunks of rows: matmul, row kernel in place, matmuls. Knows no backend and no loss.

Only active rows are computed: they are gathered first, so a masked row costs nothing and is not read. `rows.logits`
holds the hidden states, [B, T', H].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from ..inputs.layout import Head, PolicyInputs, Rows, RowStats, acc_dtype

CHUNK_BYTES = 128 << 20  # of logits at a time, unless chunk_rows says otherwise
# On a GPU each chunk adds its product to d weight in float32, 8 bytes of traffic an element: with 4096 rows of a 128k
# vocabulary a tenth of the matmuls' time, by the roofline of an H100 (not measured yet).
GPU_CHUNK_BYTES = 1 << 30
PER_TOKEN = PolicyInputs._fields[: PolicyInputs._fields.index("group_size")]
WIDENED_COLUMNS = 16384  # of a half-precision gradient in float32 at a time


def chunk_rows_for(weight: Tensor, chunk_rows: int | None, rows: int, gradient: bool) -> int:
    """The caller's, or what is best for so many rows, of which some may be masked."""
    if chunk_rows is not None:
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1; got {chunk_rows}")
        return chunk_rows
    vocab, hidden = weight.shape
    return default_chunk_rows(vocab, hidden, weight.dtype, weight.is_cuda, rows, gradient and weight.requires_grad)


def default_chunk_rows(
    vocab: int, hidden: int, dtype: torch.dtype, on_gpu: bool, rows: int, weight_gradient: bool
) -> int:
    """As many rows of logits as fit the budget; or all of them, where that takes less than a second chunk would: the
    weight's gradient in float32 as well, 4 V H bytes next to half precision, which is 2 H rows of logits."""
    limit = max(1, (GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES) // (vocab * dtype.itemsize))
    all_at_once = limit + 2 * hidden
    return all_at_once if weight_gradient and dtype.itemsize == 2 and rows <= all_at_once else limit


@functools.cache
def adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of half-precision matrices to a float32 one here, as tensor cores compute it:
    CUDA from torch 2.8 on, ROCm in some builds, no CPU. It says so by an error."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


class Needs(NamedTuple):
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


class Extras(NamedTuple):
    """Which statistics of a row to compute in addition to log-probs and entropy."""

    sum_p2: bool = False
    is_top1: bool = False
    mean_logits: bool = False


class _Chunk:
    """Some active rows: where they lie in [B, T], and their hidden states."""

    def __init__(self, index: Tensor, rows: Rows):
        tokens = rows.targets.shape[1]
        self.at = (index // tokens, index % tokens)
        self.hidden = rows.logits[self.at]
        self.lora_hidden: Tensor | None = None
        self._rows = rows

    def gather(self, x: Tensor) -> Tensor:
        return x[self.at][None]

    def gather_any(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else self.gather(x)

    def rows(self, logits: Tensor) -> Rows:
        targets = self.gather(self._rows.targets)
        active = torch.ones_like(targets, dtype=torch.bool)
        temperatures = self.gather_any(self._rows.temperatures)
        return self._rows._replace(logits=logits[None], targets=targets, active=active, temperatures=temperatures)


def _chunks(rows: Rows, chunk_rows: int) -> list[Tensor]:
    """Flat indices of the active rows, in chunks of nearly equal size, the largest first."""
    index = rows.active.reshape(-1).nonzero()[:, 0]
    return list(index.tensor_split(-(-index.numel() // chunk_rows))) if index.numel() else []


class _Projection:
    """The logits of a chunk, in one buffer that the chunks share."""

    def __init__(self, backend: Backend, head: Head):
        self._backend, self._head = backend, head
        self._buffer: Tensor | None = None

    def logits(self, chunk: _Chunk) -> Tensor:
        """hidden @ weight.T + bias, and where there is LoRA (lora_scale * hidden @ lora_a.T) @ lora_b.T, whose left
        factor the chunk keeps for the gradients."""
        head, hidden = self._head, chunk.hidden
        if self._buffer is None:  # the first chunk is the largest
            self._buffer = self._backend.new_matrix(hidden, (hidden.shape[0], head.weight.shape[0]))
        out = self._buffer[: hidden.shape[0]]
        if head.bias is None:
            torch.mm(hidden, head.weight.t(), out=out)
        else:
            torch.addmm(head.bias, hidden, head.weight.t(), out=out)
        if head.lora_a is not None and head.lora_b is not None:
            chunk.lora_hidden = head.lora_scale * (hidden @ head.lora_a.t())
            out.addmm_(chunk.lora_hidden, head.lora_b.t())
        return out


class _Gradients:
    """Gradients of hidden states and of the head. One chunk writes the head's; several are summed in float32 or wider
    and rounded at the end: rounding each product to bf16 or fp16 would err more than torch does in one matmul."""

    def __init__(self, backend: Backend, hidden: Tensor, head: Head, needs: list[bool], single: bool):
        self._head, self._single, self._wide = head, single, acc_dtype(head.weight.dtype)
        self._needs = Needs(*needs)
        self.hidden = hidden.new_zeros(hidden.shape if self._needs.hidden else (0,))
        self._sums = {name: self._new(backend, name) for name in Needs._fields[1:]}

    def _new(self, backend: Backend, name: str) -> Tensor:
        """Zeros of a part of the head, in the dtype of sums; empty where nobody needs it or one chunk writes it."""
        like = getattr(self._head, name)
        empty = not getattr(self._needs, name) or (self._single and name != "bias")
        if name == "weight":
            return backend.new_matrix(like, (0,) if empty else like.shape, self._wide).zero_()
        return self._head.weight.new_zeros((0,) if empty else like.shape, dtype=self._wide)

    def add(self, chunk: _Chunk, g_logits: Tensor) -> None:
        head, needs = self._head, self._needs
        if head.lora_a is not None and head.lora_b is not None:
            assert chunk.lora_hidden is not None
            if needs.hidden or needs.lora_a:
                g_down = head.lora_scale * (g_logits @ head.lora_b)  # of hidden @ lora_a.T
            if needs.lora_a:
                self._add("lora_a", g_down, chunk.hidden)
            if needs.lora_b:
                self._add("lora_b", g_logits, chunk.lora_hidden)
        if needs.hidden:
            g_hidden = g_logits @ head.weight
            if head.lora_a is not None:
                g_hidden.addmm_(g_down, head.lora_a)
            self.hidden[chunk.at] = g_hidden
        if needs.weight:
            self._add("weight", g_logits, chunk.hidden)
        if needs.bias:
            for some in self._columns(g_logits):
                self._sums["bias"][some] += g_logits[:, some].sum(0, dtype=self._wide)

    def _add(self, name: str, g: Tensor, x: Tensor) -> None:
        """g.T @ x, to the sum."""
        if self._single:
            self._sums[name] = g.t() @ x
        elif g.dtype != self._wide and adds_in_float32(g.device, g.dtype):
            total = self._sums[name]
            torch.addmm(total, g.t(), x, out_dtype=self._wide, out=total)  # type: ignore[call-overload]
        else:
            wide = x.to(self._wide)
            for some in self._columns(g):
                self._sums[name][some].addmm_(g[:, some].to(self._wide).t(), wide)

    def _columns(self, g: Tensor) -> Iterator[slice]:
        """All columns of a gradient; where half precision must be widened before it is added, some at a time."""
        at_once = g.dtype == self._wide or adds_in_float32(g.device, g.dtype)
        step = max(g.shape[1], 1) if at_once else WIDENED_COLUMNS
        for first in range(0, g.shape[1], step):
            yield slice(first, first + step)

    def finish(self) -> tuple[Tensor, ...]:
        """Of hidden states, weight, bias, lora_a and lora_b; empty where nobody needs one."""
        rounded = []
        for name, total in self._sums.items():
            like = getattr(self._head, name)
            rounded.append(total.to(self._head.weight.dtype if like is None else like.dtype))
        return self.hidden, *rounded


def _empty_stats(rows: Rows, count: int) -> list[Tensor]:
    return [rows.logits.new_zeros(rows.targets.shape, dtype=acc_dtype(rows.logits.dtype)) for _ in range(count)]


def forward(
    backend: Backend, rows: Rows, head: Head, chunk_rows: int, extras: list[bool]
) -> tuple[RowStats, tuple[Tensor, Tensor, Tensor]]:
    """The rows' statistics, and what `extras` asks for of sum p^2, is_top1 and mean_logits; the others are empty."""
    *stats, squares, mean = _empty_stats(rows, len(RowStats._fields) + 2)
    wants, top1 = Extras(*extras), torch.zeros_like(rows.active)
    projection, chunks = _Projection(backend, head), _chunks(rows, chunk_rows)
    for chunk in (_Chunk(index, rows) for index in chunks):
        of_chunk = chunk.rows(projection.logits(chunk))
        found, found_squares = backend.row_forward(of_chunk, wants.sum_p2)
        for out, values in zip((*stats, squares), (*found, found_squares), strict=True):
            if values.numel():
                out[chunk.at] = values[0]
        if wants.is_top1:
            top1[chunk.at] = is_top1(of_chunk)[0]
        if wants.mean_logits:
            mean[chunk.at] = mean_logits(of_chunk)[0]
    given = zip((squares, top1, mean), wants, strict=True)
    return RowStats(*stats), tuple(x if wanted else x.new_empty(0) for x, wanted in given)  # type: ignore[return-value]


def is_top1(rows: Rows) -> Tensor:
    """Whether the target is the first of the largest logits, bool [B, T]."""
    return rows.logits.argmax(-1) == rows.targets


def mean_logits(rows: Rows) -> Tensor:
    """The mean over the vocabulary of softcap(logit_scale * logits) / temperature, [B, T], without a wide copy."""
    vocab = rows.logits.shape[-1]
    total = rows.logits.new_zeros(rows.targets.shape, dtype=acc_dtype(rows.logits.dtype))
    for v in range(0, vocab, WIDENED_COLUMNS):
        z = rows.logits[..., v : v + WIDENED_COLUMNS].to(total.dtype) * rows.logit_scale
        total += (rows.softcap * (z / rows.softcap).tanh() if rows.softcap else z).sum(-1)
    return total / (vocab * (rows.temperature if rows.temperatures is None else rows.temperatures))


def backward(
    backend: Backend, rows: Rows, head: Head, chunk_rows: int, needs: list[bool], saved: RowStats, g_logps: Tensor,
    g_entropy: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    projection, chunks = _Projection(backend, head), _chunks(rows, chunk_rows)
    gradients = _Gradients(backend, rows.logits, head, needs, single=len(chunks) == 1)
    for chunk in (_Chunk(index, rows) for index in chunks):
        logits = projection.logits(chunk)
        chunk_saved = RowStats(*map(chunk.gather, saved))
        backend.row_backward(
            chunk.rows(logits), chunk_saved, chunk.gather(g_logps), chunk.gather_any(g_entropy), logits[None]
        )
        gradients.add(chunk, logits)
        del logits
    del projection  # the buffer of the chunks, before the gradient is rounded
    return gradients.finish()


def policy(
    backend: Backend, rows: Rows, head: Head, chunk_rows: int, needs: list[bool], inputs: PolicyInputs
) -> tuple[Tensor, ...]:
    """The gradients, log-probs and entropy."""
    projection, chunks = _Projection(backend, head), _chunks(rows, chunk_rows)
    gradients = _Gradients(backend, rows.logits, head, needs, single=len(chunks) == 1)
    logps, entropy = _empty_stats(rows, 2)
    for chunk in (_Chunk(index, rows) for index in chunks):
        logits = projection.logits(chunk)
        gathered: dict[str, Any] = {name: chunk.gather_any(getattr(inputs, name)) for name in PER_TOKEN}
        chunk_inputs = inputs._replace(**gathered)
        found = backend.row_policy(chunk.rows(logits), chunk_inputs, logits[None])
        logps[chunk.at], entropy[chunk.at] = found.logps[0], found.entropy[0]
        gradients.add(chunk, logits)
        del logits
    del projection  # the buffer of the chunks, before the gradient is rounded
    return (*gradients.finish(), logps, entropy)
