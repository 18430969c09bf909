"""Mutants: one thing is removed from a kernel's PTX, and the machine has to notice, or its verdicts would mean nothing.
Prints a line of JSON for each: `python -m ptx.mutants cuda|triton [--soak]`."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any, NamedTuple

from .cases import CASES
from .machine import Options
from .run import backend_on_ptx, outcome


class Mutant(NamedTuple):
    what: str
    case: str
    kernel: str  # part of its name
    old: str  # a pattern
    new: str = ""
    which: slice = slice(0, 1)  # which occurrences of the pattern
    seeds: int = 2  # the number of schedules
    soak: bool = False


FENCE = r"(membar\.gl|fence\.\w+\.gpu);"
WAIT = r"mbarrier\.(try|test)_wait\.parity\S* ([%\w]+), [^;]*;"
COPIES_NEXT = r"(?:(?!_wait\.parity)[\s\S])*?cp\.async\.(bulk|cg)"  # before another wait: the waits of the loading warp
WATCHED = r" @over bra DONE; (nanosleep\S* \d+; )?mov\.u64 now"  # the watchdog loop before such a wait
OVER = r"setp.eq.u32 \2, 0, 0;"  # the wait always succeeds
ARRIVAL = r"mbarrier\.arrive\.shared(::cta)?\.b64 [%\w]+, [^;]*;"
ACQUIRE_RELEASE = r"acq_rel(?=\.add)"
BARRIER = r"bar(rier)?\.sync(\.aligned)?\s+\d+;"
NAMED_BARRIER = r"bar(rier)?\.sync(\.aligned)?\s+[^;]*,[^;]*;"
CLUSTER_WAIT = r"mbarrier\.(try|test)_wait\.parity\S*\.cluster\S* ([%\w]+), [^;]*;"
CLUSTER_SYNC = r"barrier\.cluster\.arrive\S*;\s*barrier\.cluster\.wait\S*;"

FIRST, SECOND, ALL = slice(0, 1), slice(1, 2), slice(None)

CUDA = [
    Mutant("the fences of an arrival", "whiten", "moments_kernel", FENCE, "", ALL),
    Mutant("the fences between tiles", "gae", "gae_kernel", FENCE, "", ALL),
    Mutant("the barrier of a block's sum", "value", "value_kernel", BARRIER),
    Mutant(
        "the wait for a free slot", "loss with a tail", "row_kernel", f"{WAIT}(?={WATCHED}|{COPIES_NEXT})", OVER, ALL
    ),
    Mutant("the waits for tiles", "loss in place", "row_kernel", f"{WAIT}(?!{COPIES_NEXT})", OVER, ALL),
    Mutant("the barrier before a row's result", "two passes", "row_kernel", NAMED_BARRIER),
    Mutant("the wait for the cluster", "loss of a cluster", "row_kernel", CLUSTER_WAIT, OVER),
    Mutant("the fences of a sequence's tiles", "tokens of several tiles", "token_kernel", FENCE, "", ALL, soak=True),
    Mutant("the release of a slot", "loss with a tail", "row_kernel", ARRIVAL, "", ALL, soak=True),
    Mutant("the barrier behind a row's result", "two passes", "row_kernel", NAMED_BARRIER, "", SECOND, soak=True),
    Mutant("the first sync of the cluster", "loss of a cluster", "row_kernel", CLUSTER_SYNC, "", FIRST, 6, soak=True),
]
TRITON = [
    Mutant("a barrier of a group's reduction", "group", "group_kernel", BARRIER),
    Mutant("the barriers of a scan", "gae", "gae_kernel", BARRIER, "", ALL),
    Mutant("the release of an arrival", "tokens token", "token_kernel", ACQUIRE_RELEASE, "relaxed"),
    Mutant("the barriers of a row", "loss in place", "policy_kernel", BARRIER, "", ALL, soak=True),
]
MUTANTS = {"cuda": CUDA, "triton": TRITON}


def mutated(mutant: Mutant, text: str, entry: str) -> str:
    if mutant.kernel not in entry:
        return text
    begin = text.index(f".entry {entry}(")
    end = text.index("\n}", begin)
    body = text[begin:end]
    places = list(re.finditer(mutant.old, body))[mutant.which]
    if not places:
        raise ValueError(f"{mutant.what}: {mutant.old!r} is not in {entry}, or not so often")
    for place in reversed(places):
        body = body[: place.start()] + place.expand(mutant.new) + body[place.end() :]
    return text[:begin] + body + text[end:]


def verdict(on_ptx: Any, backend: str, mutant: Mutant) -> str:
    """The error under the first schedule that notices the mutant, or 'ok' if none does."""
    on_ptx.edit = lambda text, entry: mutated(mutant, text, entry)
    said = "ok"
    for seed in range(mutant.seeds):
        said = outcome(on_ptx, backend, CASES[backend][mutant.case], Options(seed=seed, resident=2))["said"]
        if said != "ok":
            break
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=MUTANTS)
    parser.add_argument("--soak", action="store_true", help="those that take long")
    args = parser.parse_args()
    on_ptx = backend_on_ptx(args.backend)
    for mutant in MUTANTS[args.backend]:
        if mutant.soak == args.soak:
            print(json.dumps({"mutant": mutant.what, "said": verdict(on_ptx, args.backend, mutant)}), flush=True)


if __name__ == "__main__":
    main()
