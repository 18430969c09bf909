"""Loads, stores and atomic operations."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .frame import ALL, Frame, dtype_of
from .text import Instruction, size_of, split

STRONG = ("volatile", "relaxed", "acquire", "release")  # visible to all at once, and never a race
RELEASES = ("release", "acq_rel")


def address_of(frame: Frame, operand: str) -> Callable[[object], np.ndarray]:
    """[register or symbol, plus a number] as 32 signed integers."""
    match = re.fullmatch(r"\[\s*([%$\w.@]+?)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    if match is None:
        raise NotImplementedError(f"address {operand!r}")
    name, offset = match[1], int(match[2] or "0", 0)
    is_register = name in frame.kernel.registers
    index = frame.source(name, "u32" if is_register and frame.size(name) == 4 else "u64")
    return lambda w: w.rows[index].astype(np.int64) + offset


def space_of(parts: tuple[str, ...]) -> str:
    for space in ("param", "global", "const"):
        if space in parts:
            return space
    return "shared" if any(p.startswith("shared") for p in parts) else "generic"


def _names(operand: str) -> list[str]:
    return split(operand[1:-1].strip()) if operand.startswith("{") else [operand]


def load(frame: Frame, ins: Instruction) -> Callable:
    kind, space = ins.parts[-1], space_of(ins.parts)
    size, dtype = size_of(kind), dtype_of(kind)
    targets = [frame.target(x, kind) for x in _names(ins.operands[0])]
    address, count = address_of(frame, ins.operands[1]), len(targets)
    strong = any(p in STRONG for p in ins.parts)

    def run(w, m):
        at = address(w)
        if space == "param":
            values = w.block.grid.parameters(int(at[0] if m is ALL else at[m][0]), size, count)
        else:
            values = w.block.load(w, space, at if m is ALL else at[m], size, count, strong)
        values = values.view(dtype)
        for k, target in enumerate(targets):
            w.rows[target][... if m is ALL else m] = values[:, k]

    return run


def store(frame: Frame, ins: Instruction) -> Callable | None:
    kind, space = ins.parts[-1], space_of(ins.parts)
    if "async" in ins.parts:
        raise NotImplementedError("a store that an mbarrier counts")
    if space == "param":  # arguments of a call, which ends the kernel
        return lambda w, m: None
    size = size_of(kind)
    sources = [frame.source(x, f"u{8 * size}") for x in _names(ins.operands[1])]
    address, strong = address_of(frame, ins.operands[0]), any(p in STRONG for p in ins.parts)

    def run(w, m):
        at, values = address(w), np.stack([w.rows[i] for i in sources], axis=1)
        if "release" in ins.parts:
            w.block.publish(w)
        if m is not ALL:
            at, values = at[m], values[m]
        w.block.store(w, space, at, size, values, strong)

    return run


def _operation(ins: Instruction, size: int) -> Callable[..., int]:
    """Maps the value in memory and the operands, as unsigned integers, to the value afterwards."""
    mask, signed = (1 << 8 * size) - 1, ins.parts[-1].startswith("s")
    name = next(p for p in ins.parts if p in ("add", "cas", "exch", "and", "or", "xor", "min", "max"))
    if ins.parts[-1].startswith("f"):
        raise NotImplementedError("an atomic operation on floats: its order would change bits")

    def value(x: int) -> int:
        return x - (1 << 8 * size) if signed and x >> (8 * size - 1) else x

    return {
        "add": lambda old, x: old + x & mask,
        "exch": lambda old, x: x,
        "cas": lambda old, expected, x: x if old == expected else old,
        "and": lambda old, x: old & x,
        "or": lambda old, x: old | x,
        "xor": lambda old, x: old ^ x,
        "min": lambda old, x: min(old, x, key=value),
        "max": lambda old, x: max(old, x, key=value),
    }[name]


def atomic(frame: Frame, ins: Instruction) -> Callable:
    """Lane after lane, in an order on which nothing may depend."""
    kind, space = ins.parts[-1], space_of(ins.parts)
    if "async" in ins.parts:
        raise NotImplementedError("a reduction that an mbarrier counts")
    size = size_of(kind)
    operands = ins.operands if ins.parts[0] == "atom" else ("_", *ins.operands)
    target = frame.target(operands[0], kind)
    address, sources = address_of(frame, operands[1]), [frame.source(x, f"u{8 * size}") for x in operands[2:]]
    operation = _operation(ins, size)

    def run(w, m):
        at = address(w)
        if any(p in RELEASES for p in ins.parts):
            w.block.publish(w)
        for lane in w.block.grid.shuffled(np.flatnonzero(m).tolist()):
            values = [int(w.rows[i][lane]) for i in sources]
            before = w.block.modify(space, int(at[lane]), size, lambda old, v=values: operation(old, *v))
            if target is not None:
                w.rows[target][lane] = np.array(before, f"u{size}").astype(w.rows[target].dtype)

    return run


BUILDERS = {"ld": load, "ldu": load, "st": store, "atom": atomic, "red": atomic}
