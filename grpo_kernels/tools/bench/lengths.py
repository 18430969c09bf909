"""A new completion length at every step, as in training: who compiles again, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..providers import Compiled, Provider, both, in_one_line
from .case import Case
from .measure import Options

LENGTHS = (96, 101, 77, 128, 83, 119, 64, 110)  # no order, none twice


def measure_lengths(
    case: Case, chosen: Sequence[Provider], options: Options, lengths: Sequence[int] = LENGTHS
) -> dict[str, Any]:
    """Seconds of the first and of the second call at every length, in one process that has not seen it before.

    The difference of the two is what a new length costs: compiling, and nothing else that lasts.
    """
    record: dict[str, Any] = {
        "case": f"lengths {replace(case, tokens=max(lengths)).name}", **case.to_json(), "device": options.device,
        "lengths": list(lengths), "providers": {},
    }  # fmt: skip
    for provider in chosen:
        if case.task.path not in provider.paths:
            continue
        entry: dict[str, Any] = {"title": provider.title, "version": provider.version}
        record["providers"][provider.name] = entry
        able = provider.taking_part(case.task, options.device, compile=options.compile)
        if isinstance(able, str):
            entry["missing"] = able
            continue
        if isinstance(able, Compiled):
            able = Compiled(dynamic=None)  # what torch.compile does of itself: after two lengths a dynamic graph
        try:
            entry["first"], entry["again"] = _calls(case, able, lengths, options.device)
        except Exception as error:
            if options.strict:
                raise
            entry["failed"] = in_one_line(error)
    return record


def _calls(case: Case, provider: Provider, lengths: Sequence[int], device: str) -> tuple[list[float], list[float]]:
    first: list[float] = []
    again: list[float] = []
    torch.compiler.reset()
    for tokens in lengths:
        run = provider.build(case.task, replace(case, tokens=tokens).batch(device))
        for seconds in (first, again):
            if run.restore is not None:
                run.restore()
            _synchronise(device)
            begin = time.perf_counter()
            both(run)
            _synchronise(device)
            seconds.append(time.perf_counter() - begin)
    return first, again


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
