"""Timelines as a picture: bytes alive, stacked by what holds them, the peak labelled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pictures import picture
from ..units import byte_unit, readable_bytes

OTHERS = "others"
_SHARE = 0.04  # of the peak: what is smaller is drawn as one
_LAYERS = 7
_LONGEST = 52  # characters of a legend's line
_NAMED_PHASE = 0.08  # of the width: a narrower one has no room for its name


@dataclass(frozen=True)
class Panel:
    """One timeline: `layers` are the bytes of each label after each of `times`, `phases` (name, begin, end)."""

    times: Sequence[float]
    layers: Mapping[str, Sequence[int]]
    phases: Sequence[tuple[str, float, float]]
    xlabel: str

    @property
    def totals(self) -> list[int]:
        return [sum(values) for values in zip(*self.layers.values(), strict=True)]


def worth_drawing(layers: Mapping[str, Sequence[int]], peak: int) -> dict[str, list[int]]:
    """The layers that grow to a visible height, in the order of appearance; the sum of the others on top."""
    large = sorted((name for name in layers if max(layers[name]) >= _SHARE * peak), key=lambda name: -max(layers[name]))
    kept = {name: list(layers[name]) for name in layers if name in large[:_LAYERS]}
    small = [values for name, values in layers.items() if name not in kept]
    return {**kept, OTHERS: [sum(values) for values in zip(*small, strict=True)]} if small else kept


def save_panels(panels: Mapping[str, Panel], path: str | Path, title: str | None = None) -> None:
    """One picture of all panels, by title, on one scale of bytes."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    highest = max((max(panel.totals, default=0) for panel in panels.values()), default=0)
    scale, unit = byte_unit(highest)
    with picture(path, 0.8 + 3.6 * columns, 0.4 + 4.4 * rows) as figure:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        colours: dict[str, Any] = {}
        cells = list(grid.flat)
        for cell, (name, panel) in zip(cells, panels.items(), strict=False):
            _draw(cell, name, panel, scale, colours)
            cell.set_ylim(0, 1.18 * max(highest, 1) / scale)
        for cell in cells[len(panels) :]:
            cell.set_axis_off()
        for row in grid:
            row[0].set_ylabel(f"tensors alive, {unit}")
        if title:
            figure.suptitle(title)


def _draw(axes: Any, name: str, panel: Panel, scale: int, colours: dict[str, Any]) -> None:
    from matplotlib import colormaps

    palette: Any = colormaps["tab20"]
    layers = {key: [value / scale for value in values] for key, values in panel.layers.items() if any(values)}
    for key in layers:
        colours.setdefault(key, "0.75" if key == OTHERS else palette(len(colours) % palette.N))
    names, shades = [_shortened(key) for key in layers], [colours[key] for key in layers]
    axes.stackplot(panel.times, *layers.values(), labels=names, colors=shades, step="post", linewidth=0)
    totals = panel.totals
    if totals:
        step = totals.index(max(totals))
        at, height = panel.times[step], totals[step] / scale
        axes.plot([at], [height], "v", color="black", markersize=5)
        late = at > (panel.times[0] + panel.times[-1]) / 2
        axes.annotate(
            f"peak {readable_bytes(totals[step])}", (at, height), (-6 if late else 6, 5), textcoords="offset points",
            fontweight="bold", ha="right" if late else "left",
        )  # fmt: skip
    width = panel.times[-1] - panel.times[0] if panel.times else 0.0
    for phase, begin, end in panel.phases:
        axes.axvspan(begin, end, ymin=0.95, ymax=1, color="0.9", zorder=0)
        axes.axvline(begin, color="0.6", linewidth=0.6, linestyle=":")
        if end - begin > _NAMED_PHASE * width:
            axes.text(begin, 0.96, f" {phase}", transform=axes.get_xaxis_transform(), fontsize=7, va="bottom")
    axes.set_title(name)
    axes.set_xlabel(panel.xlabel)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.16))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
