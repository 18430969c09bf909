"""A case is one input and every way to compute it; they are checked against each other, then timed taking turns."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.testing.bench import PROVIDERS, measure_interleaved, medians
from grpo_kernels.testing.memory import peak_memory

Call = Callable[[], tuple[Tensor, ...]]
OURS = "ours "
PEDANTIC_ROUNDS = 5
CHUNK = 1 << 17  # elements compared at a time, small enough for the L2
COMPARED_CHUNKS = 64  # of a tensor, evenly spread


@dataclass
class Case:
    """Calls return what is compared: losses, gradients, log-probs."""

    name: str
    ours: dict[str, Call]  # by variant
    eager: Call
    unit: tuple[str, Callable[[], object]]
    compiled: Call | None = None
    setup: Callable[[], None] | None = None  # restores what an in-place variant overwrote
    tolerance: float = 1e-4  # relative L2 distance from eager
    rounds: dict[str, int] = field(default_factory=dict)  # other than PROVIDERS'

    def providers(self) -> dict[str, Callable[[], object]]:
        unit, call = self.unit
        ours = {OURS + name: call for name, call in self.ours.items()}
        compiled = {} if self.compiled is None else {"compile": self.compiled}
        return {unit: call, **ours, "eager": self.eager, **compiled}

    def rounds_of(self, provider: str) -> int:
        kind = "ours" if provider.startswith(OURS) else "copy" if provider == self.unit[0] else provider
        return self.rounds.get(kind, PROVIDERS[kind].rounds)


@functools.lru_cache(maxsize=1)
def compiled(function: Callable, key: Hashable) -> Callable:
    """One compilation for consecutive cases of one key; the older graphs go, or dynamo would stop at its limit."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


class Harness:
    """Runs cases; remembers the last one, since its variants are consecutive tests, and everything to report."""

    def __init__(self, full: bool, measuring: bool):
        self.full, self.measuring = full, measuring
        self.reports: list[dict[str, Any]] = []
        self._key: Hashable = None
        self._case: Case | None = None
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}

    def run(self, benchmark: Any, key: Hashable, variant: str, build: Callable[[], Case]) -> None:
        case = self._prepared(key, build)
        if self.measuring:
            report = self._report(case, variant)
            benchmark.extra_info.update(report)
            benchmark.group = case.name
            self.reports.append(report)
        rounds = min(PEDANTIC_ROUNDS, case.rounds_of(OURS)) if self.measuring else 1
        benchmark.pedantic(case.ours[variant], setup=case.setup, rounds=rounds)

    def _prepared(self, key: Hashable, build: Callable[[], Case]) -> Case:
        if self._case is None or key != self._key:
            self._case = None
            case = build()
            check(case)
            if self.measuring:
                providers = case.providers()
                rounds = {name: case.rounds_of(name) for name in providers}
                self._seconds = medians(measure_interleaved(providers, rounds, case.setup, warm_up=False))
                self._peaks = {
                    name: peak_memory(call, setup=case.setup, warm_up=False, resident=False).tensor_bytes
                    for name, call in providers.items()
                    if name != case.unit[0]
                }
            self._key, self._case = key, case
        return self._case

    def _report(self, case: Case, variant: str) -> dict[str, Any]:
        """`seconds` are interleaved medians; `ratios`: how many times as long as ours each provider takes."""

        def own(values: dict[str, Any]) -> dict[str, Any]:
            others = {name: value for name, value in values.items() if not name.startswith(OURS)}
            return {"ours": values[OURS + variant], **others}

        seconds, peaks = own(self._seconds), own(self._peaks)
        ratios = {name: value / seconds["ours"] for name, value in seconds.items() if name != "ours"}
        name = f"{case.name}, {variant}"
        return {"case": name, "unit": case.unit[0], "seconds": seconds, "ratios": ratios, "peak_bytes": peaks}


def check(case: Case) -> None:
    """Every provider computes the same thing, and has run once; a compiler that fails is left out, visibly."""
    case.unit[1]()
    expected = case.eager()
    for variant, call in case.ours.items():
        if case.setup is not None:
            case.setup()
        compare(f"{case.name}, {variant}", call(), expected, case.tolerance)
    if case.compiled is not None:
        try:
            found = case.compiled()
        except Exception as error:
            warnings.warn(f"{case.name}: torch.compile left out: {type(error).__name__}", stacklevel=2)
            case.compiled = None
        else:
            compare(f"{case.name}, compile", found, expected, case.tolerance)


def compare(name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        distance = relative_distance(x, y)
        if not distance <= tolerance:
            raise AssertionError(f"{name}: output {i} is {distance:.2e} away from eager's (tolerance {tolerance:.0e})")


def relative_distance(x: Tensor, y: Tensor) -> float:
    """L2, of some chunks of a tensor as large as the logits."""
    difference = norm = 0.0
    pairs = list(zip(x.detach().reshape(-1).split(CHUNK), y.detach().reshape(-1).split(CHUNK), strict=True))
    for a, b in pairs[:: max(1, len(pairs) // COMPARED_CHUNKS)]:
        difference += (a.float() - b.float()).square().sum(dtype=torch.float64).item()
        norm += b.float().square().sum(dtype=torch.float64).item()
    return (difference / norm) ** 0.5 if norm else difference**0.5
