"""Cases one after another in a process that may die at any of them, and says at which (protocol.py).

A case that does not end ends the process from a thread of its own, also where the main one hangs in the driver; the
parent goes on behind it.
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

CAPTURE = re.compile("captur")  # a graph that could not be made takes nothing with it
CUDA_ERRORS = re.compile(r"CUDA error|cudaError|kernel \w+: .*(launch|illegal|misaligned)|unspecified launch failure")
STAND_INS = {"cuda": "cpu", "triton": "reference"}  # without a GPU


@dataclass(frozen=True)
class Context:
    """Where the cases run, and their random numbers."""

    backend: str
    device: str
    seed: int

    @property
    def small(self) -> bool:
        """On a CPU only the path is walked."""
        return self.device == "cpu"

    @property
    def kernels(self) -> str:
        return STAND_INS[self.backend] if self.small else self.backend

    def generator(self, name: str) -> torch.Generator:
        """Of the case's own numbers, whichever cases ran before it."""
        return torch.Generator(self.device).manual_seed(self.seed ^ zlib.crc32(name.encode()))

    def synchronize(self) -> None:
        synchronize(self.device)


@dataclass(frozen=True)
class Case:
    """`run` raises AssertionError for a wrong result; what it returns is kept."""

    name: str
    family: str
    run: Callable[[Context], Figures | None]


def run_cases(cases: Iterable[Case], context: Context, options: argparse.Namespace) -> int:
    """The exit status: 0 where all are good, 1, or CUDA_ERROR."""
    print(f"seed {context.seed}", flush=True)
    status, behind = 0, options.behind is None
    torch.zeros(1, device=context.device)  # the context is made here, which may take seconds
    context.synchronize()
    for case in cases:
        if not behind:
            behind = case.name == options.behind
            continue
        if case.family in options.skip:
            continue
        # Any case of Triton's may compile.
        word, found = one(case, context, options.first_seconds if context.backend == "triton" else options.seconds)
        print(f"{word} {case.name} | {json.dumps(found)}", flush=True)
        if found.get("cuda_error"):
            return CUDA_ERROR
        status = status or int(word != "ok")
    return status


def one(case: Case, context: Context, limit: float) -> tuple[str, Figures]:
    print(f"start {case.name} | {json.dumps({'family': case.family})}", flush=True)
    faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
    begin = time.perf_counter()
    try:
        rehearse(case.name, context)
        found = case.run(context) or {}
        context.synchronize()
        return "ok", {"ms": round((time.perf_counter() - begin) * 1e3, 1), **found}
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
    """What a GPU may do, for the tests of the script: GRPO_KERNELS_REHEARSE="hang=NAME;raise=NAME;lose=NAME"."""
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
    parser.add_argument("--seed", type=int, default=None, help="of the inputs; fresh ones when left out")
    parser.add_argument("--family", default=None, help="this one alone")
    parser.add_argument("--skip", default="", type=lambda names: names.split(","), help="families that have hung")
    parser.add_argument("--from", dest="behind", default=None, metavar="NAME", help="go on behind this case")
    parser.add_argument("--seconds", type=float, default=12.0, help="for a case (default %(default)s)")
    parser.add_argument("--first-seconds", type=float, default=25.0, help="for one that may compile (Triton's)")
    return parser.parse_args(argv)
