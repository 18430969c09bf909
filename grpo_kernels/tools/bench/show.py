"""A run in the terminal: tables, one sentence for each, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..providers import providers
from ..shapes import SHAPES
from .table import HEADINGS, case_rows, fastest, lengths_rows, sweep_rows, untimed, verdict

WIDE = 100  # columns of a terminal
READING = (
    "ms: median of interleaved rounds; +-: half the distance of the quartiles. x copy, x 3 matmuls: "
    "multiples of the first line. Peak: tensors alive at once above the inputs, gradients included. Everybody's loss "
    "and gradients were compared with ours before anything was timed."
)


def show_case(record: dict[str, Any], console: Console) -> None:
    if "unit_seconds" in record:
        headings = HEADINGS if console.width >= WIDE else HEADINGS[:-1]
        table = _table(record["case"])
        for i, heading in enumerate(headings):
            name = f"x {record['unit']}" if heading == "x unit" else heading
            table.add_column(name, justify="right" if i else "left", no_wrap=not i)
        best = f"{fastest(record)} *"
        for row in case_rows(record):
            style = "bold green" if row[0] == best else "bold" if row[0].startswith("ours") else ""
            table.add_row(*map(escape, row[: len(headings)]), style=style)
        console.print(table)
        console.print(f"* {verdict(record)}", highlight=False)
    _show_untimed(record, console)


def _show_untimed(record: dict[str, Any], console: Console) -> None:
    reasons: dict[str, list[str]] = {}
    for name, reason in untimed(record).items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        console.print(f"not timed: {', '.join(names)}: {escape(reason)}", style="dim", highlight=False)
    console.print()


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))


def show_sweep(name: str, axis: str, records: Sequence[dict[str, Any]], console: Console) -> None:
    for what, title in (("ms", "milliseconds"), ("MiB", "peak memory above the inputs, MiB")):
        _show_rows(f"{name}: {title} (* the best)", *sweep_rows(records, axis, what), console)
    for record in (records[0], records[-1]):
        console.print(f"{axis} {record['x']}: {verdict(record)}", highlight=False)
    _show_untimed(records[0], console)


def show_lengths(record: dict[str, Any], console: Console) -> None:
    title = f"{record['case']}: milliseconds of the first call at each new length (and of the same call again)"
    _show_rows(title, *lengths_rows(record), console)
    _show_untimed(record, console)


def _show_rows(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    table = _table(title)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_legend(records: Sequence[dict[str, Any]], console: Console) -> None:
    console.print(READING, style="dim", highlight=False)
    titles = {name: e for r in records for name, e in r["providers"].items() if "seconds" in e or "first" in e}
    for name, entry in titles.items():
        version = f" ({entry['version']})" if entry["version"] else ""
        console.print(f"  {name}: {entry['title']}{version}", style="dim", highlight=False)


def show_choices(device: str, console: Console) -> None:
    """What `--model` and `--providers` can be."""
    table = _table("models")
    for heading in ("name", "model", "vocabulary", "hidden", "layers", "parameters"):
        table.add_column(heading, justify="left" if heading in ("name", "model") else "right")
    for name, shape in SHAPES.items():
        sizes = f"{shape.vocab:,}", f"{shape.hidden:,}", str(shape.layers), f"{shape.parameters / 1e9:.3g} B"
        table.add_row(name, shape.model, *sizes)
    console.print(table)
    table = _table(f"providers on {device}")
    for heading in ("name", "what it is", "state"):
        table.add_column(heading)
    for provider in providers(device):
        table.add_row(provider.name, provider.title, provider.missing(device) or f"ok {provider.version or ''}")
    console.print(table)
