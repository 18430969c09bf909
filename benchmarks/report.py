"""The comparison as a Markdown table: after a run, and again from its JSON (`python -m benchmarks.report FILE`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADINGS = ("case", "ms", "ratio to unit", "x eager", "x compile", "peak MiB", "peak MiB eager")
MIB = 1 << 20


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Padded, so that it reads as well in a terminal; the first column to the left."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1) + ":") if i else "-" * width for i, width in enumerate(widths)]
    return "\n".join([line(headings), line(rule), *map(line, rows)])


def comparison_row(info: dict[str, Any]) -> list[str]:
    """`info`: the extra_info of one benchmark; see conftest.Comparison."""
    ratios, peaks = info["ratios"], info["peak_bytes"]

    def times(provider: str) -> str:
        return f"{ratios[provider]:.2f}" if provider in ratios else ""

    def mib(provider: str) -> str:
        return f"{peaks[provider] / MIB:.2f}" if provider in peaks else ""

    unit = f"{1 / ratios[info['unit']]:.2f} {info['unit']}"
    milliseconds = f"{info['seconds']['ours'] * 1e3:.2f}"
    return [info["case"], milliseconds, unit, times("eager"), times("compile"), mib("ours"), mib("eager")]


def comparison_table(infos: Sequence[dict[str, Any]]) -> str:
    return markdown_table(HEADINGS, [comparison_row(info) for info in infos])


def machine_line(machine: dict[str, Any]) -> str:
    cpu = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads, {machine['instruction_set']}"
    )
    return f"{cpu}; torch {machine['torch']}, Python {machine['python']}, commit {machine['commit'] or 'unknown'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json=FILE wrote")
    content = json.loads(parser.parse_args().json.read_text())
    machine = content["machine_info"].get("grpo_kernels")
    if machine:
        print(f"{machine_line(machine)}; {content['datetime'][:16]}\n")
    print(comparison_table([b["extra_info"] for b in content["benchmarks"] if "ratios" in b["extra_info"]]))


if __name__ == "__main__":
    main()
