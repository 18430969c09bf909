"""cvt: between integers, floats and halves, single or in pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .floats import flushed
from .frame import dtype_of

ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def convert(to: str, kind: str, modifiers: tuple[str, ...]) -> Callable:
    if to in ("bf16x2", "f16x2"):
        half = bf16_bits if to == "bf16x2" else f16_bits
        return lambda high, low: half(high).astype(np.uint32) << np.uint32(16) | half(low)
    if to == "bf16":
        return lambda x: bf16_bits(x.astype(np.float32))
    if kind == "bf16":
        return lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(dtype_of(to))
    if unknown := set(modifiers) - {"rn", "sat", "ftz", *ROUND}:
        raise NotImplementedError(f"cvt with {unknown}")
    steps = [flushed] * ("ftz" in modifiers) + [ROUND[m] for m in modifiers if m in ROUND]
    if kind.startswith("f") and to[0] in "su":
        return lambda x: _to_integer(_after(steps, x.astype(np.float64)), dtype_of(to))
    if kind.startswith("f"):
        return lambda x: _to_float(x, steps, "sat" in modifiers, dtype_of(to))
    if "sat" in modifiers:
        raise NotImplementedError("a saturating conversion of integers")
    return lambda x: x.astype(dtype_of(to))


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Rounds to nearest, ties to even; all NaNs become one NaN."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def f16_bits(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def _after(steps: list[Callable], x: np.ndarray) -> np.ndarray:
    for step in steps:
        x = step(x)
    return x


def _to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Saturates at the type's range; NaN becomes 0."""
    info = np.iinfo(dtype)
    large, small = x >= float(info.max), x <= float(info.min)
    in_range = np.where(large | small | np.isnan(x), 0, x).astype(dtype)
    return np.where(large, info.max, np.where(small, info.min, in_range)).astype(dtype)


def _to_float(x: np.ndarray, steps: list[Callable], saturate: bool, dtype: np.dtype) -> np.ndarray:
    x = _after(steps, x)
    if saturate:
        x = np.where(np.isnan(x), 0, np.clip(x, 0, 1))
    return x.astype(dtype)
