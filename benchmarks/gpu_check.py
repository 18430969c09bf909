"""Checks everything that needs a GPU, in pieces that take seconds, have a time limit and are saved one by one.

Run `sh benchmarks/gpu_check.sh` twice. It needs no network: its Python has torch and triton, nvcc is on the PATH, and
anything else that is missing is a wheel in the folder of `--wheels`. The first call takes at most `--limit` seconds:
copies, Triton, the CUDA kernels from the simplest to those whose blocks wait for each other, times, graphs. The second
call continues where the first stopped, repeats what failed, and then checks memory accesses, traffic, launch
configurations and the tests. A hang is killed and recorded, and its family of kernels is skipped until sources change.

Exit status: 0 if everything requested is done and good, 1 if something failed, 3 if time ran out and the same command
should be run again, 4 if the GPU no longer answers.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gpu.pieces import every
from .gpu.runner import ROOT, Piece, Run, Unhealthy, brief, digest

OUT_OF_TIME, UNHEALTHY = 3, 4
RESULTS = ROOT / "benchmarks" / "results"


def same_machine(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return all(old.get(key) == new.get(key) for key in ("dry", "device", "versions"))


def take_up(run: Run, machine: Piece, folder: Path) -> bool:
    """Describes the machine and continues its JSON, if there is one. False if there is no GPU."""
    result = machine.work(run, machine)
    if not result or not result["ok"]:
        said = (result or {}).get("output", "").strip().splitlines()
        print(said[-1] if said else "the GPU did not answer in time: nothing was checked", file=sys.stderr)
        return False
    about = {"dry": run.dry, "device": result["device"], "versions": result["versions"]}
    name = "dry" if run.dry else re.sub(r"\W+", "_", result["device"]["name"]).lower()
    run.out = folder / f"gpu_{name}.json"
    if run.out.exists() and same_machine(old := json.loads(run.out.read_text()), about):
        run.state = old
    run.state |= {**about, "commit": result["commit"], "healthy": True, "sources": digest("all")}
    run.results[machine.name] = {**result, "sources": digest("all")}
    print(f"{machine.name}: {brief(result)}", flush=True)
    run.save()
    return True


def arguments_of(argv: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piece", default=None, help=f"one or several, by comma, of: {', '.join(names)}")
    parser.add_argument("--again", default="", help="pieces to repeat although they were good")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install next to the tree")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (default benchmarks/results)")
    parser.add_argument("--limit", type=float, default=265.0, help="seconds after which it stops (default %(default)s)")
    parser.add_argument("--case-seconds", type=float, default=12.0, help="for one case (default %(default)s)")
    parser.add_argument("--dry", action="store_true", help="without a GPU: the same path on the CPU, on small inputs")
    arguments = parser.parse_args(argv)
    chosen = names if arguments.piece is None else [name.strip() for name in arguments.piece.split(",")]
    arguments.again = [name.strip() for name in arguments.again.split(",") if name.strip()]
    if unknown := [name for name in (*chosen, *arguments.again) if name not in names]:
        parser.error(f"pieces are {', '.join(names)}; got {', '.join(unknown)}")
    arguments.chosen = [*chosen, *(name for name in arguments.again if name not in chosen)]
    return arguments


def table(run: Run, pieces: Sequence[Piece]) -> str:
    lines = [f"{p.name:18} {brief(run.results[p.name])}" for p in pieces if p.name in run.results]
    return "\n".join([*lines, f"to be done: {', '.join(run.state.get('missing', [])) or 'nothing'}"])


def main(argv: Sequence[str] | None = None) -> int:
    begin, pieces = time.monotonic(), every()
    arguments = arguments_of(argv, [piece.name for piece in pieces])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no child outlives this process
    first = 2 * arguments.case_seconds  # of Triton, which compiles
    run = Run(arguments.out, begin + arguments.limit, arguments.dry, arguments.wheels, arguments.case_seconds, first)
    machine, *rest = pieces
    chosen = [piece for piece in rest if piece.name in (*arguments.chosen, "build")]
    try:
        if not take_up(run, machine, arguments.out):
            return 1
        run.run(chosen, arguments.again)
    except Unhealthy as error:
        print(f"{error}\n{run.out}", file=sys.stderr)
        return UNHEALTHY
    finally:
        if run.build is not None:
            run.build.kill()
    print(f"{table(run, chosen)}\n{run.out}")
    done = [run.results[piece.name] for piece in chosen if piece.name in run.results]
    if not all(result["ok"] or result.get("unfinished") for result in done):
        return 1
    return OUT_OF_TIME if run.state["missing"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
