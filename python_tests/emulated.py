"""The CUDA kernels on the CPU (csrc/emulation), for tests, which build the module."""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from grpo_kernels import backends
from grpo_kernels.backends import _emulated
from grpo_kernels.backends.native import NativeBackend, no_float64
from grpo_kernels.backends.workspace import CudaWorkspace


class RowPlan(NamedTuple):
    """gk::RowPlan: how a row is divided on a GPU."""

    threads: int
    cluster: int
    slots: int
    resident: int
    shared_bytes: int


def row_plan(shared_bytes: int, threads: int, bulk_copies: bool, row_bytes: int, two_pass: bool) -> RowPlan:
    return RowPlan(*_emulated.row_plan(shared_bytes, threads, bulk_copies, row_bytes, two_pass))


SCHEDULES = ("round_robin", "one_warp_ahead", "shuffled", "shuffled_copies")  # as gk::emulation::Schedule


@contextlib.contextmanager
def machine(
    *, multiprocessors: int = 2, threads: int = 64, shared_bytes: int = 10 << 10, bulk_copies: bool = True,
    schedule: str = "round_robin",
) -> Iterator[None]:  # fmt: skip
    """Inside the block every kernel, in every thread, runs on this GPU; without arguments, on the default one."""
    _emulated.use_machine(multiprocessors, threads, shared_bytes, bulk_copies, SCHEDULES.index(schedule))
    try:
        yield
    finally:
        _emulated.use_machine(2, 64, 10 << 10, True, 0)


class EmulatedBackend(NativeBackend):
    name = "emulated"
    fuses_group_advantages = True

    def rejects(self, device: torch.device, dtype: torch.dtype | None) -> str | None:
        if device.type != "cpu":
            return f"backend 'emulated' needs CPU tensors; got {device}"
        return no_float64(self.name, dtype)


BACKEND = EmulatedBackend(_emulated, CudaWorkspace(_emulated))


def register() -> None:
    """Makes `backend="emulated"` a name that the library knows."""
    backends.register("emulated", lambda: BACKEND)


if __name__ == "__main__":  # python -m emulated SCRIPT: runs a script that uses this backend
    register()
    runpy.run_path(sys.argv[1], run_name="__main__")
