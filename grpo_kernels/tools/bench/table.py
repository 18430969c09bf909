"""Records as tables that read without the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tables import Table
from ..units import milliseconds, readable_bytes, times

BASELINE = "eager"
OVERVIEW = ("case", "ours ms", "x unit", "vs eager", "vs compile", "best other", "ours vs it", "our peak", "its peak")


def timed(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The providers that have a time, in the record's order."""
    return {name: entry for name, entry in record["providers"].items() if "seconds" in entry}


def fastest(record: dict[str, Any], *, ours: bool | None = None) -> str | None:
    """Among everybody, ours or the others."""
    entries = {n: e for n, e in timed(record).items() if ours is None or n.startswith("ours") == ours}
    return min(entries, key=lambda name: entries[name]["seconds"]) if entries else None


def rate(record: dict[str, Any], seconds: float) -> str:
    """Arithmetic of three matmuls over the active rows, or bytes of one read and one write of the input."""
    if record["unit"] == "3 matmuls":
        rows = record["sequences"] * record["tokens"] * record["active_share"]
        return f"{6 * rows * record['hidden'] * record['vocab'] / seconds * 1e-12:.3g} TFLOP/s"
    return f"{2 * record['input_bytes'] / seconds * 1e-9:.3g} GB/s"


def multiple(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.2f}"


def case_table(record: dict[str, Any]) -> Table:
    """The unit, then a row for every provider that was timed; the fastest is marked."""
    base, best, unit = timed(record).get(BASELINE), fastest(record), record["unit_seconds"]

    def cells(name: str, entry: dict[str, Any]) -> list[str]:
        seconds, peak = entry["seconds"], entry.get("peak_bytes")
        spread = 50 * (entry["high"] - entry["low"]) / seconds
        of_logits = "" if peak is None or not record["logits_bytes"] else f"{peak / record['logits_bytes']:.2f}"
        return [
            name, milliseconds(seconds), f"{spread:.0f} %", multiple(seconds / unit["seconds"]),
            times(base["seconds"] / seconds) if base else "", "" if peak is None else readable_bytes(peak), of_logits,
            rate(record, seconds),
        ]  # fmt: skip

    rows = [[*cells(record["unit"], unit)[:3], "1", "", "", "", rate(record, unit["seconds"])]]
    rows += [cells(f"{name} *" if name == best else name, entry) for name, entry in timed(record).items()]
    headings = ("provider", "ms", "+-", f"x {record['unit']}", "vs eager", "peak", "x logits", "rate")
    return Table(headings, rows, record["case"])


def untimed(record: dict[str, Any]) -> dict[str, str]:
    """Who was not timed, and why."""
    others = {name: e for name, e in record["providers"].items() if "seconds" not in e and "first" not in e}
    return {name: e.get("missing") or e.get("failed") or "only checked" for name, e in others.items()}


def verdict(record: dict[str, Any]) -> str:
    """One sentence: who is fastest, by how much, and who needs least memory."""
    ours, other, entries = fastest(record, ours=True), fastest(record, ours=False), timed(record)
    if ours is None or other is None:
        return ""
    ratio = entries[other]["seconds"] / entries[ours]["seconds"]
    first, second, ratio = (ours, other, ratio) if ratio >= 1 else (other, ours, 1 / ratio)
    lead = f"{first} is {times(ratio)} as fast as {second}"
    peaks = {name: e["peak_bytes"] for name, e in entries.items() if "peak_bytes" in e}
    if not peaks:
        return f"{lead}."
    least = min(peaks, key=lambda name: peaks[name])
    return f"{lead}. Least memory: {least}, {readable_bytes(peaks[least])}."


def overview_row(record: dict[str, Any]) -> list[str] | None:
    """Ours compared with the best of the others; below 1x the other is faster."""
    ours, other, entries = fastest(record, ours=True), fastest(record, ours=False), timed(record)
    if ours is None:
        return None
    mine = entries[ours]

    def against(name: str | None) -> str:
        return times(entries[name]["seconds"] / mine["seconds"]) if name in entries else ""

    def memory(name: str | None) -> str:
        return readable_bytes(entries[name]["peak_bytes"]) if name in entries and "peak_bytes" in entries[name] else ""

    unit = f"{multiple(mine['seconds'] / record['unit_seconds']['seconds'])} {record['unit']}"
    return [
        record["case"], milliseconds(mine["seconds"]), unit, against(BASELINE), against("compile"), other or "",
        against(other), memory(ours), memory(other),
    ]  # fmt: skip


def overview_table(records: Sequence[dict[str, Any]]) -> Table:
    rows = [row for record in records if "unit_seconds" in record and (row := overview_row(record)) is not None]
    return Table(OVERVIEW, rows)


def sweep_table(records: Sequence[dict[str, Any]], axis: str, what: str = "seconds") -> Table:
    """A row for each value of the axis, a column for each provider; `what`: also "peak_bytes". The best is marked."""
    names = list(dict.fromkeys(name for record in records for name in timed(record)))
    text = milliseconds if what == "seconds" else readable_bytes
    rows = []
    for record in records:
        found = {name: entry[what] for name, entry in timed(record).items() if what in entry}
        best = min(found.values(), default=None)
        cells = [text(found[n]) + (" *" if found[n] == best else "  ") if n in found else "-" for n in names]
        rows.append([str(record["x"]), *cells])
    title = "milliseconds" if what == "seconds" else "peak memory above the inputs"
    return Table([axis, *names], rows, f"{title} (* the best)")


def lengths_table(record: dict[str, Any]) -> Table:
    """A row for each new length: milliseconds of the first call, and of the same call again."""
    entries = {name: e for name, e in record["providers"].items() if "first" in e}
    rows = []
    for i, length in enumerate(record["lengths"]):
        pairs = [f"{milliseconds(e['first'][i])} ({milliseconds(e['again'][i])})" for e in entries.values()]
        rows.append([str(length), *pairs])
    title = f"{record['case']}: milliseconds of the first call at each new length (and of the same call again)"
    return Table(["length", *entries], rows, title)
