"""The launch configuration of the row kernels, by architecture.

None of these numbers has met a GPU yet: each stands on the reason given. GRPO_KERNELS_TUNE=1 times every candidate
the first time a kernel meets a vocabulary, and prints the row that would be best here; it changes nothing of the run.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from .launch import ALIGNMENT, INTERPRETED


class Config(NamedTuple):
    """The launch configuration of all row kernels on one architecture: with two, one pass and two passes would sum in
    different orders."""

    warps: int  # of a program
    programs: int  # that a multiprocessor holds at a time: the registers are shared between them
    steps: int  # accesses of 16 bytes in flight per thread
    segment: int  # columns whose lanes are reduced together; a power of two, at least a tile
    split_below: int  # rows per multiprocessor; with fewer, a row is split between programs


# 8 warps of 4 accesses: 16 KiB in flight per program, 32 KiB on a multiprocessor that holds two, about what the latency
# asks for; and a thread holds 32 halves and their lanes' sums without spilling. Segments of 16384 columns: a
# reduction across the warps every 32 KiB costs a few per cent, and one row of a 152k vocabulary still occupies ten
# multiprocessors. Four rows per multiprocessor: with fewer, unsplit rows would leave some of them idle at the end, for
# the time of a row.
TABLE = {
    ("cuda", 80): Config(warps=8, programs=2, steps=4, segment=16384, split_below=4),
    ("cuda", 90): Config(warps=8, programs=2, steps=4, segment=16384, split_below=4),
    ("cuda", 100): Config(warps=8, programs=2, steps=4, segment=16384, split_below=4),
    ("hip", 0): Config(warps=4, programs=2, steps=4, segment=16384, split_below=4),  # waves are twice as wide
}
# Small, as every operation costs a call of numpy; few rows suffice to test split rows and others.
INTERPRETER = Config(warps=1, programs=1, steps=2, segment=2048, split_below=4)
INTERPRETER_LANES = 512

REGISTERS = 65536  # of a multiprocessor, from sm_80 on

CANDIDATES = [
    Config(*resident, steps, segment, split_below)
    for resident, steps, segment, split_below in itertools.product(
        ((4, 2), (4, 4), (8, 1), (8, 2), (16, 1)), (1, 2, 4), (16384, 32768), (4,)
    )  # 128 registers per thread or more: a tile of 4 steps spills with fewer
]


class Shape(NamedTuple):
    """A config as the kernels take it, for one element size."""

    STEPS: int
    LANES: int
    SEGMENT: int
    split_rows: int  # fewer rows than these are split
    options: dict[str, int]  # of the compiler

    @property
    def tile(self) -> int:
        return self.STEPS * self.LANES

    def splits(self, rows: int, vocab: int) -> bool:
        return rows < self.split_rows and vocab > self.SEGMENT


class Hardware(NamedTuple):
    backend: str
    arch: int  # 0 where it is not a number
    warp_size: int
    processors: int


@functools.cache
def _hardware(device: torch.device) -> Hardware:
    driver = triton.runtime.driver.active
    target, index = driver.get_current_target(), device.index or 0
    processors = driver.utils.get_device_properties(index)["multiprocessor_count"]
    arch = target.arch if isinstance(target.arch, int) else 0
    return Hardware(target.backend, arch, target.warp_size, processors)


def config_of(backend: str, arch: int) -> Config:
    """The newest row that is not newer than the architecture; the oldest for what is older than all."""
    archs = sorted(a for b, a in TABLE if b == backend)
    if not archs:
        raise RuntimeError(f"no launch configuration for {backend!r}; there are {', '.join(map(str, TABLE))}")
    return TABLE[backend, max((a for a in archs if a <= arch), default=archs[0])]


def shape_of(config: Config, hardware: Hardware, element_size: int) -> Shape:
    lanes = config.warps * hardware.warp_size * ALIGNMENT // element_size
    segment = max(config.segment, config.steps * lanes)
    options = {"num_warps": config.warps}
    if hardware.backend == "cuda":  # left alone, ptxas aims at more programs on a multiprocessor and spills
        options["maxnreg"] = min(255, REGISTERS // (32 * config.warps * config.programs))
    return Shape(config.steps, lanes, segment, config.split_below * hardware.processors, options)


def shape_for(logits: torch.Tensor, config: Config | None = None) -> Shape:
    if INTERPRETED:
        c = INTERPRETER
        return Shape(c.steps, INTERPRETER_LANES, c.segment, c.split_below, {})
    hardware = _hardware(logits.device)
    return shape_of(config or config_of(hardware.backend, hardware.arch), hardware, logits.element_size())


# ---- GRPO_KERNELS_TUNE ----

_tuned: set[tuple] = set()


def asked() -> bool:
    return os.environ.get("GRPO_KERNELS_TUNE") == "1" and not INTERPRETED


def fastest(
    candidates: list[Config], run: Callable[[Config], None], timer: Callable[..., float]
) -> tuple[Config, dict]:
    """The candidate of the lowest time, and all times in ms; one that does not fit the device is passed over."""
    times: dict[Config, float] = {}
    for config in candidates:
        try:
            times[config] = timer(functools.partial(run, config))
        except triton.runtime.errors.OutOfResources:
            continue
    if not times:
        raise RuntimeError(f"none of {len(candidates)} launch configurations fits this device")
    return min(times, key=times.__getitem__), times


def tune(kernel: str, logits: torch.Tensor, run: Callable[[Config], None]) -> None:
    """Prints the best row of the table for this kernel, dtype and vocabulary, once. `run` must write only copies."""
    key = (kernel, logits.dtype, logits.shape[-1], logits.device)
    if not asked() or key in _tuned:
        return
    _tuned.add(key)
    hardware = _hardware(logits.device)
    now = config_of(hardware.backend, hardware.arch)
    best, times = fastest([now, *CANDIDATES], run, triton.testing.do_bench)
    print(
        f"{kernel} {logits.dtype} {tuple(logits.shape)}: {times[now]:.3f} ms now, {times[best]:.3f} ms with\n"
        f"    ({hardware.backend!r}, {hardware.arch}): {best},",
        file=sys.stderr,
    )
