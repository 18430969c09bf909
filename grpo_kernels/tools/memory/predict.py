"""The peak of a loss step by formula, for shapes that do not fit, and the largest batch that does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from ...backends import NAMES
from .formulas import CPU_ONLY, FORMULAS
from .profile import Holding
from .shape import LossShape, Moment

_NOT_MONOTONIC = 64  # sequences


@dataclass(frozen=True)
class Prediction:
    provider: str
    path: str
    moments: tuple[Moment, ...]

    @property
    def peak_moment(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        return self.peak_moment.total

    @property
    def at_peak(self) -> list[Holding]:
        held = [Holding(*pair) for pair in self.peak_moment.holds.items() if pair[1]]
        return sorted(held, key=lambda h: -h.nbytes)


def predict(provider: str, shape: LossShape, path: str = "linear") -> Prediction:
    """The moments of a loss step of `provider`, a name of ``testing.providers`` (or ``"ours"`` for any backend).

    Args:
        path: "linear", from hidden states and lm_head, or "logits", from logits that are there and do not count.

    Raises:
        ValueError: for a provider and path without a formula.
    """
    formula = formula_of(provider, path, shape)
    if formula is None:
        known = ", ".join(f"{name} from {of}" for of, name in FORMULAS)
        raise ValueError(f"there is no formula for {provider!r} from {path}; there is one for {known}")
    return Prediction(provider, path, tuple(formula(shape)))


def formula_of(provider: str, path: str, shape: LossShape) -> Callable[[LossShape], list[Moment]] | None:
    """None where there is none. What a backend of ours is called does not matter: all allocate alike."""
    first, _, rest = provider.partition("-")
    backend, _, way = rest.partition("-")
    if first == "ours" and backend in NAMES:
        provider = f"ours-{way}" if way else "ours"
    key = (path, provider)
    return None if key in CPU_ONLY and not shape.on_cpu else FORMULAS.get(key)


# ---- the largest batch ----


def largest_batch(provider: str, shape: LossShape, budget: int, path: str = "linear", *, beside: int = 0) -> int:
    """The most sequences like `shape`'s whose loss step fits into `budget` bytes, 0 if not even one does.

    Args:
        budget: bytes in all.
        beside: bytes per sequence in addition to the step's own: hidden states, or the logits themselves.

    Raises:
        ValueError: as ``predict``.
    """

    @functools.cache
    def fits(sequences: int) -> bool:
        peak = predict(provider, replace(shape, sequences=sequences), path).peak
        return peak + sequences * beside <= budget

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    # Chunks are of equal size, so that a few rows more, in one chunk more, can need less.
    return max((n for n in range(low, low + _NOT_MONOTONIC) if n and fits(n)), default=0)
