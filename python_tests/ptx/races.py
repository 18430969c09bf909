"""Accesses of two warps to one address, one of them a store, that nothing orders: by vector clocks.

An agent is a warp of a cluster, or a barrier on behalf of the copies that complete on it. An agent's clock counts its
releases (arrivals, barriers); clocks[a] of another agent is the newest release of `a` that it knows of. An access is
ordered before what an agent does if the agent knows the clock at which it was made.
"""

from __future__ import annotations

import numpy as np

from .memory import PAGE, pages_of

READERS = 4  # the newest reads of a byte that are remembered, by agent modulo: a race may be missed, none is invented


class Page:
    def __init__(self) -> None:
        self.writer = np.zeros(PAGE, np.int32)
        self.written = np.zeros(PAGE, np.int32)  # the writer's clock; 0: never
        self.reader = np.zeros((READERS, PAGE), np.int32)
        self.read = np.zeros((READERS, PAGE), np.int32)


class Shadow:
    """Who has accessed what, for one block's shared memory or for global memory as a cluster sees it."""

    def __init__(self) -> None:
        self._pages: dict[int, Page] = {}

    def load(self, agent: int, clock: int, clocks: np.ndarray, at: np.ndarray, bytes_: int) -> str | None:
        """Notes it, and says with what it races."""
        found = None
        for number, inside, _ in pages_of(at, bytes_):
            page = self._pages.get(number) or self._pages.setdefault(number, Page())
            if (page.written[inside] > clocks[page.writer[inside]]).any():
                found = "a load races with a store"
            row = agent % READERS
            page.reader[row, inside], page.read[row, inside] = agent, clock
        return found

    def store(
        self, agent: int, clock: int, clocks: np.ndarray, at: np.ndarray, bytes_: int, changes: np.ndarray
    ) -> str | None:
        """`changes`: of each byte, whether it gets another value; one that does not races with no other store."""
        found = None
        for number, inside, here in pages_of(at, bytes_):
            page = self._pages.get(number) or self._pages.setdefault(number, Page())
            if ((page.written[inside] > clocks[page.writer[inside]]) & changes[here]).any():
                found = "a store races with a store"
            if (page.read[:, inside] > clocks[page.reader[:, inside]]).any():
                found = "a store races with a load"
            page.writer[inside], page.written[inside] = agent, clock
        return found
