"""The changes to a kernel's PTX with which SentryWard 0.1.1 can analyse it. Each removes something from the proof; its
docstring says what.

The letters are those of docs/reliability.md.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from .floats import BRANCH, float_branches

WATCH = re.compile(r"\{ \.reg \.pred over, early;.*?mov\.u32 (%r\d+), 0;.*?DONE: \}")
RETURNING = re.compile(r"\batom[.\w]*\.(?:add|inc|exch|max|min|or)\.\w+\s+(%\w+), \[[^\]]*\], [^;]*;")
REMAINDER = re.compile(r"(cvt\.u32\.u64\s+(%r\d+), %rd\d+;\s*)and\.b32\s+(%r\d+), \2, 1[245];")
LOADED = r"(?P<load>ld\.(?:volatile\.)?global(?:\.nc)?\.f32\s+(?P<number>%f\d+), [^;]*;(?:[^;]*;){0,2}?\s*)"
TESTED = r"setp\.(?P<test>neu|eq)\.f32\s+(?P<predicate>%p\d+), (?P=number), 0f00000000;"
SHARED_STORE = re.compile(r"\s*(?:@%\w+ )?st\.shared")


def plain(text: str) -> str:
    """Removes comments and debug information, which changes nothing."""
    text = re.sub(r"^\s*\.(?:loc|file)\b.*$|//.*$", "", text, flags=re.MULTILINE)
    text = text.partition("\t.section")[0]
    return re.sub(r"\n\s*\n+", "\n", text)


def unwatched(text: str) -> str:
    """W. Removes the watchdog before a wait (`watch` in csrc/cuda/async.cuh); the wait itself stays.

    No longer shown: that the watchdog, which reads the clock and the same barrier, terminates. It would end the kernel
    after 10 s in schedules which the proof of the wait behind it excludes."""
    return WATCH.sub(lambda m: f"mov.u32 {m[1]}, 0;", text)


def constant_atomics(text: str, value: int = 0) -> str:
    """A. An atomic that returns the old value returns `value` and changes nothing.

    No longer shown: communication between blocks through it. `value` is what the launch's only block, or the first,
    would get."""
    return RETURNING.sub(lambda m: f"mov.u32 {m[1]}, {value};", text)


def decided(text: str, taken: bool) -> tuple[str, int]:
    """F. Makes every branch on floating-point data go to the same side. Also returns how many there are.

    No longer shown: executions in which one goes to the other side, or threads diverge."""
    lines = text.split("\n")
    branches = float_branches(lines)
    for line, _ in branches:
        target = BRANCH.match(lines[line])[3]
        lines[line] = f"\tbra.uni {target};" if taken else ""
    return "\n".join(lines), len(branches)


def numbers_not_zero(text: str) -> str:
    """Z. A number that is compared with 0 right after it was loaded is not 0: all rows have a gradient.

    No longer shown: launches in which some rows have none, and are skipped by all warps."""
    return re.sub(
        LOADED + TESTED, lambda m: f"{m['load']}setp.eq.u32 {m['predicate']}, 0, {int(m['test'] == 'eq')};", text
    )


def aligned(text: str) -> str:
    """L. Every address is 0 modulo 16: for launches whose pointers and strides are multiples of 16.

    No longer shown: heads and tails of unaligned rows."""
    return REMAINDER.sub(lambda m: f"{m[1]}mov.u32 {m[3]}, 0;", text)


def guarded(text: str, lines: Collection[int]) -> str:
    """G. Only lane 0 executes these stores to shared memory.

    Triton lets all lanes of a warp store a reduction's result to one address. No longer shown: that all lanes have the
    same value. `check` guards only stores for which SentryWard's witness is this one instruction, twice in one warp."""
    code = text.split("\n")
    for n in lines:
        if not SHARED_STORE.match(code[n]):
            raise ValueError(f"not a plain store to shared memory: {code[n]!r}")
        guard = re.match(r"\s*@(%\w+) ", code[n])
        store = code[n].strip().removeprefix(guard[0].strip() if guard else "").strip()
        also = f" and.pred first, first, {guard[1]};" if guard else ""
        code[n] = (
            "\t{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0;"
            f"{also} @first {store} }}"
        )
    return "\n".join(code)
