"""The peak of a loss step by formula, for shapes that do not fit, and the largest batch that does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from ...backends import NAMES
from .formulas import FORMULAS
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
    """The moments of a loss step of ours or of eager PyTorch.

    Args:
        provider: "eager", or a name of ours (``"ours"`` for any backend, ``"ours-cpu-two-pass"``).
        path: "linear", from hidden states and lm_head, or "logits", from logits that are there and do not count.

    Raises:
        ValueError: for any other provider, which can only be measured, or a way of ours that the path does not have.
    """
    formula = formula_of(provider, path)
    if formula is None:
        known = ", ".join(f"{name} from {start}" for start, name in FORMULAS)
        raise ValueError(
            f"{provider!r} from {path} is measured only (`grpo-kernels memory` does): there are formulas for {known}"
        )
    return Prediction(provider, path, tuple(formula(shape)))


def formula_of(provider: str, path: str) -> Callable[[LossShape], list[Moment]] | None:
    """None for who is measured only. What a backend of ours is called does not matter: all allocate alike."""
    first, _, rest = provider.partition("-")
    backend, _, way = rest.partition("-")
    if first == "ours" and backend in NAMES:
        provider = f"ours-{way}" if way else "ours"
    return FORMULAS.get((path, provider))


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
