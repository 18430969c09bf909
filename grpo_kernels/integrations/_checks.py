"""What an integration asks of its trainer: that it is installed, and still has the signatures that we know."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Sequence
from importlib import metadata
from types import ModuleType
from typing import Any


def require(module: str, distribution: str, release: str) -> ModuleType:
    """The trainer's module.

    Raises:
        ImportError: if the trainer is not installed, with the command that installs the release we know.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ImportError(f"this needs {distribution}, which is not installed: pip install {distribution}=={release}")
    return importlib.import_module(module)


def version(distribution: str) -> str:
    """The installed release, or "unknown"."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def expect(function: Callable[..., Any], parameters: Sequence[str], distribution: str, release: str) -> None:
    """Checks that a function of the trainer takes the parameters that the integration was written for, in their order.
    After a last "..." there may be any others.

    Raises:
        RuntimeError: if it does not, naming both releases.
    """
    found = list(inspect.signature(function).parameters)
    if parameters[-1:] == ["..."]:
        found, parameters = found[: len(parameters) - 1], parameters[:-1]
    if found != list(parameters):
        raise RuntimeError(
            f"{function.__qualname__} of {distribution} {version(distribution)} takes ({', '.join(found)}); this "
            f"integration was written for {distribution} {release}, where it takes ({', '.join(parameters)})"
        )


def digest(function: Callable[..., Any]) -> str:
    """Twelve hexadecimal digits of a function's source, to notice that a release has changed it."""
    return hashlib.sha256(textwrap.dedent(inspect.getsource(function)).encode()).hexdigest()[:12]
