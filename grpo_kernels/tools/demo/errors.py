"""The one exception whose text is meant for the user, not for a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec


class DemoError(Exception):
    """One sentence that says what is missing and what to do."""


def require(modules: Iterable[str]) -> None:
    """Raise DemoError naming those of `modules` that are not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise DemoError(f"The demo needs {', '.join(missing)}: run `pip install 'grpo-kernels[demo]'`.")
