"""Measures everything in docs/benchmarks.md, on a CPU in about five minutes: `python -m benchmarks.measure_docs`.

Then `python -m benchmarks.report benchmarks/results/cpu.json --into docs/benchmarks.md` writes tables and pictures.
A GPU is fast enough for all cases: `pytest benchmarks --full`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_kernels.tools.bench.case import Case, of_model
from grpo_kernels.tools.bench.lengths import measure_lengths
from grpo_kernels.tools.bench.measure import Options, measure
from grpo_kernels.tools.bench.results import Results, now
from grpo_kernels.tools.bench.sweeps import SWEEPS
from grpo_kernels.tools.environment import machine_info
from grpo_kernels.tools.providers import Ours, Provider, Task, providers

from .cases import DEVICE, ENTROPY, KL, advantages

OUT = Path(__file__).parent / "results" / "cpu.json"
LARGE, SMALL = "qwen2.5-0.5b", "smollm2-135m"
ALL = providers(DEVICE)
BRIEF = [p for p in ALL if not (isinstance(p, Ours) and p.way)]
QUICK = [p for p in BRIEF if not p.compiles]
SECONDS = 0.3  # for each provider's rounds of a case
COMMAND = "python -m benchmarks.measure_docs"
MOST_ROWS = 512  # of a sweep
LINEAR_FEW = ("ours-cpu", "eager", "compile", "trl")  # Liger takes seconds per call


def cases() -> Iterator[tuple[Case, Sequence[Provider]]]:
    """The overview, with all providers on every path; then what changes our time, without providers that compile."""
    logits = of_model(LARGE, Task("logits"), 4, 64)
    yield logits, ALL
    yield of_model(SMALL, Task("logits"), 4, 128), ALL
    yield of_model(SMALL, Task("linear"), 4, 128), ALL
    yield replace(logits, task=Task("logps"), mode="no_grad", hidden=0), BRIEF
    yield Case(Task("tokens", kl_coef=KL), "", 64, 1024, dtype="fp32"), BRIEF
    for case in (advantages()[0], advantages()[-1]):
        yield case, BRIEF
    small = of_model(SMALL, Task("logits"), 4, 64)
    tasks = [Task("logits", kl_coef=KL), Task("logits", entropy_coef=ENTROPY), Task("logits", "gspo")]
    changes: list[dict[str, Any]] = [
        {"dtype": "fp32"}, {"fill": 0.3}, {"silent": 0.4}, {"peaked": True}, {"upstream": 0.5},
        *({"task": task} for task in tasks),
    ]  # fmt: skip
    for change in changes:
        yield replace(small, **change), QUICK


def sweeps() -> Iterator[tuple[str, Case, Sequence[Provider]]]:
    yield "vocabulary", of_model(SMALL, Task("logits"), 2, 32), BRIEF
    yield "tokens", of_model(SMALL, Task("linear"), 2, 1), [p for p in BRIEF if p.name in LINEAR_FEW]
    yield "fill", of_model(SMALL, Task("linear"), 4, 32), [p for p in QUICK if p.name in LINEAR_FEW]
    yield "losses", of_model(SMALL, Task("logits"), 2, 64), QUICK
    yield "group-size", of_model(SMALL, Task("logits"), 1, 1), QUICK


def measured(options: Options) -> Iterator[dict[str, Any]]:
    for case, chosen in cases():
        yield measure(case, chosen, options)
    for name, case, chosen in sweeps():
        points = [
            (x, point) for x, point in SWEEPS[name][1](case) if point.task.path != "linear" or point.rows <= MOST_ROWS
        ]
        for x, point in points:
            yield {**measure(point, chosen, options), "sweep": name, "axis": SWEEPS[name][0], "x": x}
    yield measure_lengths(of_model(SMALL, Task("logits"), 1, 1), BRIEF, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each provider's rounds of a case")
    given = parser.parse_args()
    begin, machine = time.monotonic(), machine_info()  # the commit of the code that runs
    records: list[dict[str, Any]] = []
    for record in measured(Options(device=DEVICE, seconds=given.seconds)):
        records.append(record)
        print(f"{time.monotonic() - begin:6.0f} s  {record['case']}", flush=True)
        Results(machine, records, now(), COMMAND).save(
            given.out
        )  # after each record, so that an interruption loses nothing


if __name__ == "__main__":
    main()
