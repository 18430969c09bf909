"""Milliseconds of a call on the device, and on the host."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

from grpo_kernels.tools.bench.clock import Clock, clock_for

ROUNDS = 7


@functools.cache
def _clock(device: str) -> Clock:
    return clock_for(device)


def milliseconds(call: Callable[[], object], device: str, rounds: int = ROUNDS) -> float:
    """The kernels' time: the median, with cold caches, between events behind a sleep kernel (tools/bench/clock.py)."""
    clock = _clock(device)
    call()  # warm
    seconds = []
    for _ in range(rounds):
        clock.flush()
        seconds.append(clock.seconds(call))
    return round(statistics.median(seconds) * 1e3, 5)


def host_milliseconds(call: Callable[[], object], device: str, rounds: int = 20) -> float:
    """The time until the call returns: Python and the launches. There are few enough rounds for any launch queue."""
    call()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(rounds):
        call()
    spent = time.perf_counter() - begin
    synchronize(device)
    return round(spent / rounds * 1e3, 5)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
