"""Other trainers' functions out of their installed wheels, which do not import whole without their many dependencies."""

from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest


def extracted(distribution: str, release: str, path: str, names: tuple[str, ...], **scope: Any) -> dict[str, Any]:
    """The functions and classes of these names, executed in `scope`; skips where that release is not installed."""
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        pytest.skip(f"the oracle is {distribution} itself: pip install --no-deps {distribution}=={release}")
    if found.version != release:
        pytest.skip(f"the oracle is {distribution} {release}; installed is {found.version}")
    files = [f for f in found.files or () if str(f).endswith(path)]
    tree = ast.parse(Path(str(found.locate_file(files[0]))).read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    exec(compile(ast.fix_missing_locations(tree), path, "exec", flags=0), scope)
    return scope
