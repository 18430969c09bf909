"""Timing that survives a noisy machine: providers are interleaved, and every figure is a ratio within one run.

The unit of what reads logits is ``copy``: ``out.copy_(logits)`` into memory that is mapped already. It moves as many
bytes as a loss and its gradient must, so its time is the floor.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from .clock import Clock, WallClock


def measure_interleaved(
    providers: Mapping[str, Callable[[], object]],
    rounds: int | Mapping[str, int],
    setup: Callable[[], object] | None = None,
    *,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    clock: Clock | None = None,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each call of each provider. Interleaved, so that a disturbance of the machine hits all alike.

    Args:
        providers: by name.
        rounds: calls of each provider, or by name; the fewer ones are spread over the rounds of the others.
        setup: called before every call of every provider, untimed, so that all start from the same caches.
        prepare: by name, called before every call of that provider, untimed: restores what the last call overwrote.
        clock: the wall clock when left out. Its flush is the last thing before each call.
        warm_up: call each provider once before the first round, untimed.
    """
    clock, prepare = clock or WallClock(), prepare or {}

    def timed(name: str) -> float:
        for before in (setup, prepare.get(name)):
            if before is not None:
                before()
        clock.flush()
        return clock.seconds(providers[name])

    wanted = {name: rounds if isinstance(rounds, int) else rounds[name] for name in providers}
    total = max(wanted.values())
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    if warm_up:
        for name in names:
            timed(name)
    for turn in range(total):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same neighbour
            if (turn + 1) * wanted[name] // total > turn * wanted[name] // total:
                seconds[name].append(timed(name))
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}
