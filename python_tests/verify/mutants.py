"""Mutants: one thing is wrong in a kernel's PTX, and SentryWard must not prove it, or its verdicts would mean nothing.
Prints a line of JSON for each: `python -m verify.mutants cuda|triton [WORD ...]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from ptx.mutants import (
    ALL,
    ARRIVAL,
    BARRIER,
    CLUSTER_SYNC,
    CLUSTER_WAIT,
    COPIES_NEXT,
    FENCE,
    NAMED_BARRIER,
    OVER,
    SECOND,
    WAIT,
    WATCHED,
    Mutant,
    mutated,
)

from .cases import CASES, backend_of
from .check import Verdict
from .run import verdicts

# The results that mean: some schedule goes wrong. `unsupported` and `timeout` are no verdict.
NOTICED = "not_wellsynced", "potential_race", "invalid_lifecycle"

LAST = slice(-1, None)
EXPECTED = r"(\{ \.reg \.b64 state;) (mbarrier\.arrive\.expect_tx\S* state, \[%r\d+\], )(%r\d+);"
# The inits of a full and a free slot, several times since the loop is unrolled.
INITS = r"(mbarrier\.init\.shared\.b64 \[%r\d+\], )(%r\d+);([\s\S]*?)(mbarrier\.init\.shared\.b64 \[%r\d+\], )(%r\d+);"
ONE_FULL_MORE = r"{ .reg .b32 more; add.u32 more, \2, 1; \1more; }\3\4\5;"
ONE_FREE_MORE = r"\1\2;\3{ .reg .b32 more; add.u32 more, \5, 1; \4more; }"
WARP_SYNC = r"bar\.warp\.sync\s+-1;(?=(?:(?!bar\.warp)[\s\S]){0,300}?mbarrier\.arrive\.shared)"
TILE_WAIT = rf"(mbarrier\.try_wait\.parity\.shared\.b64 over, \[%r\d+\]), %r\d+;(?!{COPIES_NEXT})"
COPIED = r"cp\.async\.mbarrier\.arrive\.noinc\S* [^;]*;"
LAST_STORE_AND_ARRIVAL = (
    r"(st\.shared::cluster\.b32 [^;]*;)((?:(?!st\.shared::cluster)[\s\S])*?)(\{ \.reg \.b32 there; mapa[^}]*\})"
)
REMOTE_ARRIVAL = r"\{ \.reg \.b32 there; mapa[^}]*\}"

RING, BACKWARD, PAIR = "rows, ring", "rows, backward", "rows, cluster of 2, branches taken"
CP_ASYNC, ROW = "rows by cp.async", "row_kernel"

CUDA = [
    Mutant("the wait for a free slot", RING, ROW, f"{WAIT}(?={WATCHED}|{COPIES_NEXT})", OVER, ALL),
    Mutant("the waits for tiles", RING, ROW, f"{WAIT}(?!{COPIES_NEXT})", OVER, ALL),
    Mutant("the waits for tiles, backward", BACKWARD, ROW, f"{WAIT}(?!{COPIES_NEXT})", OVER, ALL),
    Mutant("the phase of the waits for tiles", RING, ROW, TILE_WAIT, r"\1, 0;", ALL),
    Mutant("the release of a slot", RING, ROW, ARRIVAL, "", ALL),
    Mutant("a slot is released before its warp's sync", RING, ROW, WARP_SYNC, "", ALL),
    Mutant("the barrier behind the inits", RING, ROW, BARRIER),
    Mutant("the barrier before a row's result", RING, ROW, NAMED_BARRIER),
    Mutant("the barrier behind a row's result", RING, ROW, NAMED_BARRIER, "", SECOND),
    Mutant("16 bytes too few are expected", RING, ROW, EXPECTED, r"\1 .reg .b32 less; sub.u32 less, \3, 16; \2less;"),
    Mutant("an arrival too many for a full slot", RING, ROW, INITS, ONE_FULL_MORE, ALL),
    Mutant("an arrival too many for a free slot", RING, ROW, INITS, ONE_FREE_MORE, ALL),
    Mutant("the arrival behind copies", CP_ASYNC, ROW, COPIED, "", ALL),
    Mutant("the wait for the cluster", PAIR, ROW, CLUSTER_WAIT, OVER),
    Mutant("the arrival at the other block", PAIR, ROW, REMOTE_ARRIVAL),
    Mutant("the first sync of the cluster", PAIR, ROW, CLUSTER_SYNC),
    Mutant("the first sync is only the block's", PAIR, ROW, CLUSTER_SYNC, "bar.sync 0;"),
    Mutant("the arrival comes before its store", PAIR, ROW, LAST_STORE_AND_ARRIVAL, r"\2\3 \1"),
    Mutant("a barrier of a scan", "gae", "gae_kernel", BARRIER, "", SECOND),
    Mutant("the barrier of a block's sum", "value", "value_kernel", BARRIER),
]
TRITON = [
    *(Mutant(f"barrier {i} of a group", "group", "group_kernel", BARRIER, "", slice(i, i + 1)) for i in range(3)),
    *(
        Mutant(f"barrier {i} of a row", "statistics, unsplit rows", "stats_kernel", BARRIER, "", slice(i, i + 1))
        for i in range(2)
    ),
]
MUTANTS = {"cuda": CUDA, "triton": TRITON}

INIT_FENCE = r"fence\.mbarrier_init\.release\.cluster;"

# What this layer does not notice, why, and which layer does. The tests check that too, so that the list stays true.
UNNOTICED = {
    "cuda": [
        (Mutant("the publishing of barriers", RING, ROW, INIT_FENCE), "fences are not modelled: test_cuda_rows.py"),
        (
            Mutant("the last sync of the cluster", PAIR, ROW, CLUSTER_SYNC, "", LAST),
            "the exit of a block before another writes into it is not modelled: test_cuda_rows.py",
        ),
        (
            Mutant("the fences between tiles", "gae", "gae_kernel", FENCE, "", ALL),
            "blocks that communicate are not covered (A, one block): ptx/mutants.py",
        ),
        (
            Mutant("a maximum that is a minimum", "rows, backward", ROW, r"max\.f32", "min.f32", ALL),
            "values are not covered: the accuracy rule, in every layer that computes",
        ),
    ],
    "triton": [],
}


def outcome(name: str, backend: Any, capture: Any, mutant: Mutant) -> Verdict:
    capture.edit = lambda text, entry: mutated(mutant, text, entry)
    return verdicts(name, backend, capture, CASES[name][mutant.case])[-1]


def asked(name: str) -> Iterator[tuple[Mutant, bool]]:
    """All mutants of a backend, and whether they have to be noticed."""
    yield from ((mutant, True) for mutant in MUTANTS[name])
    yield from ((mutant, False) for mutant, _ in UNNOTICED[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=MUTANTS)
    parser.add_argument("words", nargs="*", help="words in the names of the mutants to run")
    args = parser.parse_args()
    backend, capture = backend_of(args.backend)
    for mutant, expected in asked(args.backend):
        if not args.words or any(word in mutant.what for word in args.words):
            verdict = outcome(args.backend, backend, capture, mutant)
            noticed = verdict.result in NOTICED
            line = {"mutant": mutant.what, "noticed": noticed, "to be noticed": expected, **verdict._asdict()}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
