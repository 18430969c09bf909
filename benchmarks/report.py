"""Tables and pictures from the JSON of runs, and the comparison of two of them.

python -m benchmarks.report FILE...                              tables, in the terminal
python -m benchmarks.report FILE... --into docs/benchmarks.md    tables and pictures, between the file's markers
python -m benchmarks.report --compare OLD NEW                    exit status 1 if something became worse
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpo_kernels.tools.bench import report
from grpo_kernels.tools.bench.compare import compare, comparison_table
from grpo_kernels.tools.bench.results import load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "json", type=Path, nargs="*", help="results of grpo-kernels bench, benchmarks.measure_docs or pytest"
    )
    parser.add_argument("--into", type=Path, help="a document with <!-- begin STEM --> and <!-- end STEM --> lines")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="flag regressions")
    parser.add_argument("--force", action="store_true", help="compare even different devices")
    given = parser.parse_args()
    if bool(given.json) == bool(given.compare):
        parser.error("give result files, or --compare with two of them")
    try:
        if given.compare:
            return _compare(*given.compare, given.force)
        for file in given.json:
            results = load(file)
            if given.into is None:
                print(report.markdown(results), end="\n\n")
                continue
            pictures = given.into.parent / "images"
            report.insert(given.into, file.stem, report.section(results, file.stem, pictures, given.into))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _compare(old: Path, new: Path, force: bool) -> int:
    before, now = load(old), load(new)
    changes = compare(before, now, force=force)
    print(f"before: {before.caption}\nnow:    {now.caption}\n\n{comparison_table(changes).markdown()}\n")
    regressions = [c for c in changes if c.regression]
    print(f"{len(regressions)} of {len(changes)} became worse beyond 5 % and twice the noise.")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
