"""Results as Markdown with pictures: a section for each file, device, versions and commit on each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..providers import PATHS
from . import plots
from .results import Results
from .table import case_table, lengths_table, overview_table, sweep_table, untimed, verdict


def single_cases(results: Results) -> list[dict[str, Any]]:
    return [r for r in results.records if "unit_seconds" in r and "sweep" not in r]


def sweeps(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The records of each sweep and path, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in results.records:
        if "sweep" in record and "unit_seconds" in record:
            found.setdefault(f"{record['sweep']}-{record['task']['path']}", []).append(record)
    return found


def headline(results: Results) -> list[dict[str, Any]]:
    """The cases with the most providers, one for each path that has logits: they are shown in full."""
    best: dict[str, dict[str, Any]] = {}
    for record in single_cases(results):
        path = record.get("task", {}).get("path")
        if path not in ("logits", "linear"):
            continue
        if path not in best or len(record["providers"]) > len(best[path]["providers"]):
            best[path] = record
    return list(best.values())


def case_section(record: dict[str, Any]) -> str:
    missing = "; ".join(f"{name}: {reason}" for name, reason in untimed(record).items())
    note = f" Not timed: {missing}." if missing else ""
    return f"**{record['case']}**\n\n{case_table(record).markdown()}\n\n\\* {verdict(record)}{note}"


def markdown(results: Results) -> str:
    """Tables only, for a terminal or a comment."""
    parts = [results.caption, overview_table(single_cases(results)).markdown()]
    for records in sweeps(results).values():
        parts += [f"{records[0]['sweep']} (ms, * the best)", sweep_table(records, axis_of(records)).markdown()]
    parts += [lengths_table(r).markdown() for r in results.records if "lengths" in r]
    return "\n\n".join(parts)


def section(results: Results, stem: str, pictures: Path, document: Path) -> str:
    """What stands between the markers of one result in the document; draws its pictures."""

    def picture(drawn: Path, text: str) -> str:
        return f"![{text}]({drawn.relative_to(document.parent)})"

    parts = [f"{results.caption}. `{results.command}`"]
    shown = headline(results)
    if shown:
        drawn = plots.bars(shown, results, pictures / f"{stem}-overview.png")
        parts.append(picture(drawn, "time and memory of a GRPO loss and its gradient by provider"))
        parts += [case_section(record) for record in shown]
    parts += [
        "### All cases\n\nValues below 1x mean that the other implementation is faster.",
        overview_table(single_cases(results)).markdown(),
    ]
    for name, records in sweeps(results).items():
        axis = axis_of(records)
        drawn = plots.sweep(records, axis, results, pictures / f"{stem}-{name}.png")
        title = f"### By {axis}: {PATHS[records[0]['task']['path']]}"
        parts += [title, picture(drawn, f"time and memory by {axis}"), "Milliseconds, * the best:"]
        parts.append(sweep_table(records, axis).markdown())
    for i, record in enumerate(r for r in results.records if "lengths" in r):
        drawn = plots.lengths(record, results, pictures / f"{stem}-lengths{i or ''}.png")
        title = (
            "### A new length at every step\n\nMilliseconds of the first call at each length (and of the same again)."
        )
        parts += [title, picture(drawn, "first calls at new lengths"), lengths_table(record).markdown()]
    return "\n\n".join(parts)


def axis_of(records: Sequence[dict[str, Any]]) -> str:
    return records[0].get("axis", records[0]["sweep"])


def insert(document: Path, stem: str, text: str) -> None:
    """Replaces what stands between the markers of `stem`. Raises ValueError where the document has none."""
    begin, end = f"<!-- begin {stem} -->", f"<!-- end {stem} -->"
    content = document.read_text()
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{document} has no {begin} ... {end} to put the results between")
    document.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", content))
