"""Pictures of records. Time and memory side by side, a colour for each provider, the machine underneath."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..providers import PATHS
from .results import Results
from .table import MIB, mib, milliseconds, timed

COLOURS = {
    "ours": "#c1272d", "eager": "#6b7280", "compile": "#1f6feb", "trl": "#e0a100", "liger": "#0b8a6b",
    "cce": "#7d4cc2", "verl": "#8a5a2b", "quack": "#2aa5c9",
}  # fmt: skip
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
LEGEND = {"fontsize": 7, "frameon": False}
DPI, WRAP = 90, 150
MARKERS = "osD^vPX*"


def colour(provider: str) -> str:
    return COLOURS.get(provider.split("-")[0], "#444444")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, results: Results, path: Path) -> Path:
    figure.text(0.01, 0.005, textwrap.fill(results.caption, WRAP), fontsize=6, color="#666666", va="bottom")
    figure.tight_layout(rect=(0, 0.055, 1, 0.96))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    _pyplot().close(figure)
    return path


def bars(records: dict[str, Any] | Sequence[dict[str, Any]], results: Results, path: Path) -> Path:
    """For each case a bar for each provider: time to the left, peak memory to the right."""
    pyplot = _pyplot()
    records = [records] if isinstance(records, dict) else list(records)
    heights = [0.6 + 0.3 * len(timed(record)) for record in records]
    with pyplot.rc_context(STYLE):
        figure, rows = pyplot.subplots(
            len(records), 2, figsize=(9, 0.9 + sum(heights)), height_ratios=heights, squeeze=False, sharey="row"
        )
        for record, axes in zip(records, rows, strict=True):
            _bars(record, axes)
        return _save(figure, results, path)


def _bars(record: dict[str, Any], axes: Sequence[Any]) -> None:
    entries = timed(record)
    names = sorted(entries, key=lambda name: entries[name]["seconds"])
    seconds = [entries[name]["seconds"] for name in names]
    peaks = [entries[name].get("peak_bytes", 0) for name in names]
    panels = ((seconds, 1e3, milliseconds), (peaks, 1 / MIB, mib))
    for axis, (values, factor, text) in zip(axes, panels, strict=True):
        drawn = axis.barh(names, [value * factor for value in values], color=[colour(name) for name in names])
        axis.bar_label(drawn, [text(value) for value in values], padding=3, fontsize=8)
        axis.margins(x=0.14)
    axes[0].invert_yaxis()
    axes[0].axvline(record["unit_seconds"]["seconds"] * 1e3, color="black", linewidth=1, linestyle=":")
    axes[0].set_xlabel(f"milliseconds (dotted: {record['unit']})")
    axes[1].set_xlabel("peak memory above the inputs, MiB")
    axes[0].set_title(record["case"], fontsize=9, loc="left")


def sweep(records: Sequence[dict[str, Any]], axis: str, results: Results, path: Path) -> Path:
    """Several cases along an axis: a line for each provider, the quartiles as a band."""
    pyplot = _pyplot()
    names = list(dict.fromkeys(name for record in records for name in timed(record)))
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4))
        categories = isinstance(records[0]["x"], str)
        where = {r["x"]: i if categories else r["x"] for i, r in enumerate(records)}
        for i, name in enumerate(names):
            points = [(where[r["x"]], timed(r)[name]) for r in records if name in timed(r)]
            xs, style = [x for x, _ in points], {"color": colour(name), "marker": MARKERS[i % len(MARKERS)], "ms": 4}
            left.plot(xs, [e["seconds"] * 1e3 for _, e in points], label=name, **style)
            left.fill_between(
                xs, [e["low"] * 1e3 for _, e in points], [e["high"] * 1e3 for _, e in points], color=colour(name),
                alpha=0.15, linewidth=0,
            )  # fmt: skip
            if all("peak_bytes" in e for _, e in points):
                right.plot(xs, [max(e["peak_bytes"], 1) / MIB for _, e in points], **style)
        unit = [(where[r["x"]], r["unit_seconds"]["seconds"] * 1e3) for r in records]
        left.plot(*zip(*unit, strict=True), ":", color="black", linewidth=1, label=records[0]["unit"])
        for panel, label in ((left, "milliseconds"), (right, "peak memory above the inputs, MiB")):
            panel.set_yscale("log")
            if not categories and axis != "fill":
                panel.set_xscale("log", base=2)
            if axis != "fill":
                panel.set_xticks(list(where.values()), [str(x) for x in where], rotation=30, fontsize=7)
            panel.set_xlabel(axis)
            panel.set_ylabel(label)
            panel.grid(alpha=0.3, linewidth=0.5)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, ncols=len(labels), loc="upper center", bbox_to_anchor=(0.5, 0.945), **LEGEND)
        figure.suptitle(_common_name(records), fontsize=10)
        return _save(figure, results, path)


def _common_name(records: Sequence[dict[str, Any]]) -> str:
    first = records[0]
    model = f" {first['model']}" if first["model"] and len({r["model"] for r in records}) == 1 else ""
    sizes = "" if first["task"]["path"] == "advantages" else f", {first['dtype']}"
    return f"{PATHS[first['task']['path']]}{model}{sizes}: {len(records)} sizes"


def lengths(record: dict[str, Any], results: Results, path: Path) -> Path:
    """The first call at each new length, over the same call again: what stands out is compiling."""
    pyplot = _pyplot()
    entries = {name: e for name, e in record["providers"].items() if "first" in e}
    with pyplot.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(9, 4))
        steps = range(1, len(record["lengths"]) + 1)
        for i, (name, entry) in enumerate(entries.items()):
            marker = MARKERS[i % len(MARKERS)]
            axis.plot(steps, [s * 1e3 for s in entry["first"]], marker=marker, ms=4, color=colour(name), label=name)
            axis.plot(steps, [s * 1e3 for s in entry["again"]], ":", color=colour(name), linewidth=0.9)
        axis.set_xticks(list(steps), [str(n) for n in record["lengths"]])
        axis.set_yscale("log")
        axis.set_xlabel("completion length, a new one at each step")
        axis.set_ylabel("milliseconds (dotted: the same length again)")
        axis.grid(alpha=0.3, linewidth=0.5)
        axis.legend(**LEGEND)
        figure.suptitle(record["case"], fontsize=10)
        return _save(figure, results, path)
