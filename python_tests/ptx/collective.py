"""Instructions for which the lanes of a warp converge: they wait for all lanes that the mask names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .frame import ALL, LANES, Frame, put
from .memory import Trap
from .text import Instruction

_LANE = np.arange(LANES)


def _reach(mode: str, lane: np.ndarray, by: np.ndarray, clamp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lane from which a shuffle takes its value, and whether that is inside its segment."""
    limit, segment = clamp & 31, clamp >> 8 & 31
    last = (lane & segment) | (limit & ~segment)
    if mode == "up":
        source = lane - by
        return source, source >= last
    source = {"down": lane + by, "bfly": lane ^ by, "idx": (lane & segment) | (by & ~segment)}[mode]
    return source, source <= last


def _shfl(frame: Frame, ins: Instruction) -> Callable:
    mode = ins.parts[2]
    first, _, second = ins.operands[0].partition("|")
    target, in_segment = frame.target(first, "b32"), frame.target(second, "pred") if second else None
    value, by, clamp = frame.source(ins.operands[1], "b32"), *(frame.source(x, "u32") for x in ins.operands[2:4])

    def run(w, m):
        v = w.rows
        source, ok = _reach(mode, _LANE, v[by].astype(np.int64) & 31, v[clamp].astype(np.int64))
        source = np.where(ok, source, _LANE)
        if not m[source[m]].all():
            raise Trap(f"a shuffle from a lane that is not there: {ins.text}")
        result = v[value][source]
        put(v[target], m, result)
        if in_segment is not None:
            put(v[in_segment], m, ok)

    return run


REDUCE = {
    "add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def _redux(frame: Frame, ins: Instruction) -> Callable:
    kind = ins.parts[-1]
    target, a = frame.target(ins.operands[0], kind), frame.source(ins.operands[1], kind)
    fn = REDUCE[ins.parts[2]]
    return lambda w, m: put(w.rows[target], m, fn.reduce(w.rows[a][m], dtype=w.rows[a].dtype))


def _vote(frame: Frame, ins: Instruction) -> Callable:
    mode = ins.parts[2]
    kind = "b32" if mode == "ballot" else "pred"
    negated = ins.operands[1].startswith("!")
    target, a = frame.target(ins.operands[0], kind), frame.source(ins.operands[1].lstrip("!"), "pred")

    def run(w, m):
        says = (w.rows[a] ^ negated) & m
        results = {
            "ballot": lambda: np.packbits(says, bitorder="little").view(np.uint32)[0],
            "any": says.any,
            "all": lambda: (says == m).all(),
        }
        put(w.rows[target], m, results[mode]())

    return run


def members_of(frame: Frame, ins: Instruction) -> int | None:
    """The index of the mask that names the lanes which converge; None: all that have not exited."""
    name = ins.parts[0]
    if name in ("shfl", "redux", "vote") or ins.parts[:3] == ("bar", "warp", "sync"):
        return frame.source(ins.operands[-1], "u32")
    return None


def lanes_of(mask: int) -> np.ndarray:
    return ALL if mask == 0xFFFFFFFF else (mask >> _LANE & 1).astype(bool)


BUILDERS = {"shfl": _shfl, "redux": _redux, "vote": _vote}
