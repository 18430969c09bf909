"""Runs cases one after another in a process that may die in any of them; protocol.py tells the parent which.

A separate thread ends the process if a case takes too long, even if the main thread hangs in the driver. The parent
then continues after that case.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .measure import synchronize
from .protocol import CUDA_ERROR, Figures

CAPTURE = re.compile("captur")  # a failed capture does not lose the context
CUDA_ERRORS = re.compile(r"CUDA error|cudaError|kernel \w+: .*(launch|illegal|misaligned)|unspecified launch failure")
STAND_INS = {"cuda": "cpu", "triton": "reference"}  # for a machine without a GPU


@dataclass(frozen=True)
class Context:
    """The device on which the cases run, and their random numbers."""

    backend: str
    device: str
    seed: int

    @property
    def small(self) -> bool:
        """On a CPU the inputs are small: only the code path is tested."""
        return self.device == "cpu"

    @property
    def kernels(self) -> str:
        return STAND_INS[self.backend] if self.small else self.backend

    def generator(self, name: str) -> torch.Generator:
        """The generator of a case's random numbers, which do not depend on the cases before it."""
        return torch.Generator(self.device).manual_seed(self.seed ^ zlib.crc32(name.encode()))

    def synchronize(self) -> None:
        synchronize(self.device)


@dataclass(frozen=True)
class Case:
    """`run` raises AssertionError for a wrong result; its return value is saved."""

    name: str
    family: str
    run: Callable[[Context], Figures | None]


def run_cases(cases: Iterable[Case], context: Context, options: argparse.Namespace) -> int:
    """The exit status: 0 if all are good, 1, or CUDA_ERROR."""
    print(f"seed {context.seed}", flush=True)
    status, behind = 0, options.behind is None
    torch.zeros(1, device=context.device)  # creates the context, which may take seconds
    context.synchronize()
    for case in cases:
        if not behind:
            behind = case.name == options.behind
            continue
        if case.family in options.skip:
            continue
        # Any Triton case may compile.
        word, figures = one(case, context, options.first_seconds if context.backend == "triton" else options.seconds)
        print(f"{word} {case.name} | {json.dumps(figures)}", flush=True)
        if figures.get("cuda_error"):
            return CUDA_ERROR
        status = status or int(word != "ok")
    return status


def one(case: Case, context: Context, limit: float) -> tuple[str, Figures]:
    print(f"start {case.name} | {json.dumps({'family': case.family})}", flush=True)
    faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
    begin = time.perf_counter()
    try:
        rehearse(case.name, context)
        figures = case.run(context) or {}
        context.synchronize()
        return "ok", {"ms": round((time.perf_counter() - begin) * 1e3, 1), **figures}
    except AssertionError as error:
        return "WRONG", {"what": str(error)[:400]}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        where = traceback.format_exc().strip().splitlines()[-6:]
        return "EXC", {"what": text[:400], "where": where, "cuda_error": lost_context(text)}
    finally:
        faulthandler.cancel_dump_traceback_later()


def lost_context(text: str) -> bool:
    return bool(CUDA_ERRORS.search(text)) and not CAPTURE.search(text)


def rehearse(name: str, context: Context) -> None:
    """Simulates a GPU's failures for the script's tests: GRPO_KERNELS_REHEARSE="hang=NAME;raise=NAME;lose=NAME"."""
    for entry in os.environ.get("GRPO_KERNELS_REHEARSE", "").split(";") if context.small else ():
        kind, _, which = entry.partition("=")
        if which == name:
            while kind == "hang":
                time.sleep(1)
            raise RuntimeError("a rehearsal" if kind == "raise" else "CUDA error: a rehearsal")


def arguments(argv: Sequence[str] | None, lists: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", choices=lists)
    parser.add_argument("--backend", default="cuda", choices=list(STAND_INS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=None, help="seed of the inputs (default: a new one)")
    parser.add_argument("--family", default=None, help="only this family")
    parser.add_argument("--skip", default="", type=lambda names: names.split(","), help="families that have hung")
    parser.add_argument("--from", dest="behind", default=None, metavar="NAME", help="continue after this case")
    parser.add_argument("--seconds", type=float, default=12.0, help="limit of a case (default %(default)s)")
    parser.add_argument("--first-seconds", type=float, default=25.0, help="limit of a case that may compile (Triton)")
    return parser.parse_args(argv)
