"""Pictures of records. Time and memory side by side, a colour for each provider, the machine underneath."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..pictures import colour, picture
from ..providers import PATHS
from ..units import byte_unit, milliseconds, readable_bytes
from .results import Results
from .table import timed

MARKERS = "osD^vPX*"


def bars(records: dict[str, Any] | Sequence[dict[str, Any]], results: Results, path: Path) -> Path:
    """For each case a bar for each provider: time to the left, peak memory to the right."""
    records = [records] if isinstance(records, dict) else list(records)
    heights = [0.6 + 0.3 * len(timed(record)) for record in records]
    with picture(path, 9, 0.9 + sum(heights), results.caption) as figure:
        rows = figure.subplots(len(records), 2, height_ratios=heights, squeeze=False, sharey="row")
        for record, axes in zip(records, rows, strict=True):
            _bars(record, axes)
    return path


def _bars(record: dict[str, Any], axes: Sequence[Any]) -> None:
    entries = timed(record)
    names = sorted(entries, key=lambda name: entries[name]["seconds"])
    seconds = [entries[name]["seconds"] for name in names]
    peaks = [entries[name].get("peak_bytes", 0) for name in names]
    size, unit = byte_unit(max(peaks))
    panels = ((seconds, 1e-3, milliseconds), (peaks, size, readable_bytes))
    for axis, (values, scale, text) in zip(axes, panels, strict=True):
        drawn = axis.barh(names, [value / scale for value in values], color=[colour(name) for name in names])
        axis.bar_label(drawn, [text(value) for value in values], padding=3, fontsize=8)
        axis.margins(x=0.17)
    axes[0].invert_yaxis()
    axes[0].axvline(record["unit_seconds"]["seconds"] * 1e3, color="black", linewidth=1, linestyle=":")
    axes[0].set_xlabel(f"milliseconds (dotted: {record['unit']})")
    axes[1].set_xlabel(f"peak memory above the inputs, {unit}")
    axes[0].set_title(record["case"], loc="left")


def sweep(records: Sequence[dict[str, Any]], axis: str, results: Results, path: Path) -> Path:
    """Several cases along an axis: a line for each provider, the quartiles as a band."""
    names = list(dict.fromkeys(name for record in records for name in timed(record)))
    categories = isinstance(records[0]["x"], str)
    where = {r["x"]: i if categories else r["x"] for i, r in enumerate(records)}
    size, memory_unit = byte_unit(max(e.get("peak_bytes", 0) for r in records for e in timed(r).values()))
    with picture(path, 9, 4, results.caption) as figure:
        left, right = figure.subplots(1, 2)
        for name, marker in _marked(names):
            points = [(where[r["x"]], timed(r)[name]) for r in records if name in timed(r)]
            xs, style = [x for x, _ in points], {"color": colour(name), "marker": marker, "ms": 4}
            low, middle, high = ([e[key] * 1e3 for _, e in points] for key in ("low", "seconds", "high"))
            left.plot(xs, middle, label=name, **style)
            left.fill_between(xs, low, high, color=colour(name), alpha=0.15, linewidth=0)
            if all("peak_bytes" in e for _, e in points):
                right.plot(xs, [max(e["peak_bytes"], 1) / size for _, e in points], **style)
        unit = [(where[r["x"]], r["unit_seconds"]["seconds"] * 1e3) for r in records]
        left.plot(*zip(*unit, strict=True), ":", color="black", linewidth=1, label=records[0]["unit"])
        for panel, label in ((left, "milliseconds"), (right, f"peak memory above the inputs, {memory_unit}")):
            panel.set_yscale("log")
            if not categories and axis != "fill":
                panel.set_xscale("log", base=2)
            if axis != "fill":
                panel.set_xticks(list(where.values()), [str(x) for x in where], rotation=30, fontsize=7)
            panel.set(xlabel=axis, ylabel=label)
            panel.grid()
        figure.legend(ncols=len(names) + 1, loc="outside upper center")
        left.set_title(_common_name(records), loc="left")
    return path


def _marked(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)]


def _common_name(records: Sequence[dict[str, Any]]) -> str:
    first = records[0]
    model = f" {first['model']}" if first["model"] and len({r["model"] for r in records}) == 1 else ""
    sizes = "" if first["task"]["path"] == "advantages" else f", {first['dtype']}"
    return f"{PATHS[first['task']['path']]}{model}{sizes}: {len(records)} sizes"


def lengths(record: dict[str, Any], results: Results, path: Path) -> Path:
    """The first call at each new length, over the same call again: what stands out is compiling."""
    entries = {name: e for name, e in record["providers"].items() if "first" in e}
    steps = range(1, len(record["lengths"]) + 1)
    with picture(path, 9, 4, results.caption) as figure:
        axes = figure.subplots()
        for name, marker in _marked(list(entries)):
            first, again = ([s * 1e3 for s in entries[name][key]] for key in ("first", "again"))
            axes.plot(steps, first, marker=marker, ms=4, color=colour(name), label=name)
            axes.plot(steps, again, ":", color=colour(name), linewidth=0.9)
        axes.set_xticks(list(steps), [str(n) for n in record["lengths"]])
        axes.set_yscale("log")
        axes.set(xlabel="completion length, a new one at each step")
        axes.set_ylabel("milliseconds (dotted: the same length again)")
        axes.grid()
        axes.legend()
        figure.suptitle(record["case"])
    return path
