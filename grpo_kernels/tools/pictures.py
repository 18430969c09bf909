"""What all pictures share: a figure that matplotlib lays out, their look, and the file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = {
    "ours": "#c1272d", "eager": "#6b7280", "compile": "#1f6feb", "trl": "#e0a100", "liger": "#0b8a6b",
    "cce": "#7d4cc2", "verl": "#8a5a2b", "quack": "#2aa5c9",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "grid.alpha": 0.3, "grid.linewidth": 0.5, "legend.fontsize": 7, "legend.frameon": False,
}  # fmt: skip
DPI, CAPTION_CHARACTERS = 100, 220


def colour(provider: str) -> str:
    return COLOURS.get(provider.split("-")[0], "#444444")


@contextmanager
def picture(path: str | Path, width: float, height: float, caption: str = "") -> Iterator[Any]:
    """A matplotlib Figure of that many inches, saved when the block ends. `caption` stands small underneath."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # not pyplot's, which would choose a backend for the whole process
    except ImportError as error:
        raise ImportError(f"a picture needs matplotlib ({error}): run `pip install 'grpo-kernels[bench]'`") from error
    path = Path(path)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield figure
        if caption:
            lines = textwrap.fill(caption, CAPTION_CHARACTERS)
            figure.supxlabel(lines, x=0.01, ha="left", fontsize=6, color="#666666")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
