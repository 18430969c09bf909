"""Finds a kernel's branches that depend on floats from shared memory.

SentryWard refuses such a launch if asynchronous copies write to shared memory. Branches on floats from global memory
need no rewrite: with `representative_branches` SentryWard takes one side of them."""

from __future__ import annotations

import re
from typing import NamedTuple

REGISTER = re.compile(r"%[A-Za-z_]\w*")
INSTRUCTION = re.compile(r"^\s*(?:\{\s*)?(@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*?);")
FLOAT = re.compile(r"\.(f16|f16x2|bf16|bf16x2|f32|f64)\b")
BRANCH = re.compile(r"^\s*@(!?)(%\w+)\s+bra(?:\.uni)?\s+([\w$]+)\s*;")
# Data from parameters, indices and global memory; from shared memory; from shared memory as a floating-point number.
NOTHING, DATA, FLOAT_DATA = range(3)


class Branch(NamedTuple):
    line: int
    predicate: str


def float_branches(lines: list[str]) -> list[Branch]:
    """These branches, in order. The data flow ignores the order of the lines: a register is float data if any line
    makes it that."""
    kinds = _kinds([match for line in lines if (match := _definition(line))])
    branches = [Branch(i, match[2]) for i, line in enumerate(lines) if (match := BRANCH.match(line))]
    return [branch for branch in branches if kinds.get(branch.predicate) == FLOAT_DATA]


class Definition(NamedTuple):
    results: tuple[str, ...]
    sources: tuple[str, ...]
    loads: bool
    floats: bool


def _definition(line: str) -> Definition | None:
    match = INSTRUCTION.match(line)
    if match is None or match[2].split(".")[0] in ("bra", "st", "red", "bar", "ret", "mbarrier", "barrier", "fence"):
        return None
    opcode, operands = match[2], match[3]
    head, _, tail = operands.partition("}") if operands.startswith("{") else operands.partition(",")
    name = opcode.split(".")[0]
    loads = name == "ld" and ".shared" in opcode
    sources = () if name == "ld" else tuple(REGISTER.findall(tail))
    return Definition(tuple(REGISTER.findall(head)), sources, loads, bool(FLOAT.search(opcode)))


def _kinds(definitions: list[Definition]) -> dict[str, int]:
    kinds: dict[str, int] = {}
    changed = True
    while changed:
        changed = False
        for results, sources, loads, floats in definitions:
            kind = DATA if loads else max((kinds.get(s, NOTHING) for s in sources), default=NOTHING)
            if kind == DATA and floats:
                kind = FLOAT_DATA
            for result in results:
                if kinds.get(result, NOTHING) < kind:
                    kinds[result], changed = kind, True
    return kinds
