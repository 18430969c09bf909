"""Draws docs/images/architecture.svg from the imports of the package and the includes of csrc.

    python docs/draw_architecture.py

A box is a folder or a module, with a list of its files. It is in the row below the lowest box that imports it, so that
arrows point downwards. An arrow is omitted where a longer path implies it. A cycle, or a box without a column in
`COLUMNS`, is an error.
"""

from __future__ import annotations

import ast
import graphlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "grpo_kernels"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"

FACE = "grpo_kernels"  # the public names, in __init__.py
BINDINGS, INTERFACE = "csrc/bindings.cpp", "csrc/kernels.h"
# Left to right, in the middle of the box; the rows are computed.
COLUMNS = {
    "profiling": 2.4, "testing": 1.2, "integrations": 3.4, "tools": 2.4, FACE: 2.4, "correction": 1.2, "loss": 2.4,
    "advantages": 2.4, "aggregation": 0, "ops": 2.4, "backends": 2.4, "reference": 1.75, "config": 1.35,
    "coefficients": 1.0, "presets": 1.9, "inputs": 0, BINDINGS: 3.3, "csrc/cpu": 2.85, "csrc/cuda": 3.75,
    INTERFACE: 3.3, "csrc/math": 3.3,
}  # fmt: skip

COLUMN, WIDTH, ROW_GAP, LINE, MARGIN = 236, 194, 30, 14, 14
FILL = {"python": ("#eef3fb", "#4a6fa5"), "native": ("#fdf1e3", "#b9772b")}

Graph = dict[str, set[str]]


def python_imports() -> Graph:
    """For each top-level module or folder, those that it imports, also inside functions."""
    names = {p.stem for p in PACKAGE.iterdir() if p.is_dir() or p.suffix == ".py"} - {"__pycache__", "__init__"}
    graph: Graph = {name: set() for name in (*names, FACE)}
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0]
        box = FACE if first == "__init__.py" else first.removesuffix(".py")
        for module in imported_modules(path):
            if module[-1] in ("_cpu", "_cuda"):
                graph[box].add(BINDINGS)
            elif module[0] == FACE:
                graph[box].add(module[1] if len(module) > 1 and module[1] in names else FACE)
        graph[box].discard(box)
    return graph


def imported_modules(path: Path) -> Iterator[list[str]]:
    folder = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*folder[: len(folder) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ([*base, alias.name] for alias in node.names)


def native_includes() -> Graph:
    """The same for csrc, without the emulator, which belongs to the tests."""
    graph: Graph = {}
    for path in sorted(p for p in (ROOT / "csrc").rglob("*.*") if p.parent.name != "emulation"):
        box = native_box(path)
        text = re.sub(r"#ifdef GK_EMULATED\n.*?(?=#else|#endif)", "", path.read_text(), flags=re.DOTALL)
        included = (path.parent / name for name in re.findall(r'#include "(\S+)"', text))
        included = ((p if p.exists() else ROOT / "csrc" / p.name).resolve() for p in included)
        others = {native_box(p) for p in included if p.parent.name != "emulation"} - {box}
        graph.setdefault(box, set()).update(others)
    return graph


def native_box(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return str(relative if len(relative.parts) == 2 else relative.parent)


def architecture() -> tuple[Graph, dict[str, int]]:
    """The arrows to draw, and the row of each box from the top."""
    graph = {**python_imports(), **native_includes()}
    graph[BINDINGS] |= {"csrc/cpu", "csrc/cuda"}  # setup.py links the bindings with each

    below: Graph = {}
    rows = dict.fromkeys(graph, 0)
    bottom_up = list(graphlib.TopologicalSorter(graph).static_order())
    for box in bottom_up:
        below[box] = graph[box].union(*(below[other] for other in graph[box]))
    for box in reversed(bottom_up):
        for other in graph[box]:
            rows[other] = max(rows[other], rows[box] + 1)
    arrows = {box: {o for o in graph[box] if not any(o in below[via] for via in graph[box])} for box in graph}
    return arrows, rows


def files_of(box: str) -> str:
    folder = ROOT / box if "/" in box else PACKAGE / box
    if not folder.is_dir():
        return "the public names" if box == FACE else ""
    names = {f"{p.stem}/" if p.is_dir() else p.stem for p in folder.iterdir() if p.is_dir() or p.suffix != ".so"}
    return " ".join(sorted(names - {"__init__", "__pycache__/"}))


def drawn() -> str:
    arrows, rows = architecture()
    if missing := set(rows) ^ set(COLUMNS):
        raise ValueError(f"COLUMNS and the code disagree about {', '.join(sorted(missing))}")
    text = {box: textwrap.wrap(files_of(box), 29, break_on_hyphens=False) for box in rows}
    height = {box: 24 + LINE * len(lines) + (6 if lines else 4) for box, lines in text.items()}
    top, y = {}, MARGIN
    for level in range(max(rows.values()) + 1):
        boxes = [box for box in rows if rows[box] == level]
        top |= {box: y for box in boxes}
        y += max(height[box] for box in boxes) + ROW_GAP
    middle = {box: int(MARGIN + WIDTH / 2 + COLUMN * COLUMNS[box]) for box in rows}
    width = max(middle.values()) + WIDTH // 2 + MARGIN

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y - ROW_GAP + MARGIN}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="11">',
        "<title>Imports of grpo_kernels and includes of csrc, drawn by docs/draw_architecture.py</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#667"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for box in sorted(arrows):
        for other in sorted(arrows[box]):
            x0, y0, x1, y1 = middle[box], top[box] + height[box], middle[other], top[other]
            half = (y1 - y0) // 2
            out.append(
                f'<path d="M{x0} {y0}C{x0} {y0 + half} {x1} {y1 - half} {x1} {y1}" fill="none" stroke="#667" '
                'marker-end="url(#tip)"/>'
            )
    for box in sorted(rows, key=lambda name: (rows[name], COLUMNS[name])):
        fill, edge = FILL["native" if box.startswith("csrc") else "python"]
        x, y0 = middle[box], top[box]
        out.append(
            f'<rect x="{x - WIDTH // 2}" y="{y0}" width="{WIDTH}" height="{height[box]}" rx="5" fill="{fill}" '
            f'stroke="{edge}"/>'
        )
        out.append(f'<text x="{x}" y="{y0 + 17}" text-anchor="middle" font-size="13" font-weight="bold">{box}</text>')
        for i, line in enumerate(text[box]):
            out.append(f'<text x="{x}" y="{y0 + 33 + LINE * i}" text-anchor="middle" fill="#445">{line}</text>')
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(drawn())
