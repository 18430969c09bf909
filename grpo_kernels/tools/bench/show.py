"""A run in the terminal: tables, one sentence for each, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from ..providers import providers
from ..shapes import SHAPES
from ..tables import Table
from .table import case_table, fastest, lengths_table, sweep_table, untimed, verdict

WIDE = 100  # columns of a terminal
READING = (
    "ms: median of interleaved rounds; +-: half the distance of the quartiles. x copy, x 3 matmuls: "
    "multiples of the first line. Peak: tensors alive at once above the inputs, gradients included. Everybody's loss "
    "and gradients were compared with ours before anything was timed."
)


def show_case(record: dict[str, Any], console: Console) -> None:
    if "unit_seconds" in record:
        table, best = case_table(record), f"{fastest(record)} *"
        columns = len(table.headings) - (console.width < WIDE)  # the last one where it fits

        def styled(row: Sequence[str]) -> list[Text]:
            style = "bold green" if row[0] == best else "bold" if row[0].startswith("ours") else ""
            return [Text(cell, style) for cell in row[:columns]]

        rows = [styled(row) for row in table.rows]
        console.print(replace(table, headings=table.headings[:columns], rows=rows))
        console.print(f"* {verdict(record)}", highlight=False)
    _show_untimed(record, console)


def _show_untimed(record: dict[str, Any], console: Console) -> None:
    reasons: dict[str, list[str]] = {}
    for name, reason in untimed(record).items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        console.print(f"not timed: {', '.join(names)}: {escape(reason)}", style="dim", highlight=False)
    console.print()


def show_sweep(name: str, axis: str, records: Sequence[dict[str, Any]], console: Console) -> None:
    for what in ("seconds", "peak_bytes"):
        table = sweep_table(records, axis, what)
        console.print(replace(table, title=f"{name}: {table.title}"))
    for record in (records[0], records[-1]):
        console.print(f"{axis} {record['x']}: {verdict(record)}", highlight=False)
    _show_untimed(records[0], console)


def show_lengths(record: dict[str, Any], console: Console) -> None:
    console.print(lengths_table(record))
    _show_untimed(record, console)


def show_legend(records: Sequence[dict[str, Any]], console: Console) -> None:
    console.print(READING, style="dim", highlight=False)
    titles = {name: e for r in records for name, e in r["providers"].items() if "seconds" in e or "first" in e}
    for name, entry in titles.items():
        version = f" ({entry['version']})" if entry["version"] else ""
        console.print(f"  {name}: {entry['title']}{version}", style="dim", highlight=False)


def show_choices(device: str, console: Console) -> None:
    """What `--model` and `--providers` can be."""
    headings = ("name", "model", "vocabulary", "hidden", "layers", "parameters")
    rows = [
        (name, s.model, f"{s.vocab:,}", f"{s.hidden:,}", str(s.layers), f"{s.parameters / 1e9:.3g} B")
        for name, s in SHAPES.items()
    ]
    console.print(Table(headings, rows, "models", left=2))
    found = [(p.name, p.title, p.missing(device) or f"ok {p.version or ''}") for p in providers(device)]
    console.print(Table(("name", "what it is", "state"), found, f"providers on {device}", left=3))
