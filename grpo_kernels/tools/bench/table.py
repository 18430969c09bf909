"""Records as tables that read without the source, in a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MIB = 1 << 20
BASELINE = "eager"
HEADINGS = ("provider", "ms", "+-", "x unit", "vs eager", "peak MiB", "x logits", "rate")  # the last where it fits
OVERVIEW = ("case", "ours ms", "x unit", "vs eager", "vs compile", "best other", "ours vs it", "ours MiB", "its MiB")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Padded, so that it reads as well in a terminal; the first column to the left."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1) + ":") if i else "-" * width for i, width in enumerate(widths)]
    return "\n".join([line(headings), line(rule), *map(line, rows)])


def timed(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The providers that have a time, in the record's order."""
    return {name: entry for name, entry in record["providers"].items() if "seconds" in entry}


def fastest(record: dict[str, Any]) -> str | None:
    entries = timed(record)
    return min(entries, key=lambda name: entries[name]["seconds"]) if entries else None


def best_of_ours(record: dict[str, Any]) -> str | None:
    entries = {name: e for name, e in timed(record).items() if name.startswith("ours")}
    return min(entries, key=lambda name: entries[name]["seconds"]) if entries else None


def best_of_others(record: dict[str, Any]) -> str | None:
    entries = {name: e for name, e in timed(record).items() if not name.startswith("ours")}
    return min(entries, key=lambda name: entries[name]["seconds"]) if entries else None


def rate(record: dict[str, Any], seconds: float) -> str:
    """Arithmetic of three matmuls over the active rows, or bytes of one read and one write of the input."""
    if record["unit"] == "3 matmuls":
        rows = record["sequences"] * record["tokens"] * record["active_share"]
        return f"{6 * rows * record['hidden'] * record['vocab'] / seconds * 1e-12:.3g} TFLOP/s"
    return f"{2 * record['input_bytes'] / seconds * 1e-9:.3g} GB/s"


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 0.1 else f"{ms:.4f}"


def multiple(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.2f}"


def times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x"


def mib(size: int) -> str:
    return f"{size / MIB:.2f}" if size < 10 * MIB else f"{size / MIB:.0f}"


def case_rows(record: dict[str, Any]) -> list[list[str]]:
    """The unit, then a row for every provider that was timed; the fastest is marked."""
    base, best, unit = timed(record).get(BASELINE), fastest(record), record["unit_seconds"]

    def cells(name: str, entry: dict[str, Any]) -> list[str]:
        seconds, peak = entry["seconds"], entry.get("peak_bytes")
        spread = 50 * (entry["high"] - entry["low"]) / seconds
        of_logits = "" if peak is None or not record["logits_bytes"] else f"{peak / record['logits_bytes']:.2f}"
        return [
            name, milliseconds(seconds), f"{spread:.0f} %", multiple(seconds / unit["seconds"]),
            times(base["seconds"] / seconds) if base else "", "" if peak is None else mib(peak), of_logits,
            rate(record, seconds),
        ]  # fmt: skip

    rows = [[*cells(record["unit"], unit)[:3], "1", "", "", "", rate(record, unit["seconds"])]]
    return rows + [cells(f"{name} *" if name == best else name, entry) for name, entry in timed(record).items()]


def untimed(record: dict[str, Any]) -> dict[str, str]:
    """Who was not timed, and why."""
    others = {name: e for name, e in record["providers"].items() if "seconds" not in e and "first" not in e}
    return {name: e.get("missing") or e.get("failed") or "only checked" for name, e in others.items()}


def verdict(record: dict[str, Any]) -> str:
    """One sentence: who is fastest, by how much, and who needs least memory."""
    ours, other, entries = best_of_ours(record), best_of_others(record), timed(record)
    if ours is None or other is None:
        return ""
    ratio = entries[other]["seconds"] / entries[ours]["seconds"]
    first, second, ratio = (ours, other, ratio) if ratio >= 1 else (other, ours, 1 / ratio)
    lead = f"{first} is {times(ratio)} as fast as {second}"
    peaks = {name: e["peak_bytes"] for name, e in entries.items() if "peak_bytes" in e}
    if not peaks:
        return f"{lead}."
    least = min(peaks, key=lambda name: peaks[name])
    return f"{lead}. Least memory: {least}, {mib(peaks[least])} MiB."


def overview_row(record: dict[str, Any]) -> list[str] | None:
    """Ours compared with the best of the others; below 1x the other is faster."""
    ours, other, entries = best_of_ours(record), best_of_others(record), timed(record)
    if ours is None:
        return None
    mine = entries[ours]

    def against(name: str | None) -> str:
        return times(entries[name]["seconds"] / mine["seconds"]) if name in entries else ""

    def memory(name: str | None) -> str:
        return mib(entries[name]["peak_bytes"]) if name in entries and "peak_bytes" in entries[name] else ""

    unit = f"{multiple(mine['seconds'] / record['unit_seconds']['seconds'])} {record['unit']}"
    return [
        record["case"], milliseconds(mine["seconds"]), unit, against(BASELINE), against("compile"), other or "",
        against(other), memory(ours), memory(other),
    ]  # fmt: skip


def overview_table(records: Sequence[dict[str, Any]]) -> str:
    rows = [row for record in records if "unit_seconds" in record and (row := overview_row(record)) is not None]
    return markdown_table(OVERVIEW, rows)


def sweep_rows(records: Sequence[dict[str, Any]], axis: str, what: str) -> tuple[list[str], list[list[str]]]:
    """A row for each value of the axis, a column for each provider; `what`: "ms" or "MiB". The best is marked."""
    names = list(dict.fromkeys(name for record in records for name in timed(record)))
    key, text = ("seconds", milliseconds) if what == "ms" else ("peak_bytes", mib)
    rows = []
    for record in records:
        found = {name: entry[key] for name, entry in timed(record).items() if key in entry}
        best = min(found.values(), default=None)
        cells = [text(found[n]) + (" *" if found[n] == best else "  ") if n in found else "-" for n in names]
        rows.append([str(record["x"]), *cells])
    return [axis, *names], rows


def lengths_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each new length: milliseconds of the first call, and of the same call again."""
    entries = {name: e for name, e in record["providers"].items() if "first" in e}
    rows = []
    for i, length in enumerate(record["lengths"]):
        pairs = [f"{milliseconds(e['first'][i])} ({milliseconds(e['again'][i])})" for e in entries.values()]
        rows.append([str(length), *pairs])
    return ["length", *entries], rows
