"""The C++ kernels for the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from . import Backend, _cpu  # type: ignore[attr-defined]
from .native import NativeBackend
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


class CpuBackend(NativeBackend):
    name = "cpu"

    def rejects(self, device: torch.device, dtype: torch.dtype | None) -> str | None:
        return None if device.type == "cpu" else f"backend 'cpu' needs CPU tensors; got {device}"

    def new_matrix(self, like: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """In huge pages, as page faults would cost several copies."""
        matrix = super().new_matrix(like, shape, dtype)
        if matrix.nbytes >= MIN_HUGE_PAGE_BYTES:
            _cpu.prefer_huge_pages(matrix.data_ptr(), matrix.nbytes)
        return matrix

    def scale(self, matrix: Tensor, factor: Tensor) -> None:
        if factor != 1:
            matrix.mul_(factor)  # of a 0-d factor, which keeps its precision and the matrix's dtype


BACKEND: Backend = CpuBackend(_cpu, NoWorkspace())
