"""How a call is timed: on the CPU by the wall clock, on a GPU by events around it, each with cold caches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

CPU_FLUSH_BYTES = 64 << 20  # beyond the last-level cache that a few cores share
GPU_FLUSH_FACTOR = 2  # times the L2
HEAD_START_CYCLES = 2_000_000  # about 1 ms: longer than Python takes to launch a loss and its backward


class Clock(Protocol):
    def flush(self) -> None:
        """Push the inputs out of the cache, untimed."""

    def seconds(self, run: Callable[[], object]) -> float: ...


class WallClock:
    """`flush_bytes` are written before each call; 0 leaves the caches as they are (for inputs that fit them anyway)."""

    def __init__(self, flush_bytes: int = 0) -> None:
        self._dirt = torch.empty(flush_bytes, dtype=torch.uint8) if flush_bytes else None

    def flush(self) -> None:
        if self._dirt is not None:
            self._dirt.zero_()

    def seconds(self, run: Callable[[], object]) -> float:
        collecting = gc.isenabled()
        gc.disable()
        try:
            begin = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - begin
            del result  # its memory goes back before the next provider's turn, outside the timing
            return seconds
        finally:
            if collecting:
                gc.enable()


class CudaClock:
    """Events before and after the call on the current stream. The GPU sleeps while the host launches, so that what lies
    between the events is the GPU's time and not the host's: a flush of the caches alone is over before a small call's
    first launch. A call that synchronises, or takes the host longer than the sleep, still shows the host."""

    def __init__(self, cuda: Any = torch.cuda, flush_bytes: int | None = None) -> None:
        self._cuda = cuda
        if flush_bytes is None:
            flush_bytes = GPU_FLUSH_FACTOR * cuda.get_device_properties(cuda.current_device()).L2_cache_size
        device = "cuda" if cuda is torch.cuda else "cpu"
        self._dirt = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def flush(self) -> None:
        self._dirt.zero_()

    def seconds(self, run: Callable[[], object]) -> float:
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        result = run()
        end.record()
        self._cuda.synchronize()
        del result
        return begin.elapsed_time(end) * 1e-3


def clock_for(device: str, *, flush: bool = True) -> Clock:
    if device != "cpu":
        return CudaClock()
    return WallClock(CPU_FLUSH_BYTES if flush else 0)
