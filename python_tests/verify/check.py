"""SentryWard's verdict on a launch."""

from __future__ import annotations

import json
import re
import resource
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from .capture import Launch
from .rewrites import aligned, constant_atomics, decided, guarded, numbers_not_zero, plain, unwatched

PROVEN = "race_free"  # the tool's result when synchronization and memory are both proven
MEMORY_MIB, MOST_GUARDS = 8000, 40


class Options(NamedTuple):
    """The rewrites of a check, in addition to W and G, which are applied wherever they match."""

    atomics: bool = False  # A
    nonzero: bool = False  # Z
    aligned: bool = False  # L
    taken: bool | None = None  # F: whether branches on floats are taken; None: they are not rewritten
    seconds: float = 1800  # of wall time, enough for a busy machine


class Verdict(NamedTuple):
    result: str
    said: str  # details for the reader
    seconds: float  # CPU time of the verifier
    guards: int  # stores that G has guarded
    decided: int  # branches that F has decided


def verdict(launch: Launch, options: Options = Options()) -> Verdict:  # noqa: B008
    text, count = unwatched(plain(launch.ptx)), 0
    if options.atomics:
        text = constant_atomics(text)
    if options.nonzero:
        text = numbers_not_zero(text)
    if options.aligned:
        if any(pointer.get("base_byte_offset", 0) % 16 for pointer in launch.input["declarations"]):
            raise ValueError("L needs pointers that are multiples of 16")
        text = aligned(text)
    if options.taken is not None:
        text, count = decided(text, options.taken)
    guards, begun, before = set[int](), time.monotonic(), cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        while True:
            now = guarded(text, guards)
            report = verified(now, launch.input, Path(folder), options.seconds - (time.monotonic() - begun))
            more = warps_own_stores(report, text, guards)
            if not more or len(guards) > MOST_GUARDS:
                break
            guards |= more
    seconds = round(cpu_seconds() - before, 1)
    return Verdict(report["result"], described(report, now.split("\n")), seconds, len(guards), count)


def verified(text: str, inputs: dict[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    import sentryward

    ptx, written = folder / "kernel.ptx", folder / "input.json"
    ptx.write_text(text)
    written.write_text(json.dumps(inputs))
    return sentryward.verify(ptx, input=written, timeout_seconds=max(1.0, seconds), memory_limit_mib=MEMORY_MIB)


def cpu_seconds() -> float:
    """CPU time of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def warps_own_stores(report: dict[str, Any], text: str, guards: set[int]) -> set[int]:
    """The lines of the stores for G: the race is of one warp with itself at one store. The other stores through the
    same register are included: those of other reductions, through the same memory."""
    if report["result"] != "potential_race":
        return set()
    race = report["races"][0]
    first, second = race["first"], race["second"]
    line = first["location"]["line"] - 1
    lines = text.split("\n")
    if (
        second["location"]["line"] - 1 != line
        or first["actor"] // 32 != second["actor"] // 32
        or {first["mode"], second["mode"]} != {"write"}
        or race["region"]["address_space"] != "shared"
        or line in guards
    ):
        return set()
    register = re.search(r"\[(%\w+)", lines[line])[1]
    same = re.compile(rf"\s*(@%\w+ )?st\.shared[.\w]*\s+\[{register}\]")
    return {n for n, x in enumerate(lines) if n not in guards and (n == line or same.match(x))}


def described(report: dict[str, Any], lines: list[str]) -> str:
    """The error, and where it is."""
    if report["result"] == PROVEN:
        return ""
    if report["result"] == "potential_race":
        race = report["races"][0]
        accesses = [
            f"{x['mode']} by {x['actor']} at {lines[x['location']['line'] - 1].strip()!r}"
            for x in (race["first"], race["second"])
        ]
        return f"{race['region']['address_space']} memory: {' and '.join(accesses)}"
    diagnostics = report.get("diagnostics") or [{}]
    where = (diagnostics[0].get("details") or {}).get("location")
    line = f" at {lines[where['line'] - 1].strip()!r}" if isinstance(where, dict) and "line" in where else ""
    first = diagnostics[0]
    return f"{first.get('code')}{line} in {report.get('stage')}: {json.dumps(first.get('details'))[:600]}"
