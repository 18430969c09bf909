"""Measures how exact Triton's division, exp and log are on this device, and checks the properties that must hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .case import Case, Context
from .protocol import Figures

MANTISSA_BITS = 23
ONE = 0x3F800000  # its bits


def ran(function: str, first: Tensor, second: Tensor | None = None) -> Tensor:
    from .probe_kernels import launch

    out = torch.full_like(first, float("nan"))
    launch(function, first, first.clone() if second is None else second, out)
    return out


def mantissas(context: Context) -> Tensor:
    """Every float32 in [1, 2), or a few of them."""
    bits = torch.arange(0, 1 << MANTISSA_BITS, 4099 if context.small else 1, dtype=torch.int32, device=context.device)
    return (bits + ONE).view(torch.float32)


def quotients(context: Context, function: str) -> Figures:
    """x / x: above or below 1 where the division multiplies with an approximate reciprocal."""
    x = mantissas(context)
    q = ran(function, x)
    assert q.isfinite().all(), "a quotient was not written"
    above, below = int((q > 1).sum()), int((q < 1).sum())
    assert function != "div_rn" or above + below == 0, f"div_rn(x, x) is not 1: {above} above, {below} below"
    return {"count": x.numel(), "above": above, "below": below}


def powers(context: Context) -> Figures:
    """exp2 of integers."""
    n = torch.arange(-126, 128, device=context.device)
    got, exact = ran("exp2", n.float()).double(), torch.ldexp(torch.ones_like(n, dtype=torch.float64), n)
    assert got[126] == 1, f"exp2(0) is {float(got[126])!r}"
    return {"count": n.numel(), "inexact": int((got != exact).sum())}


def ulps(got: Tensor, exact: Tensor) -> Tensor:
    """Distance in units in the last place of the float32 nearest to `exact`, but at least of the smallest normal."""
    exponent = torch.frexp(exact)[1].clamp(min=-125)  # of [0.5, 1) * 2^e
    return (got.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - 24)


def accuracy(context: Context, function: str, low: float, high: float, exact: Callable[[Tensor], Tensor]) -> Figures:
    g = context.generator(function)
    count = 1 << (12 if context.small else 20)
    x = low + (high - low) * torch.rand(count, generator=g, device=context.device)
    errors = ulps(ran(function, x), exact(x.double()))
    assert errors.isfinite().all(), f"{function} is not finite in [{low}, {high}]"
    return {"count": count, "max_ulps": round(float(errors.max()), 3), "mean_ulps": round(float(errors.mean()), 4)}


def cases(context: Context) -> Iterator[Case]:
    for function in ("quotient", "div_rn"):
        yield Case(f"{function} of equals", "triton", functools.partial(quotients, function=function))
    yield Case("exp2 of integers", "triton", powers)
    for name, low, high, exact in (
        ("exp2", -100.0, 0.0, torch.exp2), ("exp", -60.0, 0.0, torch.exp), ("log", 1.0, 3e5, torch.log),
    ):  # fmt: skip
        run = functools.partial(accuracy, function=name, low=low, high=high, exact=exact)
        yield Case(f"{name} against float64", "triton", run)
