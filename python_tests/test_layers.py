"""Imports run downwards only: a layer may import those below it and its own modules, and nothing imports the tools."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_kernels as gk

PACKAGE = Path(gk.__file__).parent
# From the top. A name is a module or a folder of the package; those in one row do not import each other.
LAYERS = [
    ("profiling",),  # the former name of tools.memory
    ("tools",),
    ("integrations",),
    ("testing",),
    ("",),  # the package itself
    ("loss",),
    ("advantages", "correction"),
    ("ops",),
    ("backends",),
    ("reference",),
    ("aggregation",),
    ("config",),
    ("coefficients", "presets"),
    ("inputs",),
]
LEVEL = {name: level for level, names in enumerate(reversed(LAYERS)) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported(path):
    """The layers of the package that a module imports, inside functions too."""
    folder = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) - node.level + 1]) if node.level else []
            base += (node.module or "").split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for parts in names:
            if parts[0] == PACKAGE.name:
                yield parts[1] if len(parts) > 1 and parts[1] in LEVEL else ""


def test_every_module_has_a_layer():
    assert {layer_of(path) for path in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    layer = layer_of(path)
    wrong = {name for name in imported(path) if name != layer and LEVEL[name] >= LEVEL[layer]}
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_the_library_imports_no_tool():
    script = "import sys, grpo_kernels; print([m for m in sys.modules if m.startswith('grpo_kernels.tools')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_former_name_of_the_memory_profiler():
    from grpo_kernels import profiling
    from grpo_kernels.tools import memory

    assert profiling.__all__ == memory.__all__
    assert all(getattr(profiling, name) is getattr(memory, name) for name in memory.__all__)
