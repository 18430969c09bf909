"""On a GPU, Triton's `/` of float32 may be off by units in the last place, in both directions. Here every such quotient
in the interpreter is off. What must not depend on it: comparisons, and values that are 1 by definition."""

import numpy as np
import pytest
import torch

import grpo_kernels as gk

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import interpreter

from grpo_kernels.backends.triton.group import LARGEST_SHARE, fixed, scale_for
from grpo_kernels.backends.triton.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="changes the interpreter's division")

REWARDS = torch.tensor([0.0, 0.3, 0.7, 1.9])


@pytest.fixture(params=["high", "low"])
def inexact(request, monkeypatch):
    """One unit in the last place away from 0, or towards it."""

    def divide(self, a, b):
        quotient = np.divide(a.data, b.data)
        if a.dtype.scalar == tl.float32:
            towards = np.copysign(np.float32(np.inf), quotient) if request.param == "high" else np.float32(0)
            quotient = np.where(np.isfinite(quotient) & (quotient != 0), np.nextafter(quotient, towards), quotient)
        return interpreter.TensorHandle(quotient, a.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", divide)


@triton.jit
def divide_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) / tl.load(x + i))


def test_division_is_inexact_here(inexact):
    x, out = REWARDS.clone() + 1, torch.empty(4)
    divide_kernel[(1,)](x, out, BLOCK=4)
    assert (out != 1).all() and (out - 1).abs().max() < 2e-7


@pytest.mark.parametrize("ids", [None, torch.zeros(4, dtype=torch.int64)], ids=["size", "ids"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "length_weighted"])
@pytest.mark.parametrize("scale", ["group", "batch", "leave_one_out", "none"])
def test_the_highest_reward_counts(inexact, baseline, scale, ids):
    options = {"group_size": 4} if ids is None else {"group_ids": ids}
    if baseline == "length_weighted":
        options["lengths"] = torch.tensor([3, 11, 2, 7])
    mine, exact = (
        gk.group_advantages(REWARDS.to(dtype), baseline=baseline, scale=scale, backend=name, **options)
        for name, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    for field in ("advantages", "mean", "std"):
        torch.testing.assert_close(getattr(mine, field).double(), getattr(exact, field), rtol=2e-6, atol=1e-6)


@triton.jit
def fixed_kernel(counts, shares, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, fixed(tl.load(shares + i), i >= 0, scale_for(tl.load(counts + i).to(tl.float32))))


def test_fixed_point_sums_fit_64_bits_for_any_count():
    counts = torch.tensor([1, 2, 3, 5, 1000, 2**24 + 1, 2**30 + 1, 2**31 - 1])
    out, largest = torch.empty(8, dtype=torch.int64), LARGEST_SHARE.value - 1e-6
    for share in (largest, -largest):
        fixed_kernel[(1,)](counts, torch.full((8,), share), out, BLOCK=8)
        # Half of the room is for a log2 that is rounded up past an integer.
        assert all(0 < abs(n * value) < 2**62 for n, value in zip(counts.tolist(), out.tolist(), strict=True))
    for share in (1.01, float("inf"), float("nan")):
        fixed_kernel[(1,)](counts, torch.full((8,), share), out, BLOCK=8)
        assert (out == 0).all()


@pytest.mark.parametrize("tokens", [3, 7, 49])
def test_a_mean_of_ones_is_one(inexact, tokens):
    """All tokens are alike, and all of them or none are clipped. The other backends divide exactly."""
    logps, advantages = torch.full((2, tokens), -1.0), torch.tensor([-1.0, -1.0])
    on_policy = gk.policy_loss(logps, advantages, backend="triton").metrics
    assert all(on_policy[name] == 1 for name in ("ratio_mean", "gradient_weight", "weight_mean", "weight_ess"))
    clipped = gk.policy_loss(logps, advantages, old_logps=logps + 1, backend="triton").metrics
    assert all(clipped[name] == 1 for name in ("clip_low", "clip_region", "clip_low_min"))
    clipped = gk.value_loss(logps + 2, logps + 3, logps, clip=0.5, backend="triton").metrics
    assert clipped["clip_fraction"] == 1


def test_equal_temperatures_per_token_are_one_temperature(inexact):
    """To the bit: the host's quotient of the one number is rounded to nearest."""
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 6, 50), torch.randint(50, (1, 6))
    for temperature in (0.7, 1.3, 3.0):
        given = torch.full((1, 6), temperature)
        one, each = (
            gk.token_logps(logits, targets, temperature=t, return_entropy=True, backend="triton")
            for t in (given[0, 0].item(), given)
        )
        assert torch.equal(one.logps, each.logps) and torch.equal(one.entropy, each.entropy)
