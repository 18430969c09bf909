"""Which cases a run of `grpo-kernels bench` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..providers import LOSSES, Task
from ..shapes import SHAPES
from .case import Case

VOCABULARIES = tuple(sorted({shape.vocab for shape in SHAPES.values() if shape.model != "Qwen/Qwen2.5-7B"}))
TOKENS = (32, 64, 128, 256, 512)  # of a sequence
FILLS = (1.0, 0.8, 0.6, 0.45, 0.3, 0.15)
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
REWARDS = 16384

Points = list[tuple[float | int | str, Case]]  # where on the axis, and what is measured there


def _vocabulary(case: Case) -> Points:
    return [(vocab, replace(case, model="", vocab=vocab)) for vocab in VOCABULARIES]


def _tokens(case: Case) -> Points:
    return [(case.sequences * tokens, replace(case, tokens=tokens)) for tokens in TOKENS]


def _fill(case: Case) -> Points:
    return [(fill, replace(case, fill=fill)) for fill in FILLS]


def _group_size(case: Case) -> Points:
    """Always the advantages: the loss does not see groups."""
    base = Case(Task("advantages"), sequences=REWARDS, dtype="fp32")
    return [(size, replace(base, group_size=size)) for size in GROUP_SIZES]


def _losses(case: Case) -> Points:
    return [(loss, replace(case, task=replace(case.task, loss=loss))) for loss in LOSSES]


# By name: what the axis counts, and the cases along it.
SWEEPS: dict[str, tuple[str, Callable[[Case], Points]]] = {
    "vocabulary": ("vocabulary", _vocabulary),
    "tokens": ("tokens in the batch", _tokens),
    "fill": ("fill", _fill),
    "group-size": ("group size", _group_size),
    "losses": ("loss", _losses),
}
