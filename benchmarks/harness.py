"""Runs cases under pytest-benchmark, and puts the record with all providers' results into its extra_info."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from grpo_kernels.tools.bench.case import Case
from grpo_kernels.tools.bench.clock import clock_for
from grpo_kernels.tools.bench.lengths import measure_lengths
from grpo_kernels.tools.bench.measure import Options, distance, measure, time_interleaved
from grpo_kernels.tools.providers import Ours, both, providers

from .cases import DEVICE, shrunk

PEDANTIC_ROUNDS = 3  # rounds of pytest-benchmark itself, which times only ours
Call = Callable[[], tuple[Tensor, ...]]


class Harness:
    """`full`: the shapes of real models, and torch.compile. `measuring`: False only checks that all providers agree."""

    def __init__(self, full: bool, measuring: bool):
        self.full, self.measuring = full, measuring
        self.records: list[dict[str, Any]] = []
        self.options = Options(device=DEVICE, compile=full, timed=measuring, strict=not full)

    def run(self, benchmark: Any, case: Case) -> None:
        case = case if self.full else shrunk(case)
        record = measure(case, providers(DEVICE), self.options)
        self.keep(benchmark, record)
        ours = next(p for p in providers(DEVICE) if isinstance(p, Ours) and not p.missing(DEVICE))
        run = ours.build(case.task, case.batch(DEVICE))
        rounds = PEDANTIC_ROUNDS if self.measuring else 1
        benchmark.pedantic(both, (run,), setup=_without_result(run.restore), rounds=rounds)

    def run_lengths(self, benchmark: Any, case: Case, lengths: tuple[int, ...]) -> None:
        record = measure_lengths(case if self.full else shrunk(case), providers(DEVICE), self.options, lengths)
        self.keep(benchmark, record)
        benchmark.pedantic(lambda: None, rounds=1)

    def run_calls(self, benchmark: Any, name: str, ours: Call, eager: Call, unit: Call, tolerance: float) -> None:
        """A case that no provider implements: ours compared with one baseline."""
        expected = ours()
        titles = {"ours-cpu": "this library, backend cpu", "eager": "plain PyTorch"}
        record: dict[str, Any] = {
            "case": name, "unit": "copy", "device": "cpu", "logits_bytes": 0, "active_share": 1.0,
            "input_bytes": unit()[0].nbytes,
            "providers": {who: {"title": title, "version": None} for who, title in titles.items()},
        }  # fmt: skip
        record["providers"]["eager"]["distance"] = distance(eager(), expected, tolerance)
        if self.measuring:
            few = Options(least_rounds=1, seconds=2.0)
            calls = {"ours-cpu": ours, "eager": eager}
            time_interleaved(record, calls, ("copy", unit), few, clock=clock_for("cpu"))
        self.keep(benchmark, record)
        benchmark.pedantic(ours, rounds=1)

    def keep(self, benchmark: Any, record: dict[str, Any]) -> None:
        if self.measuring:
            benchmark.extra_info.update(record)
            benchmark.group = record["case"]
            self.records.append(record)


def _without_result(restore: Callable[[], object] | None) -> Callable[[], None] | None:
    """pytest-benchmark would use a setup's result as arguments."""

    def setup() -> tuple[tuple, dict]:
        if restore is not None:
            restore()

    return setup if restore is not None else None
