"""python -m fuzz BACKEND [--examples N] [--seed S]: random calls on one backend, with the seed that repeats them."""

from __future__ import annotations

import argparse
import secrets
import time
from collections import Counter

import conftest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from .calls import Call, calls
from .compare import check

LARGEST_VOCAB = {"triton": 133}  # its interpreter is slow
CHUNK = 1000  # calls that one run of hypothesis draws


def fuzz(backend: str, examples: int, at: int | None = None) -> Counter[str]:
    """`examples` calls; `at`: the first seed, or None for the same calls each time. What was compared, counted."""
    counts: Counter[str] = Counter()
    for number, first in enumerate(range(0, examples, CHUNK)):
        size = min(CHUNK, examples - first)

        @settings(
            max_examples=size, deadline=None, database=None, derandomize=at is None,
            suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False,
        )  # fmt: skip
        @given(calls(dtypes_of(backend), LARGEST_VOCAB.get(backend, 2053)))
        def every(call: Call) -> None:
            check(call, backend, counts)

        if at is None:
            every()
            continue
        try:
            seed(at + number)(every)()
        except BaseException:
            print(f"again: python -m fuzz {backend} --examples {size} --seed {at + number}", flush=True)
            raise
    return counts


def dtypes_of(backend: str) -> tuple[str, ...]:
    names = ("float32", "bfloat16", "float16", "float64")
    return names[:3] if backend in conftest.NO_FLOAT64 else names


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("backend", choices=conftest.BACKENDS_HERE)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    at = secrets.randbits(32) if options.seed is None else options.seed
    print(f"{options.backend}: {options.examples} calls, --seed {at}", flush=True)
    torch.set_num_threads(1)
    conftest.pytest_configure()
    started = time.perf_counter()
    counts = fuzz(options.backend, options.examples, at)
    print(f"{time.perf_counter() - started:.0f} s")
    for name, count in sorted(counts.items()):
        print(f"{count:8d} {name}")


if __name__ == "__main__":
    main()
