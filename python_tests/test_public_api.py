"""The public API, name by name: every change to it changes public_api.txt, where a reviewer sees it.
`python test_public_api.py` prints the current API."""

import dataclasses
import inspect
from pathlib import Path

import grpo_kernels as gk
from grpo_kernels import profiling

LIST = Path(__file__).parent / "public_api.txt"


def described(name, thing):
    """A function with its signature; a class with its constructor, fields and public methods."""
    if inspect.isfunction(thing):
        return [f"{name}{inspect.signature(thing)}"]
    if not inspect.isclass(thing):
        return [f"{name}: {type(thing).__name__}"]
    lines = [f"class {name}"]
    if hasattr(thing, "_fields"):
        lines += [f"    {field}" for field in thing._fields]
    else:
        lines += [f"    {described('__init__', thing.__init__)[0]}"] if "__init__" in vars(thing) else []
        if dataclasses.is_dataclass(thing):
            lines += [f"    {field.name}" for field in dataclasses.fields(thing) if not field.init]
    for key, value in sorted(vars(thing).items()):
        if key.startswith("_") or key in getattr(thing, "_fields", ()):
            continue
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if inspect.isfunction(value):
            lines.append(f"    {key}{inspect.signature(value)}")
        elif isinstance(value, property) or hasattr(value, "func"):
            lines.append(f"    {key} (property)")
    return lines


def public_api():
    lines = []
    for module in (gk, profiling):
        lines.append(f"# {module.__name__}")
        for name in sorted(module.__all__):
            lines += described(name, getattr(module, name))
    return "\n".join(lines) + "\n"


def test_public_api():
    assert public_api() == LIST.read_text()


if __name__ == "__main__":
    print(public_api(), end="")
