"""The CUDA kernels on the CPU (csrc/emulation): for tests, which build its module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from . import _emulated, cpu  # type: ignore[attr-defined]
from .native import Kernels, plain_matrix
from .workspace import CudaWorkspace


class RowPlan(NamedTuple):
    """gk::RowPlan: how a row is cut up on a GPU."""

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
    """Every kernel, in every thread, runs on such a GPU inside the block; without arguments as outside of it."""
    _emulated.use_machine(multiprocessors, threads, shared_bytes, bulk_copies, SCHEDULES.index(schedule))
    try:
        yield
    finally:
        _emulated.use_machine(2, 64, 10 << 10, True, 0)


new_matrix = plain_matrix
KERNELS = Kernels(_emulated, cpu.launch, plain_matrix, CudaWorkspace(_emulated))
row_forward, row_backward, row_policy = KERNELS.row_forward, KERNELS.row_backward, KERNELS.row_policy
scale, token_policy, group_advantages, gae = KERNELS.scale, KERNELS.token_policy, KERNELS.group_advantages, KERNELS.gae
value_loss, masked_moments, whiten = KERNELS.value_loss, KERNELS.masked_moments, KERNELS.whiten
group_diversity = KERNELS.group_diversity
