"""group_advantages against formulas written out, and results that must be exact."""

import itertools
import math

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.inputs.grouping import BASELINES, SCALES, SINGLES

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


def test_small_spread_on_a_large_offset(backend, acc_dtype):
    """The kernel centres in a second pass: E[x^2] - E[x]^2 would lose all digits here."""
    r = torch.tensor([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3], dtype=acc_dtype)
    out = gk.group_advantages(r, group_size=4, eps=0.0, backend=backend)
    rtol = 1e-9 if acc_dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        out.advantages, gk.group_advantages(r - 1e6, group_size=4, eps=0.0).advantages, rtol=rtol, atol=0
    )


FORMS = [
    {"baseline": baseline, "scale": scale, "single": single, "ddof": ddof, "clip": clip, **extra}
    for baseline, scale, single, (ddof, clip) in itertools.product(
        BASELINES, SCALES, SINGLES, [(1, None), (0, (-1.1, 0.9))]
    )
    for extra in ({}, {"critic": True})
]


def ragged(form, count=200, seed=1):
    """A call of this form on ragged groups, with missing rewards; its per-sample arguments are the tensors."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, count // 5, (count,), generator=g) * 1_000_003 - 5
    rewards = torch.randn(count, generator=g) * 10 ** torch.randint(-3, 4, (count,), generator=g)
    rewards[ids % 3 == 0] = 0.1  # constant groups
    rewards[::11] = math.nan
    values = torch.randn(count, generator=g)
    values[::7] = math.nan
    form = dict(form)
    call = {"rewards": rewards, "group_ids": ids, "valid": torch.rand(count, generator=g) > 0.2}
    if form.pop("critic", False):
        call |= {"critic_values": values, "critic_weight": 0.3}
    if form["baseline"] == "length_weighted":
        call["lengths"] = torch.randint(0, 50, (count,), generator=g)
    return call | form


def run(call, **changes):
    call = call | changes
    return gk.group_advantages(call.pop("rewards"), **call)


@pytest.mark.parametrize("form", FORMS[::3])
def test_the_order_of_samples_changes_no_bit(backend, form):
    count, shuffles = {"cpu": (500, 3), "triton": (40, 1)}.get(
        backend, (80, 3)
    )  # the interpreter runs a program per sample
    call = ragged(form, count)
    out = run(call, backend=backend)
    for seed in range(shuffles):
        p = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        shuffled = {k: v[p] if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        again = run(shuffled, backend=backend)
        assert all(torch.equal(a[p], b) for a, b in zip(out, again, strict=True))


@pytest.mark.parametrize("scale", SCALES)
def test_order_of_consecutive_groups_changes_no_bit(scale):
    """Enough samples for the kernel to use threads; the groups are shuffled, and the samples within them."""
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(8192, 16, generator=g) * 10 ** torch.randint(-3, 4, (8192, 1), generator=g)
    out = gk.group_advantages(rewards.flatten(), group_size=16, scale=scale).advantages.view_as(rewards)
    p, q = torch.randperm(8192, generator=g), torch.randperm(16, generator=g)
    again = gk.group_advantages(rewards[p][:, q].flatten(), group_size=16, scale=scale).advantages
    assert torch.equal(again.view_as(rewards), out[p][:, q])
    torch.set_num_threads(1)
    alone = gk.group_advantages(rewards.flatten(), group_size=16, scale=scale).advantages
    torch.set_num_threads(2)
    assert torch.equal(alone.view_as(rewards), out)


@pytest.mark.parametrize("form", FORMS)
def test_ragged_groups_agree_with_the_reference(form):
    call = ragged(form)
    for dtype, rtol, floor in ((torch.float32, 1e-6, 1e-6), (torch.float64, 1e-9, 1e-12)):
        call["rewards"] = call["rewards"].to(dtype)
        mine, theirs = (run(call, backend=b) for b in ("cpu", "reference"))
        for a, b in zip(mine, theirs, strict=True):
            atol = floor * max(1.0, float(b.double().abs().max()))
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("form", [f for f in FORMS if f["baseline"] != "none" and "critic" not in f])
def test_constant_groups_are_exactly_zero_in_every_form(backend, form):
    count = 40 if backend == "triton" else 200
    call = ragged(form, count)
    eps = {} if form["scale"] in ("mean", "none") else {"eps": 0.0}
    call |= {"rewards": torch.full((count,), 0.1), "single": "zero", **eps}
    out = run(call, backend=backend)
    assert not out.advantages.any() and not out.informative.any()


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_of_zero_does_not_divide(backend, scale):
    r = torch.tensor([2.0, 2.0, 3.0, 3.0])
    out = gk.group_advantages(r, group_size=2, baseline="none", scale=scale, backend=backend).advantages
    std = r.std() + 1e-4 if scale == "batch" else 1.0
    torch.testing.assert_close(out, r / std if scale != "mean" else torch.ones(4))
    critic = gk.group_advantages(
        r,
        group_size=2,
        scale="group",
        critic_values=torch.tensor([1.0, 2.0, math.nan, 3.5]),
        critic_weight=0.5,
        backend=backend,
    )
    assert torch.equal(critic.advantages, torch.tensor([0.5, 0.0, 0.0, -0.25]))
    assert critic.informative.all()


def test_equal_others_have_a_deviation_of_exactly_zero(backend, acc_dtype):
    """1e6 among equal rewards: a difference of squares would not be 0."""
    r = torch.tensor([0.1, 1e6, 0.1, 0.1, 0.1], dtype=acc_dtype)
    out = gk.group_advantages(
        r, group_size=5, baseline="leave_one_out", scale="leave_one_out", eps=1e-6, backend=backend
    )
    assert out.std[1] == 0
    torch.testing.assert_close(out.advantages[1], r[1] - 0.1)


def test_dense_distant_and_extreme_group_ids():
    r = torch.randn(64)
    expected = gk.group_advantages(r, group_size=8).advantages
    base = torch.arange(64) // 8
    extremes = torch.tensor([-(2**63), -(2**63) + 1, -1, 0, 1, 2**40, 2**63 - 2, 2**63 - 1])
    for ids in (base, base.flip(0), base * 10**15, extremes[base], (base * 3).to(torch.int32), base.to(torch.uint8)):
        assert torch.equal(gk.group_advantages(r, group_ids=ids).advantages, expected)


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


def test_shapes_and_dtypes(backend, acc_dtype):
    assert gk.group_advantages(torch.zeros(0), group_size=4, backend=backend).advantages.shape == (0,)
    assert gk.group_advantages(R.to(acc_dtype), group_size=4, backend=backend).advantages.dtype == acc_dtype
    assert gk.group_advantages(R.bfloat16(), group_size=4, backend=backend).advantages.dtype == torch.float32
    integers = gk.group_advantages(torch.tensor([1, 0, 0, 1]), group_size=2, backend=backend)
    assert integers.advantages.dtype == torch.float32 and integers.advantages[0] > 0
    with pytest.raises(ValueError, match=r"rewards requires grad.*pass rewards.detach\(\)"):
        gk.group_advantages(R.clone().requires_grad_(), group_size=4, backend=backend)


def test_clip(backend):
    out = gk.group_advantages(R, group_size=4, scale="none", clip=0.5, backend=backend).advantages
    assert torch.equal(out, gk.group_advantages(R, group_size=4, scale="none").advantages.clamp(-0.5, 0.5))


def test_several_rewards(backend):
    """The weighted sum of the rewards that are present; a sample without any is left out."""
    r = torch.tensor([[1.0, 2.0], [math.nan, 1.0], [3.0, math.nan], [math.nan, math.nan]])
    out = gk.group_advantages(r, group_size=4, scale="none", reward_weights=[1.0, -2.0], backend=backend)
    torch.testing.assert_close(out.advantages, torch.tensor([-3.0 + 2 / 3, -2.0 + 2 / 3, 3.0 + 2 / 3, 0.0]))
    plain = gk.group_advantages(r, group_size=4, scale="none", backend=backend)
    one = gk.group_advantages(torch.tensor([3.0, 1.0, 3.0, math.nan]), group_size=4, scale="none", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, one, strict=True))


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
        ({"group_size": 4, "single": "one"}, "single.*'zero', 'raw'.*'one'"),
        ({"group_size": 4, "ddof": 2}, "ddof.*2"),
        ({"group_size": 4, "eps": -1.0}, r"eps.*-1\.0"),
        ({"group_size": 4, "eps": math.nan}, "eps.*nan"),
        ({"group_size": 4, "valid": torch.ones(3)}, "valid"),
        ({"group_size": 4, "clip": -1.0}, r"clip.*-1\.0"),
        ({"group_size": 4, "clip": (0.5, 1.0)}, r"clip.*\(0\.5, 1\.0\)"),
        ({"group_size": 4, "baseline": "length_weighted"}, "needs lengths"),
        ({"group_size": 4, "baseline": "length_weighted", "lengths": torch.ones(3)}, r"lengths.*\(8,\).*\(3,\)"),
        ({"group_size": 4, "baseline": "length_weighted", "lengths": -torch.ones(8)}, r"lengths.*at least 0.*-1\.0"),
        ({"group_size": 4, "lengths": torch.ones(8)}, "lengths must be None with baseline='mean'"),
        ({"group_size": 4, "scale": "none", "eps": 1e-6}, "eps must be 0.0001 with scale='none'.*1e-06"),
        ({"group_size": 4, "scale": "mean", "eps": 1e-6}, "eps must be 0.0001 with scale='mean'"),
        ({"group_size": 4, "critic_values": torch.ones(8)}, r"critic_values need a critic_weight above 0; got 0\.0"),
        ({"group_size": 4, "critic_weight": 0.5}, r"critic_weight must be 0\.0 without critic_values; got 0\.5"),
        ({"group_size": 4, "critic_weight": 1.5}, r"critic_weight must be in \[0, 1\]; got 1\.5"),
        ({"group_size": 4, "reward_weights": [1.0]}, r"reward_weights must be \[K\]"),
        ({"group_size": 4, "backend": "best"}, "backend.*'best'"),
    ],
    ids=str,
)
def test_user_errors(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        gk.group_advantages(R, **arguments)


def test_wrong_rewards():
    for bad in (R.view(2, 2, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"\[S\] or \[S, K\]"):
            gk.group_advantages(bad, group_size=4)
    with pytest.raises(ValueError, match=r"\[K\].*\(3,\) for \(4, 2\)"):
        gk.group_advantages(R.view(4, 2), group_size=4, reward_weights=[1.0, 2.0, 3.0])
