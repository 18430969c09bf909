"""The C++ kernels for the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import _cpu  # type: ignore[attr-defined]
from .native import Kernels
from .workspace import NoWorkspace

INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_bf16")  # in the order of gk::Isa

MIN_HUGE_PAGE_BYTES = 4 << 20  # bytes


def instruction_set() -> str:
    return INSTRUCTION_SETS[_cpu.isa_in_use()]


def supported_instruction_sets() -> list[str]:
    return [name for code, name in enumerate(INSTRUCTION_SETS) if _cpu.isa_supported(code)]


@contextlib.contextmanager
def forced_instruction_set(name: str) -> Iterator[None]:
    """For tests: every kernel, in every thread, runs on this instruction set inside the block."""
    if name not in supported_instruction_sets():
        raise ValueError(f"this CPU supports {', '.join(supported_instruction_sets())}; got {name!r}")
    before = _cpu.isa_in_use()
    _cpu.use_isa(INSTRUCTION_SETS.index(name))
    try:
        yield
    finally:
        _cpu.use_isa(before)


def new_matrix(like: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory that may be as large as the logits, in huge pages: page faults would cost several copies."""
    matrix = like.new_empty(shape, dtype=dtype or like.dtype)
    if matrix.nbytes >= MIN_HUGE_PAGE_BYTES:
        _cpu.prefer_huge_pages(matrix.data_ptr(), matrix.nbytes)
    return matrix


def launch(kernel: Callable[..., None], _: torch.device, *args: object) -> None:
    kernel(*args, 0)  # no stream


def scale(matrix: Tensor, factor: Tensor) -> None:
    if factor != 1:
        matrix.mul_(factor)  # a 0-d factor keeps its precision and the matrix its dtype


KERNELS = Kernels(_cpu, launch, new_matrix, NoWorkspace())
row_forward, row_backward, row_policy = KERNELS.row_forward, KERNELS.row_backward, KERNELS.row_policy
token_policy, group_advantages, gae = KERNELS.token_policy, KERNELS.group_advantages, KERNELS.gae
value_loss, masked_moments, whiten = KERNELS.value_loss, KERNELS.masked_moments, KERNELS.whiten
group_diversity = KERNELS.group_diversity
