"""Floating-point arithmetic with the instruction's modifiers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .frame import dtype_of
from .text import Instruction

FLOATS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
    "sqrt": np.sqrt, "rcp": np.reciprocal,
}  # fmt: skip
EXTREMES = {"max": (np.fmax, np.maximum), "min": (np.fmin, np.minimum)}  # without and with .NaN
SMALLEST_NORMAL = np.float32(2.0**-126)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def float_function(ins: Instruction) -> Callable:
    name, kind = ins.parts[0], ins.parts[-1]
    np_type = dtype_of(kind).type
    if name in EXTREMES and "ftz" not in ins.parts:
        return EXTREMES[name]["NaN" in ins.parts]
    if name in ("fma", "mad"):
        return lambda x, y, z: rounded_fma(x, y, z, "rm" in ins.parts, "ftz" in ins.parts)
    if name == "ex2":
        return lambda x: _ftz(ins, np.exp2(x.astype(np.float64)).astype(np_type))
    if name == "lg2":
        return lambda x: np.log2(_ftz(ins, x).astype(np.float64)).astype(np_type)
    if name == "copysign":  # the sign of the first operand
        return lambda sign, x: np.copysign(x, sign)
    fn = FLOATS[name]
    return (lambda *x: flushed(fn(*map(flushed, x)))) if "ftz" in ins.parts else fn


def _ftz(ins: Instruction, x: np.ndarray) -> np.ndarray:
    return flushed(x) if "ftz" in ins.parts else x


def rounded_fma(x: np.ndarray, y: np.ndarray, z: np.ndarray, down: bool, ftz: bool) -> np.ndarray:
    """The product of two float32 is exact in float64; the sum there may be rounded twice, in one case of 2^29."""
    exact = x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)
    near = exact.astype(x.dtype)
    if down:
        return np.where(near.astype(np.float64) > exact, np.nextafter(near, x.dtype.type(-np.inf)), near)
    return flushed(near) if ftz else near
