"""How close is close: tolerances that nobody chose."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(
    ours: Tensor, eager: Tensor, exact: Tensor, *, factor: float = 2.0, slack: float = 1e-6, what: str = ""
) -> None:
    """Ours may err at most `factor` times as far from float64 as eager torch does in the same dtype.

    inf and nan must stand where they do in `exact`. `slack` is relative to the largest finite value, at least 1.
    """
    ours, eager = ours.double(), eager.double()
    for name, test in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        assert torch.equal(test(ours), test(exact)), f"{what}: {name} where float64 has none, or the reverse"
    finite = exact.isfinite()
    if not finite.any():
        return
    ours, eager, exact = ours[finite], eager[finite], exact[finite]
    error, allowed = (ours - exact).abs().max(), (eager - exact).nan_to_num(0).abs().max()
    limit = factor * allowed + slack * exact.abs().max().clamp(min=1)
    assert error <= limit, f"{what}: error {error:.2e}; eager torch {allowed:.2e}, limit {limit:.2e}"


def relative_l2(ours: Tensor, exact: Tensor) -> float:
    """||ours - exact|| / ||exact||, in float64; 0 / 0 is 0."""
    ours, exact = ours.double(), exact.double()
    difference = (ours - exact).norm()
    return 0.0 if difference == 0 else float(difference / exact.norm())
