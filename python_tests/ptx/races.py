"""Finds races by vector clocks: accesses of two warps to one address, one of them a store, that nothing orders.

An agent is a warp of a cluster, or a barrier, which stands for the copies that complete on it. An agent's clock counts
its releases (arrivals, barriers); another agent's clocks[a] is the latest release of `a` that it knows of. An access is
ordered before an agent's next one if the agent knows the clock at which the access was made.
"""

from __future__ import annotations

import numpy as np

from .memory import PAGE, pages_of

READERS = 4  # remembered reads per byte, one per agent modulo this: a race may be missed, but none is invented


class Page:
    def __init__(self) -> None:
        self.writer = np.zeros(PAGE, np.int32)
        self.written = np.zeros(PAGE, np.int32)  # the writer's clock; 0: never
        self.reader = np.zeros((READERS, PAGE), np.int32)
        self.read = np.zeros((READERS, PAGE), np.int32)


class Shadow:
    """The last accesses to every byte, for one block's shared memory or for global memory as a cluster sees it."""

    def __init__(self) -> None:
        self._pages: dict[int, Page] = {}

    def load(self, agent: int, clock: int, clocks: np.ndarray, at: np.ndarray, bytes_: int) -> str | None:
        """Records the load, and returns the race that it is part of, if any."""
        race = None
        for number, in_page, _ in pages_of(at, bytes_):
            page = self._pages.get(number) or self._pages.setdefault(number, Page())
            if (page.written[in_page] > clocks[page.writer[in_page]]).any():
                race = "a load races with a store"
            row = agent % READERS
            page.reader[row, in_page], page.read[row, in_page] = agent, clock
        return race

    def store(
        self, agent: int, clock: int, clocks: np.ndarray, at: np.ndarray, bytes_: int, changes: np.ndarray
    ) -> str | None:
        """`changes`: which bytes change their value. A store that changes nothing does not race with another store."""
        race = None
        for number, in_page, here in pages_of(at, bytes_):
            page = self._pages.get(number) or self._pages.setdefault(number, Page())
            if ((page.written[in_page] > clocks[page.writer[in_page]]) & changes[here]).any():
                race = "a store races with a store"
            if (page.read[:, in_page] > clocks[page.reader[:, in_page]]).any():
                race = "a store races with a load"
            page.writer[in_page], page.written[in_page] = agent, clock
        return race
