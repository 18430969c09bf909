"""The layout of a warp's values: every register, constant and special register is a row of 32 lanes, and an operand is
a typed view of a row, which a closure finds by its index."""

from __future__ import annotations

import functools
import re
import struct

import numpy as np

from .text import Kernel, size_of

LANES = 32
ALL = np.ones(LANES, bool)  # compared by identity: the mask of a warp that has not diverged
NOBODY, EVERYBODY = bytes(LANES), ALL.tobytes()  # masks are compared as bytes, which is fastest
UNDEFINED = 0xA5A5A5A5A5A5A5A5  # the content of a register before it is written

_INTEGERS = {1: (np.uint8, np.int8), 2: (np.uint16, np.int16), 4: (np.uint32, np.int32), 8: (np.uint64, np.int64)}
_FLOATS = {2: np.float16, 4: np.float32, 8: np.float64}
_AXES = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
SPECIAL = (*_AXES, "%laneid", "%cluster_ctarank", "%cluster_nctarank")


def dtype_of(kind: str) -> np.dtype:
    """bf16 values and pairs of halves are represented by their bits."""
    if kind == "pred":
        return np.dtype(bool)
    size = size_of(kind)
    if kind.startswith("f") and "x" not in kind:
        return np.dtype(_FLOATS[size])
    return np.dtype(_INTEGERS[size][kind.startswith("s")])


class Frame:
    """The layout of a kernel's warps; `view` and `constant` may be called until the first warp is made."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int]):
        self.kernel, self.symbols = kernel, symbols
        self._rows: dict[int, list[int]] = {1: [], 2: [], 4: [], 8: []}  # by size: initial bits
        self._place: dict[object, tuple[int, int]] = {}  # size, row
        self._views: dict[tuple[int, int, np.dtype], int] = {}
        for name, kind in kernel.registers.items():
            self._new(name, size_of(kind), 0 if kind == "pred" else UNDEFINED)
        for name in SPECIAL:
            self._new(name, 4, 0)

    def _new(self, key: object, size: int, bits: int) -> tuple[int, int]:
        rows = self._rows[size]
        rows.append(bits & ((1 << 8 * size) - 1))
        self._place[key] = size, len(rows) - 1
        return self._place[key]

    def size(self, name: str) -> int:
        return self._place[name][0]

    def _view(self, place: tuple[int, int], dtype: np.dtype) -> int:
        return self._views.setdefault((*place, dtype), len(self._views))

    def source(self, operand: str, kind: str) -> int:
        """The index of an operand that is read as `kind`: the low part of a wider register."""
        if operand in self._place:
            return self._view(self._place[operand], dtype_of(kind))
        size, bits = size_of(kind), self._bits(operand, kind)
        place = self._place.get((size, bits)) or self._new((size, bits), size, bits)
        return self._view(place, dtype_of(kind))

    def target(self, operand: str, kind: str) -> int | None:
        """The index of a register that is written as `kind`: a wider register is extended. None for `_`."""
        if operand == "_":
            return None
        size = self.size(operand)
        wide = kind if size == size_of(kind) else f"{'s' if kind.startswith('s') else 'u'}{8 * size}"
        return self._view(self._place[operand], dtype_of(wide))

    def _bits(self, operand: str, kind: str) -> int:
        mask = (1 << 8 * size_of(kind)) - 1
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            return int(operand[2:], 16)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            value = int(operand.rstrip("U"), 0)
            return int(value != 0) if kind == "pred" else value & mask
        if re.fullmatch(r"-?\d+\.\d*", operand):
            return int.from_bytes(struct.pack({4: "<f", 8: "<d"}[size_of(kind)], float(operand)), "little")
        base, _, offset = operand.partition("+")
        symbols = {**{n: at for n, (at, _) in self.kernel.parameters.items()}, **self.kernel.shared, **self.symbols}
        if base not in symbols:
            raise NotImplementedError(f"operand {operand!r} as {kind}")
        return (symbols[base] + int(offset or 0)) & mask

    @functools.cached_property
    def _initial(self) -> dict[int, np.ndarray]:
        columns = {size: np.array(rows, np.uint64).astype(_INTEGERS[size][0]) for size, rows in self._rows.items()}
        return {size: np.repeat(column[:, None], LANES, axis=1) for size, column in columns.items()}

    def new_rows(self, special: dict[str, object]) -> Rows:
        """The rows of one warp."""
        store = {size: matrix.copy() for size, matrix in self._initial.items()}
        for name, value in special.items():
            store[4][self._place[name][1]] = value
        return Rows(list(self._views), store)


class Rows(dict[int, np.ndarray]):
    """The views of a warp by their index, made at first use: most warps execute only part of a kernel."""

    def __init__(self, views: list[tuple[int, int, np.dtype]], store: dict[int, np.ndarray]):
        super().__init__()
        self._views, self._store = views, store

    def __missing__(self, index: int) -> np.ndarray:
        size, row, dtype = self._views[index]
        view = self._store[size][row].view(dtype)
        if size != dtype.itemsize:
            view = view[:: size // dtype.itemsize]  # the low part
        self[index] = view
        return view


def put(to: np.ndarray, mask: np.ndarray, value: object) -> None:
    if mask is ALL:
        to[...] = value
    else:
        np.copyto(to, value, where=mask, casting="unsafe")
