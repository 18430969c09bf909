"""Runs cases on PTX and prints a line of JSON for each: `python -m ptx.run cuda|triton [--soak] [NAME ...]`, from
python_tests, in a separate process without TRITON_INTERPRET. Errors end it, except for wrong results and what would be
an error on a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from grpo_kernels import backends

from .cases import CASES, Case, Wrong, check, memory_filled_with_nans
from .machine import Options
from .memory import Trap


def backend_on_ptx(name: str) -> Any:
    """Makes the library's backend `name` run as PTX on CPU tensors."""
    if name == "triton":
        from .triton_launch import TritonOnPtx

        return TritonOnPtx()
    from .nvcc import CudaOnPtx

    made = CudaOnPtx()
    backends.register("cuda", lambda: made)
    return made


@contextlib.contextmanager
def configured(on_ptx: Any, name: str, case: Case) -> Iterator[None]:
    """Runs on the case's machine."""
    if name == "cuda":
        on_ptx.machine(**case.machine)
        yield
        return
    from grpo_kernels.backends.triton import tuning

    key = "cuda", 90
    saved = tuning.TABLE[key]
    tuning.TABLE[key] = saved._replace(**case.machine)
    try:
        yield
    finally:
        tuning.TABLE[key] = saved


def outcome(on_ptx: Any, name: str, case: Case, options: Options) -> dict[str, Any]:
    """The result of a case: 'ok', or what was wrong."""
    on_ptx.options, begun = options, time.monotonic()
    on_ptx.ran.clear()
    said = "ok"
    with configured(on_ptx, name, case), memory_filled_with_nans():
        try:
            check(case.compute, name, case.half)
        except (Wrong, Trap) as error:
            said = f"{type(error).__name__}: {error}"
    races = {f"{what} in {r.kernel}, {text}": n for r in on_ptx.ran for (what, text), n in r.grid.races.items()}
    if races and said == "ok":
        said = f"races: {races}"
    return {
        "said": said, "kernels": [r.kernel for r in on_ptx.ran], "blocks": [r.grid.blocks for r in on_ptx.ran],
        "instructions": sum(r.grid.instructions for r in on_ptx.ran), "waits": sum(r.grid.gave_way for r in on_ptx.ran),
        "seconds": round(time.monotonic() - begun, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=CASES)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--soak", action="store_true", help="all forms and shapes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resident", type=int, default=3)
    args = parser.parse_args()
    on_ptx = backend_on_ptx(args.backend)
    for name, case in CASES[args.backend].items():
        if name in args.names or (not args.names and args.soak >= case.soak):
            options = Options(seed=args.seed, resident=args.resident)
            print(json.dumps({"case": name, **outcome(on_ptx, args.backend, case, options)}), flush=True)


if __name__ == "__main__":
    main()
