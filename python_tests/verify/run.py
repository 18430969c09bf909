"""Verifies cases and prints a line of JSON for each: `python -m verify.run cuda|triton [--soak] [NAME ...]`, from
python_tests, in a separate process without TRITON_INTERPRET."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ptx.run import configured

from .cases import CASES, Case, backend_of, launched
from .check import PROVEN, Verdict, verdict


def verdicts(name: str, backend: Any, capture: Any, case: Case) -> list[Verdict]:
    """The verdicts on the case's launches, up to the first that is not proven."""
    with configured(capture, name, case):
        launches = launched(capture, backend, case)
    assert launches, f"nothing launches {case.kernel}"
    results = list[Verdict]()
    for launch in launches:
        results.append(verdict(launch, case.options))
        if results[-1].result != PROVEN:
            break
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=CASES)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--soak", action="store_true", help="those that take long")
    args = parser.parse_args()
    backend, capture = backend_of(args.backend)
    for name, case in CASES[args.backend].items():
        if name in args.names or (not args.names and args.soak == case.soak):
            results = verdicts(args.backend, backend, capture, case)
            total = {
                "launches": len(results), "seconds": round(sum(v.seconds for v in results), 1),
                "guards": sum(v.guards for v in results),
            }  # fmt: skip
            print(json.dumps({"case": name, **results[-1]._asdict(), **total}), flush=True)


if __name__ == "__main__":
    main()
