"""Hidden states x lm_head in chunks of rows: matmul, row kernel in place, matmuls. Knows no backend and no loss.

Only active rows are computed: they are gathered first, so a masked row costs nothing and is not read. `rows.logits`
holds the hidden states, [B, T', H].
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ..inputs.layout import PolicyInputs, Rows, RowStats, acc_dtype

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


class _Chunk:
    """Some active rows: where they lie in [B, T], and their hidden states."""

    def __init__(self, index: Tensor, rows: Rows):
        tokens = rows.targets.shape[1]
        self.at = (index // tokens, index % tokens)
        self.hidden = rows.logits[self.at]
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


class _Head:
    """hidden @ weight.T + bias; the chunks share one buffer."""

    def __init__(self, backend: Backend, weight: Tensor, bias: Tensor | None):
        self._backend, self._weight, self._bias = backend, weight, bias
        self._buffer: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        if self._buffer is None:  # the first chunk is the largest
            self._buffer = self._backend.new_matrix(hidden, (hidden.shape[0], self._weight.shape[0]))
        out = self._buffer[: hidden.shape[0]]
        if self._bias is None:
            return torch.mm(hidden, self._weight.t(), out=out)
        return torch.addmm(self._bias, hidden, self._weight.t(), out=out)


class _Gradients:
    """Gradients of hidden, weight and bias. One chunk writes the latter two; several are summed in float32 or wider and
    rounded at the end: rounding each product to bf16 or fp16 would err more than torch does in one matmul."""

    def __init__(
        self, backend: Backend, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], single: bool
    ):
        self._weight, self._needs, self._single = weight, needs, single
        self._bias_dtype, self._wide = weight.dtype if bias is None else bias.dtype, acc_dtype(weight.dtype)
        self.hidden = hidden.new_zeros(hidden.shape if needs[0] else (0,))
        summed = needs[1] and not single
        self.weight = backend.new_matrix(weight, weight.shape if summed else (0,), self._wide).zero_()
        self.bias = weight.new_zeros(weight.shape[:1] if needs[2] else (0,), dtype=self._wide)

    def add(self, chunk: _Chunk, g_logits: Tensor) -> None:
        if self._needs[0]:
            self.hidden[chunk.at] = g_logits @ self._weight
        if self._needs[1] and self._single:
            self.weight = g_logits.t() @ chunk.hidden
        sum_weight, half = self._needs[1] and not self._single, g_logits.dtype != self._wide
        if half and adds_in_float32(g_logits.device, g_logits.dtype):
            if sum_weight:
                torch.addmm(  # type: ignore[call-overload]
                    self.weight, g_logits.t(), chunk.hidden, out_dtype=self._wide, out=self.weight
                )
            if self._needs[2]:
                self.bias += g_logits.sum(0, dtype=self._wide)
        elif sum_weight or self._needs[2]:
            self._accumulate(g_logits, chunk.hidden.to(self._wide) if sum_weight else None)

    def _accumulate(self, g_logits: Tensor, hidden: Tensor | None) -> None:
        """weight += g_logits.T @ hidden, bias += the sum; half precision is widened some columns at a time."""
        step = g_logits.shape[1] if g_logits.dtype == self._wide else WIDENED_COLUMNS
        for v in range(0, g_logits.shape[1], step):
            columns = g_logits[:, v : v + step].to(self._wide)
            if hidden is not None:
                self.weight[v : v + step].addmm_(columns.t(), hidden)
            if self._needs[2]:
                self.bias[v : v + step].add_(columns.sum(0))
            del columns  # or two blocks would be alive while the next is made

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight.to(self._weight.dtype), self.bias.to(self._bias_dtype)


def _empty_stats(rows: Rows, count: int) -> list[Tensor]:
    return [rows.logits.new_zeros(rows.targets.shape, dtype=acc_dtype(rows.logits.dtype)) for _ in range(count)]


def forward(
    backend: Backend, rows: Rows, weight: Tensor, bias: Tensor | None, chunk_rows: int, sum_p2: bool
) -> tuple[RowStats, Tensor]:
    *stats, squares = _empty_stats(rows, len(RowStats._fields) + 1)
    head, chunks = _Head(backend, weight, bias), _chunks(rows, chunk_rows)
    for chunk in (_Chunk(index, rows) for index in chunks):
        found, found_squares = backend.row_forward(chunk.rows(head.logits(chunk.hidden)), sum_p2)
        for out, values in zip((*stats, squares), (*found, found_squares), strict=True):
            if values.numel():
                out[chunk.at] = values[0]
    return RowStats(*stats), squares if sum_p2 else squares.new_empty(0)


def backward(
    backend: Backend, rows: Rows, weight: Tensor, bias: Tensor | None, chunk_rows: int, needs: list[bool],
    saved: RowStats, g_logps: Tensor, g_entropy: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head, chunks = _Head(backend, weight, bias), _chunks(rows, chunk_rows)
    gradients = _Gradients(backend, rows.logits, weight, bias, needs, single=len(chunks) == 1)
    for chunk in (_Chunk(index, rows) for index in chunks):
        logits = head.logits(chunk.hidden)
        chunk_saved = RowStats(*map(chunk.gather, saved))
        backend.row_backward(
            chunk.rows(logits), chunk_saved, chunk.gather(g_logps), chunk.gather_any(g_entropy), logits[None]
        )
        gradients.add(chunk, logits)
        del logits
    del head  # the buffer of the chunks, before the gradient is rounded
    return gradients.finish()


def policy(
    backend: Backend,
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    chunk_rows: int,
    needs: list[bool],
    inputs: PolicyInputs,
) -> tuple[Tensor, ...]:
    head, chunks = _Head(backend, weight, bias), _chunks(rows, chunk_rows)
    gradients = _Gradients(backend, rows.logits, weight, bias, needs, single=len(chunks) == 1)
    logps, entropy = _empty_stats(rows, 2)
    for chunk in (_Chunk(index, rows) for index in chunks):
        logits = head.logits(chunk.hidden)
        gathered: dict[str, Any] = {name: chunk.gather_any(getattr(inputs, name)) for name in PER_TOKEN}
        chunk_inputs = inputs._replace(**gathered)
        found = backend.row_policy(chunk.rows(logits), chunk_inputs, logits[None])
        logps[chunk.at], entropy[chunk.at] = found.logps[0], found.entropy[0]
        gradients.add(chunk, logits)
        del logits
    del head  # the buffer of the chunks, before the gradient is rounded
    return (*gradients.finish(), logps, entropy)
