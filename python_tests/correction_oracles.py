"""For the correction's oracle tests: a batch with values at both sides of every bound, ours in every layout, and a
strict comparison."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from oracle_cases import assert_near, poisoned
from torch import Tensor

import grpo_kernels as gk

EDGE = 5e-5
BOUNDS = (0.5, 2.0, 3.0, 5.0, 0.125, 8.0, 1e-4)
NEAR_BOUNDS = [math.log(bound) + side for bound in BOUNDS for side in (-EDGE, EDGE)]
LENGTHS = [24, 24, 20, 0, 17, 1, 22, 24, 3, 12, 9, 30]
# Means of a row's d on both sides of the geometric filters, and sums on both sides of the products' bounds.
MEANS = [
    0.0,
    math.log(1.001) + EDGE,
    math.log(0.999) + EDGE,
    0.0,
    math.log(1.001) - EDGE,
    0.3,
    0.1,
    math.log(0.5) - EDGE,
]
SUMS = [math.log(2) - EDGE, math.log(3) + EDGE, 0.4, -2.0]


class Batch(NamedTuple):
    """Float64 values that are exact in float32; all [B, T] except for the advantages."""

    old: Tensor
    roll: Tensor
    logps: Tensor
    mask: Tensor  # int64
    advantages: Tensor


def mismatch(*, far: bool = False, spread: float = 0.3, seed: int = 3) -> Batch:
    """`far`: adds rows with differences beyond the trainers' clamps of 20."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shape = (len(LENGTHS), max(LENGTHS))
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    mask[6, 4:9] = 0
    mask[7, 0] = 0
    d = spread * normal(*shape) * torch.rand(shape[0], 1, generator=g, dtype=torch.float64)
    n = mask.sum(-1).clamp(min=1)
    totals = torch.cat([torch.tensor(MEANS) * n[: len(MEANS)], torch.tensor(SUMS)])
    d += ((totals - (d * mask).sum(-1)) / n)[:, None]
    d[0, : len(NEAR_BOUNDS)] = torch.tensor(NEAR_BOUNDS, dtype=torch.float64)
    if far:
        d[1, :4] = torch.tensor([25.0, -25.0, 20.5, 12.0])
        d[2, 2], d[7, 5] = 30.0, -21.0
    old = -1.0 - torch.rand(shape, generator=g, dtype=torch.float64)
    old = (old - d.clamp(min=0)).float().double()
    logps = old + 0.4 * normal(*shape) + 0.1 * normal(shape[0], 1)
    advantages = normal(shape[0])
    advantages[4] = 0  # with a drift that would reject the row if it were negative
    logps[4] -= 0.5
    return Batch(old, *(x.float().double() for x in (old - d, logps)), mask, advantages.float().double())


VARIANTS = list(itertools.product([torch.float64, torch.float32], [False, True]))  # dtype, packed


def ours(
    b: Batch,
    config: gk.CorrectionConfig,
    dtype: torch.dtype,
    packed: bool,
    missing: Tensor | None = None,
    **others: Tensor,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Weights and mask, [B, T], and metrics. Masked values are poisoned; the sampler's `missing` tokens are NaN."""
    roll = b.roll if missing is None else torch.where(missing, math.nan, b.roll)
    kept = b.mask.flip(-1).cumsum(-1).flip(-1) > 0

    def given(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return x.to(dtype)
        x = poisoned(x, b.mask).to(dtype)
        return torch.cat([x[kept], x.new_full((2,), math.nan)]) if packed else x  # a tail that belongs to no sequence

    options: dict[str, Any] = {name: given(x) for name, x in others.items()}
    mask = torch.cat([b.mask[kept], torch.ones(2).long()]) if packed else b.mask
    if packed:
        options["cu_seqlens"] = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0)).int()
    out = gk.rollout_correction(given(b.old), given(roll), mask, config=config, **options)
    assert out.token_weights.dtype == dtype and out.mask.dtype == torch.bool
    padded = []
    for x in out[:2]:
        assert x.shape == mask.shape
        if packed:
            assert not x[-2:].any(), "a token past the last boundary is used"
            x = torch.zeros(b.mask.shape, dtype=x.dtype).masked_scatter(kept, x[:-2])
        assert not x[b.mask == 0].any(), "a masked token is used"
        padded.append(x)
    return padded[0].double(), padded[1], {name: float(x) for name, x in out.metrics.items()}


def assert_matches(
    b: Batch,
    config: gk.CorrectionConfig,
    weights: Tensor,
    mask: Tensor,
    metrics: dict[str, float] | None = None,
    missing: Tensor | None = None,
    **others: Tensor,
) -> None:
    """Compares ours, in both dtypes and layouts, with an oracle's weights and mask [B, T]."""
    for dtype, packed in VARIANTS:
        w, m, got = ours(b, config, dtype, packed, missing, **others)
        what, tolerance = f"{dtype} packed={packed}", 1e-6 if dtype == torch.float32 else 1e-12
        assert torch.equal(m, (mask != 0) & (b.mask != 0)), f"{what} mask"
        assert_near(w, weights * (b.mask != 0), tolerance, f"{what} weights")
        assert all(map(math.isfinite, got.values())), got
        for name, value in (metrics or {}).items():
            assert got[name] == pytest.approx(value, rel=2e-6, abs=2e-7), f"{what} {name}"
