"""Shared and global memory. A block's stores to global memory reach the other blocks after a fence, or else at the end
of the grid: as late as the memory model allows."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np

SHARED_WINDOW = 1 << 56  # generic addresses of shared memory
RANK_SHIFT = 24  # there and in shared::cluster addresses: rank in the cluster + 1; 0 is the own block
PAGE_SHIFT = 12
PAGE = 1 << PAGE_SHIFT

_LOWEST = 4096
_PROCESS = (ctypes.c_uint8 * ((1 << 47) - 2 * _LOWEST)).from_address(_LOWEST)
_BYTES = np.frombuffer(_PROCESS, np.uint8)
_WORDS = {n: _BYTES[: _BYTES.size // n * n].view(f"u{n}") for n in (1, 2, 4, 8)}


class Trap(Exception):
    """An error on a GPU, or a deadlock."""


def pages_of(at: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For every page that [at, at + size) touches: its number, the bytes' indices in the page, and their positions."""
    where = (at[:, None] + np.arange(size)).ravel()
    first, last = int(where.min()) >> PAGE_SHIFT, int(where.max()) >> PAGE_SHIFT
    if first == last:
        yield first, where & (PAGE - 1), slice(None)
        return
    numbers = where >> PAGE_SHIFT
    for number in np.unique(numbers).tolist():
        here = np.flatnonzero(numbers == number)
        yield number, where[here] & (PAGE - 1), here


def check_alignment(at: np.ndarray, bytes_: int) -> None:
    if (at & (bytes_ - 1)).any():
        raise Trap(f"misaligned: {bytes_} bytes at {int(at[(at & (bytes_ - 1)) != 0][0]):#x}")


class SharedMemory:
    def __init__(self, size: int):
        self.size = size
        self.bytes = np.full(-(-size // 16) * 16 + 16, 0xFF, np.uint8)  # initially NaNs and -1
        self.words = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}

    def _check(self, at: np.ndarray, bytes_: int) -> None:
        check_alignment(at, bytes_)
        if (at < 0).any() or (at + bytes_ > self.size).any():
            raise Trap(f"shared memory of {self.size} bytes: an access at {int(at.max())}")

    def read(self, at: np.ndarray, size: int, count: int) -> np.ndarray:
        """[lanes, count]"""
        self._check(at, size * count)
        return self.words[size][(at // size)[:, None] + np.arange(count)]

    def write(self, at: np.ndarray, size: int, values: np.ndarray) -> None:
        self._check(at, size * values.shape[1])
        self.words[size][(at // size)[:, None] + np.arange(values.shape[1])] = values


class Late:
    """For a page: the bytes that a block has written and the others do not see yet, and the values that they see."""

    def __init__(self) -> None:
        self.owner = np.zeros(PAGE, np.int32)  # 0: nobody
        self.old = np.zeros(PAGE, np.uint8)


class GlobalMemory:
    """This process's memory. A kernel may access `spans`, sorted [begin, end) pairs; None: everything."""

    def __init__(self, spans: list[tuple[int, int]] | None, late: bool):
        self.spans = None if spans is None else np.array(spans, np.int64).reshape(-1, 2)
        self.late = late
        self._pages: dict[int, Late] = {}

    def check(self, at: np.ndarray, bytes_: int, what: str) -> None:
        check_alignment(at, bytes_)
        if self.spans is None:
            return
        if not len(self.spans):
            raise Trap(f"{what} where no tensor is")
        i = np.searchsorted(self.spans[:, 0], at, side="right") - 1
        outside = (i < 0) | (at + bytes_ > self.spans[np.maximum(i, 0), 1])
        if outside.any():
            raise Trap(f"{what} outside of every tensor, at {int(at[outside][0]):#x}")

    def read(self, owner: int, at: np.ndarray, size: int, count: int) -> np.ndarray:
        self.check(at, size * count, "a load")
        values = _WORDS[size][((at - _LOWEST) // size)[:, None] + np.arange(count)]
        if self._pages:
            self._hide(owner, at, size * count, values)
        return values

    def _hide(self, owner: int, at: np.ndarray, bytes_: int, values: np.ndarray) -> None:
        flat = values.view(np.uint8).reshape(-1)
        for number, in_page, here in pages_of(at, bytes_):
            page = self._pages.get(number)
            if page is not None:
                hidden = (page.owner[in_page] != 0) & (page.owner[in_page] != owner)
                flat[here] = np.where(hidden, page.old[in_page], flat[here])

    def write(self, owner: int, at: np.ndarray, size: int, values: np.ndarray, strong: bool) -> None:
        count = values.shape[1]
        self.check(at, size * count, "a store")
        if self.late and not strong:
            self._keep_old(owner, at, size * count)
        _WORDS[size][((at - _LOWEST) // size)[:, None] + np.arange(count)] = values

    def _keep_old(self, owner: int, at: np.ndarray, bytes_: int) -> None:
        for number, in_page, _ in pages_of(at, bytes_):
            page = self._pages.setdefault(number, Late())
            fresh = in_page[page.owner[in_page] != owner]
            page.old[fresh] = _BYTES[(number << PAGE_SHIFT) - _LOWEST + fresh]
            page.owner[fresh] = owner

    def publish(self, owner: int, at: np.ndarray, bytes_: int) -> None:
        """Makes the block's stores to these addresses visible to all."""
        for number, in_page, _ in pages_of(at, bytes_):
            if page := self._pages.get(number):
                mine = in_page[page.owner[in_page] == owner]
                page.owner[mine] = 0

    def modify(self, owner: int, at: int, size: int, fn) -> int:
        """One atomic operation; returns the old value."""
        place = np.array([at], np.int64)
        self.check(place, size, "an atomic operation")
        if self._pages:
            self.publish(owner, place, size)
        index = (at - _LOWEST) // size
        before = int(_WORDS[size][index])
        _WORDS[size][index] = fn(before)
        return before

    def bytes_at(self, at: int, count: int) -> np.ndarray:
        return _BYTES[at - _LOWEST : at - _LOWEST + count]
