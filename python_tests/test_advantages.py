"""group_advantages against formulas written out, and its exact facts."""

import itertools
import math

import pytest
import torch

import grpo_kernels as gk

R = torch.tensor([1.0, 0.0, 0.5, 0.25, 3.0, -1.0, 2.0, 2.5])


def by_hand(rewards, ids, baseline, scale, ddof, eps):
    out = torch.zeros_like(rewards, dtype=torch.float64)
    for g in ids.unique():
        r = rewards[ids == g].double()
        n = len(r)
        base = {"mean": r.mean(), "leave_one_out": (r.sum() - r) / max(n - 1, 1), "none": torch.zeros(())}[baseline]
        if n == 1:
            continue
        std = {
            "group": r.std(correction=ddof) + eps,
            "batch": rewards.double().std(correction=ddof) + eps,
            "none": 1.0,
        }[scale]
        out[ids == g] = (r - base) / std
    return out


@pytest.mark.parametrize(
    "baseline, scale, ddof", [*itertools.product(["mean", "leave_one_out", "none"], ["group", "batch", "none"], [0, 1])]
)
def test_formula(backend, baseline, scale, ddof):
    ids = torch.arange(8) // 4
    expected = by_hand(R, ids, baseline, scale, ddof, 1e-4)
    for grouping in ({"group_size": 4}, {"group_ids": ids * -7}):
        out = gk.group_advantages(R, baseline=baseline, scale=scale, ddof=ddof, backend=backend, **grouping)
        torch.testing.assert_close(out.advantages.double(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out.mean, torch.stack([R[:4].mean(), R[4:].mean()]).repeat_interleave(4))
        assert out.informative.all()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8, -7.7])
@pytest.mark.parametrize("size", [2, 16, 124, 4096])
def test_equal_rewards_are_exactly_zero(backend, value, size):
    out = gk.group_advantages(torch.full((size,), value), group_size=size, backend=backend)
    assert (out.advantages == 0).all() and (out.std == 0).all() and not out.informative.any()


def test_small_spread_on_a_large_offset(backend):
    """Centred in a second pass: E[x^2] - E[x]^2 would lose everything here."""
    r = torch.tensor([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3], dtype=torch.float64)
    out = gk.group_advantages(r, group_size=4, eps=0.0, backend=backend)
    torch.testing.assert_close(
        out.advantages, gk.group_advantages(r - 1e6, group_size=4, eps=0.0).advantages, rtol=1e-9, atol=0
    )


def test_order_changes_no_bit():
    torch.manual_seed(0)
    r, ids = torch.randn(500) * 10 ** torch.randint(-3, 4, (500,)).float(), torch.randint(0, 37, (500,)) * 1_000_003 - 5
    out = gk.group_advantages(r, group_ids=ids, scale="batch")
    for _ in range(5):
        p = torch.randperm(500)
        again = gk.group_advantages(r[p], group_ids=ids[p], scale="batch")
        assert all(torch.equal(a[p], b) for a, b in zip(out, again, strict=True))


def test_ragged_groups_agree_with_the_reference():
    torch.manual_seed(1)
    r, ids = torch.randn(200), torch.randint(0, 40, (200,))
    r[::11] = math.nan
    valid = torch.rand(200) > 0.2
    for baseline, scale, single in itertools.product(
        ["mean", "leave_one_out", "none"], ["group", "batch", "none"], ["zero", "raw"]
    ):
        mine, theirs = (
            gk.group_advantages(
                r, group_ids=ids, baseline=baseline, scale=scale, single=single, valid=valid, clip=1.2, backend=b
            )
            for b in ("cpu", "reference")
        )
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_missing_rewards(backend):
    r = torch.tensor([1.0, math.nan, 0.0, math.nan, math.nan, 4.0])
    out = gk.group_advantages(r, group_size=3, scale="none", backend=backend)
    assert torch.equal(out.advantages, torch.tensor([0.5, 0.0, -0.5, 0.0, 0.0, 0.0]))
    assert torch.equal(out.informative, torch.tensor([True] * 3 + [False] * 3))
    raw = gk.group_advantages(r, group_size=3, scale="none", single="raw", backend=backend)
    assert raw.advantages[5] == 4.0
    same = gk.group_advantages(
        torch.tensor([1.0, 99.0, 0.0, 5.0, 5.0, 4.0]),
        group_size=3,
        scale="none",
        valid=torch.tensor([1, 0, 1, 0, 0, 1]),
        backend=backend,
    )
    assert torch.equal(same.advantages, out.advantages)
    assert (gk.group_advantages(torch.full((4,), math.nan), group_size=2, backend=backend).advantages == 0).all()


def test_shapes_and_dtypes(backend):
    assert gk.group_advantages(torch.zeros(0), group_size=4, backend=backend).advantages.shape == (0,)
    assert gk.group_advantages(R.double(), group_size=4, backend=backend).advantages.dtype == torch.float64
    assert gk.group_advantages(R.bfloat16(), group_size=4, backend=backend).advantages.dtype == torch.float32
    whole = gk.group_advantages(torch.tensor([1, 0, 0, 1]), group_size=2, backend=backend)
    assert whole.advantages.dtype == torch.float32 and whole.advantages[0] > 0
    assert not gk.group_advantages(R.clone().requires_grad_(), group_size=4, backend=backend).advantages.requires_grad


def test_clip(backend):
    out = gk.group_advantages(R, group_size=4, scale="none", clip=0.5, backend=backend).advantages
    assert torch.equal(out, gk.group_advantages(R, group_size=4, scale="none").advantages.clamp(-0.5, 0.5))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one"),
        ({"group_size": 4, "group_ids": torch.zeros(8).long()}, "exactly one"),
        ({"group_size": 3}, "divide the 8"),
        ({"group_ids": torch.zeros(7).long()}, r"\(8,\).*\(7,\)"),
        ({"group_ids": torch.zeros(8)}, "integers.*float32"),
        ({"group_size": 4, "baseline": "median"}, "baseline.*'mean'.*'median'"),
        ({"group_size": 4, "scale": "max"}, "scale.*'max'"),
        ({"group_size": 4, "ddof": 2}, "ddof"),
        ({"group_size": 4, "valid": torch.ones(3)}, "valid"),
    ],
    ids=str,
)
def test_user_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        gk.group_advantages(R, **arguments)
    with pytest.raises(ValueError, match=r"\[S\]"):
        gk.group_advantages(R.view(2, 4), group_size=4)
