"""GAE, value loss, whitening and what is built on them: edges, properties, threads, torch.compile, wrong arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import grpo_kernels as gk
from grpo_kernels.ops import advantages as ops

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(0, 6), st.integers(0, 40))
units = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def draw(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask; masked positions are NaN."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) > 0.3
    rewards, values = (
        torch.randn(shape, generator=g, dtype=torch.float64).masked_fill(~mask, math.nan) for _ in range(2)
    )
    return rewards.to(dtype), values.to(dtype), mask


@quick
@given(shapes, seeds, units, units)
def test_gae_agrees_with_the_reference_and_skips_masked_tokens(
    shape: tuple[int, int], seed: int, gamma: float, lam: float
) -> None:
    rewards, values, mask = draw(shape, seed)
    out = gk.gae(rewards, values, mask, gamma=gamma, lam=lam)
    for mine, theirs in zip(out, gk.gae(rewards, values, mask, gamma=gamma, lam=lam, backend="reference"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for b in range(shape[0]):  # computed from the active tokens only
        m = mask[b]
        alone = gk.gae(rewards[b, m][None], values[b, m][None], gamma=gamma, lam=lam)
        assert torch.equal(alone.advantages[0], out.advantages[b, m]) and not out.advantages[b, ~m].any()
    assert torch.equal(out.returns, torch.where(mask, out.advantages + values, 0.0))


@quick
@given(st.lists(st.integers(0, 9), min_size=0, max_size=6), st.integers(0, 3), seeds)
def test_packed_is_padded(lengths: list[int], tail: int, seed: int) -> None:
    rewards, values, mask = draw((sum(lengths) + tail,), seed)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    for backend in ("cpu", "reference"):
        out = gk.gae(rewards, values, mask, gamma=0.9, lam=0.8, cu_seqlens=cu, backend=backend)
        for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            one = gk.gae(rewards[None, a:b], values[None, a:b], mask[None, a:b], gamma=0.9, lam=0.8)
            torch.testing.assert_close(out.advantages[a:b], one.advantages[0], rtol=1e-12, atol=1e-12)
        assert not out.advantages[int(cu[-1]) :].any() and not out.returns[int(cu[-1]) :].any()


def test_gae_special_cases(backend: str, acc_dtype: torch.dtype) -> None:
    rewards, values, mask = draw((5, 30), dtype=acc_dtype)
    exact = gk.gae(rewards, torch.where(mask, values, 0.0), mask, gamma=1.0, lam=1.0, backend=backend)
    later = torch.where(mask, rewards, 0.0).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(exact.returns, later * mask)  # lam = 1: Monte Carlo returns
    one_step = gk.gae(rewards, values, mask, gamma=0.0, lam=0.7, backend=backend)
    torch.testing.assert_close(one_step.returns, torch.where(mask, rewards, 0.0))
    assert not gk.gae(rewards * 0, values * 0, mask, gamma=0.9, lam=0.9, backend=backend).advantages.any()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_reward_per_sequence_belongs_to_its_last_active_token(backend: str, layout: str) -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    rewards, values = torch.tensor([2.0, 5.0, -1.0]), torch.randn(3, 5)
    on_token = torch.tensor([[0.0, 0, 0, 2, 0], [0] * 5, [-1.0, 0, 0, 0, 0]])
    options: dict[str, Any] = {"gamma": 0.9, "lam": 0.8, "backend": backend}
    if layout == "packed":
        mask, values, on_token = mask.flatten(), values.flatten(), on_token.flatten()
        options["cu_seqlens"] = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    a, b = (gk.gae(r, values, mask, **options) for r in (rewards, on_token))
    assert torch.equal(a.advantages, b.advantages) and torch.equal(a.returns, b.returns)


def test_strides_dtypes_and_empty_shapes(backend: str, acc_dtype: torch.dtype) -> None:
    rewards, values, mask = draw((6, 9), dtype=acc_dtype)
    plain = gk.gae(rewards, values, mask, gamma=0.9, lam=0.8, backend=backend)
    turned = gk.gae(
        rewards.t().contiguous().t(), values.repeat_interleave(2, 1)[:, ::2], mask.t().contiguous().t(), gamma=0.9,
        lam=0.8, backend=backend,
    )  # fmt: skip
    assert torch.equal(plain.advantages, turned.advantages)
    with pytest.raises(ValueError, match=r"values requires grad.*pass values.detach\(\)"):
        gk.gae(rewards, values.clone().requires_grad_(), gamma=0.9, lam=0.8, backend=backend)
    half = gk.gae(rewards.bfloat16(), values.bfloat16(), mask.float(), gamma=0.9, lam=0.8, backend=backend)
    assert half.advantages.dtype == torch.float32
    for shape in ((0, 4), (4, 0), (0, 0)):
        x = torch.zeros(shape)
        assert gk.gae(x, x, gamma=1.0, lam=1.0, backend=backend).advantages.shape == shape
        assert gk.whiten(x, backend=backend).shape == shape
        assert gk.value_loss(x, x, x, backend=backend).loss == 0
        assert gk.reinforce_plus_plus(x, backend=backend).returns.shape == shape
    empty = torch.zeros(0)
    assert gk.pass_at_k_advantages(empty, group_size=2, backend=backend).advantages.shape == (0,)
    assert gk.gpg_advantages(empty, group_ids=empty.long(), backend=backend).advantages.shape == (0,)
    assert gk.gdpo_advantages(torch.zeros(0, 2), group_size=2, backend=backend).advantages.shape == (0,)
    none = torch.zeros(0, 3)
    assert gk.process_advantages(none, none.long(), torch.zeros(0, 5), group_size=2, backend=backend).shape == (0, 5)
    assert gk.process_advantages(torch.zeros(2, 0), torch.zeros(2, 0).long(), torch.ones(2, 5), group_size=2).shape == (
        2,
        5,
    )
    assert gk.optimal_token_baseline(none, none, none, group_size=2, backend=backend).returns.shape == (0, 3)


# ---- whitening ----


@quick
@given(shapes, seeds, st.sampled_from([0, 1]), st.sampled_from(["variance", "floor", "std"]), st.booleans())
def test_whiten_agrees_with_the_reference(
    shape: tuple[int, int], seed: int, ddof: int, eps_mode: str, shift_mean: bool
) -> None:
    values, _, mask = draw(shape, seed)
    values = values + 1e6  # moments about the mean
    options: dict[str, Any] = {"ddof": ddof, "eps_mode": eps_mode, "shift_mean": shift_mean}
    mine, theirs = (gk.whiten(values, mask, **options, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-8)
    assert not mine[~mask].any()
    if shift_mean and mask.sum() > 2:
        assert abs(float(mine[mask].mean())) < 1e-6 and abs(float(mine[mask].std(correction=ddof)) - 1) < 1e-3


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8, 0.0])
@pytest.mark.parametrize("count", [1, 2, 4097, 70_001])
def test_equal_values_whiten_to_exactly_zero(backend: str, acc_dtype: torch.dtype, value: float, count: int) -> None:
    values = torch.full((count,), value, dtype=acc_dtype)
    for options in ({}, {"eps": 0.0}, {"eps": 0.0, "eps_mode": "std", "ddof": 0}, {"divide": False}):
        assert not gk.whiten(values, backend=backend, **options).any()
    assert torch.equal(gk.whiten(values, backend=backend, shift_mean=False), values)
    assert not gk.whiten(values, torch.zeros(count), backend=backend).any()


def test_threads_change_no_bit() -> None:
    rewards, values, mask = draw((37, 5003), dtype=torch.float32)
    old = values + 0.1

    def everything() -> list[Tensor]:
        gae = gk.gae(rewards, values, mask, gamma=0.99, lam=0.95)
        loss = gk.value_loss(values, old, gae.returns, mask)
        white = gk.whiten(gae.advantages, mask)
        return [*gae, white, loss.loss, loss.per_token_loss, *loss.metrics.values()]

    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything())
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- the value loss ----


@pytest.mark.parametrize("clip", [0.3, None])
@pytest.mark.parametrize("aggregation", ["token_mean", "token_sum", "sequence_mean", "sequence_sum", "fixed_length"])
def test_value_loss_agrees_with_the_reference(
    backend: str, acc_dtype: torch.dtype, aggregation: str, clip: float | None
) -> None:
    returns, values, mask = draw((7, 33), dtype=acc_dtype)
    old = values + 0.3 * torch.randn(values.shape, dtype=acc_dtype)
    mask[2] = False
    options = {"clip": clip, "aggregation": aggregation, "scale": 0.5}
    if aggregation == "fixed_length":
        options["denominator"] = torch.tensor(77.0)
    results = []
    for name in (backend, "reference"):
        leaf = values.clone().requires_grad_()
        out = gk.value_loss(leaf, old if clip else None, returns, mask, backend=name, **options)
        (3 * out.loss).backward()
        results.append((out.loss.detach(), leaf.grad, out.per_token_loss, *out.metrics.values()))
        assert not leaf.grad[~mask].any() and not out.per_token_loss[~mask].any()
        assert not out.per_token_loss.requires_grad
    close = {"rtol": 1e-12, "atol": 1e-14} if acc_dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, **close)


def test_value_gradient_by_finite_differences(backend: str, acc_dtype: torch.dtype) -> None:
    if acc_dtype != torch.float64:
        pytest.skip("differences need float64")
    torch.manual_seed(0)
    values, old, returns = (torch.randn(3, 5, dtype=torch.float64) for _ in range(3))
    torch.autograd.gradcheck(
        lambda v: gk.value_loss(v, old, returns, clip=0.4, backend=backend).loss, values.requires_grad_()
    )


def test_value_loss_without_tokens_has_a_graph(backend: str) -> None:
    values = torch.full((2, 3), math.nan, requires_grad=True)
    out = gk.value_loss(values, values.detach(), values.detach(), torch.zeros(2, 3), backend=backend)
    out.loss.backward()
    assert out.loss == 0 and not values.grad.any() and all(m.isfinite() for m in out.metrics.values())


def test_clip_only_limits(backend: str) -> None:
    """Within the range nothing changes; beyond it the larger error is taken, and a clipped one has no gradient."""
    old, target = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, 1.0])
    values = torch.tensor([0.1, 0.5, 0.5, 3.0], requires_grad=True)
    out = gk.value_loss(values, old, target, clip=0.2, aggregation="token_sum", backend=backend)
    out.loss.backward()
    torch.testing.assert_close(out.per_token_loss, torch.tensor([0.9, 0.8, 1.5, 2.0]).square() / 2)
    torch.testing.assert_close(values.grad, torch.tensor([-0.9, 0.0, 1.5, 2.0]))
    assert out.metrics["clip_fraction"] == 0.25


# ---- torch.compile ----


def pipeline(rewards: Tensor, values: Tensor, mask: Tensor, ids: Tensor) -> list[Tensor]:
    """Every public function that this file tests, in one graph."""
    outcome, steps = rewards.sum(-1), rewards[:, :2]
    ends, group = mask.long().cumsum(-1)[:, :2] * 0 + 1, {"group_ids": ids}
    several = torch.stack([outcome, -values.sum(-1)], 1)
    gae = gk.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    return [
        *gae,
        gk.whiten(gae.advantages, mask),
        gk.value_loss(values, values + 0.3, gae.returns, mask).loss,
        *gk.group_advantages(outcome, baseline="leave_one_out", scale="leave_one_out", **group),
        *gk.group_advantages(several, reward_weights=[1.0, 2.0], critic_values=outcome, critic_weight=0.5, **group),
        *gk.pass_at_k_advantages(outcome, **group),
        *gk.gpg_advantages(outcome, **group),
        *gk.gdpo_advantages(several, lengths=mask.sum(-1), **group),
        *gk.reinforce_plus_plus(rewards, mask, gamma=0.9, kl=values, kl_coef=0.1),
        *gk.reinforce_plus_plus_baseline(outcome, mask, **group),
        *gk.remax(rewards, outcome, mask),
        *gk.optimal_token_baseline(rewards, -values.abs(), values.abs(), mask, multi_turn=True, **group),
        gk.process_advantages(steps, ends, mask, **group),
    ]


def arguments(samples: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, values, mask = draw((samples, tokens), seed)
    return rewards.nan_to_num(0.0), values.nan_to_num(0.0), mask, torch.arange(samples) % 3


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_is_eager(compiler: str) -> None:
    call = arguments(9, 14)
    compiled = torch.compile(pipeline, fullgraph=True, backend=compiler)(*call)
    for a, b in zip(pipeline(*call), compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_one_graph_for_all_shapes() -> None:
    counter = CompileCounter()
    step = torch.compile(pipeline, fullgraph=True, dynamic=True, backend=counter)
    for samples, tokens in ((9, 14), (12, 31), (30, 7)):
        call = arguments(samples, tokens)
        for a, b in zip(pipeline(*call), step(*call), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_opcheck() -> None:
    rewards, values, mask, ids = arguments(6, 5)
    outcome, cu = rewards.sum(-1), torch.tensor([0, 3, 5])
    options = (1, "mean", "group", 1, 1e-4, 0.5, -9.0, 9.0, False, "cpu")
    cases = {
        ops.group_advantages: (torch.randn(6, 2), outcome[:2].double(), mask[:, 0], ids, outcome, outcome, *options),
        ops.gae: (rewards[:1], values[:1], mask[:1], cu, 0.9, 0.8, "cpu"),
        ops.value_loss: (values, values + 1, rewards, torch.ones_like(values), mask, 0.2, "cpu"),
        ops.masked_moments: (values, mask, "cpu"),
        ops.whiten: (values, mask, torch.tensor([0.1, 2.0, 0.0]).double(), "cpu"),
    }
    cases[ops.group_advantages] = (*cases[ops.group_advantages][:4], outcome.abs(), *cases[ops.group_advantages][5:])
    for op, args in cases.items():
        torch.library.opcheck(op, args)
    torch.library.opcheck(ops.gae, (rewards, None, None, None, 0.9, 1.0, "cpu"))


# ---- wrong arguments ----

X = torch.zeros(2, 3)
WRONG: list[tuple[Any, str]] = [
    (lambda: gk.gae(X, X, gamma=1.5, lam=1.0), r"gamma must be in \[0, 1\]; got 1.5"),
    (lambda: gk.gae(X, X, gamma=1.0, lam=-0.1), r"lam must be in \[0, 1\]; got -0.1"),
    (lambda: gk.gae(X, X[:1], X, gamma=1.0, lam=1.0), r"(values|mask).*\(1, 3\).*\(2, 3\)"),
    (lambda: gk.gae(X[0], X[0], gamma=1.0, lam=1.0), "flat tokens need cu_seqlens"),
    (lambda: gk.gae(X[0], X[0], gamma=1.0, lam=1.0, cu_seqlens=torch.tensor([0, 9])), "cu_seqlens must rise.*9"),
    (lambda: gk.value_loss(X, None, X), "clip=0.2 needs old_values"),
    (lambda: gk.value_loss(X, X, X, clip=0.0), "clip must be above 0.*0.0"),
    (lambda: gk.value_loss(X, X, X[:1]), r"returns.*\(2, 3\).*\(1, 3\)"),
    (lambda: gk.value_loss(X, X, X, X[:1]), r"mask.*\(2, 3\).*\(1, 3\)"),
    (lambda: gk.value_loss(X, X, X, aggregation="median"), "aggregation.*'median'"),
    (lambda: gk.value_loss(X[0], X[0], X[0], aggregation="sequence_mean"), "needs cu_seqlens"),
    (lambda: gk.whiten(X, X[:1]), r"mask.*\(2, 3\).*\(1, 3\)"),
    (lambda: gk.whiten(X, eps_mode="add"), "eps_mode.*'variance'.*'add'"),
    (lambda: gk.whiten(X, ddof=2), "ddof must be 0 or 1; got 2"),
    (lambda: gk.whiten(X, divide=False, eps=1e-3), "eps must be 1e-08 with divide=False.*0.001"),
    (lambda: gk.whiten(X, divide=False, shift_mean=False), "set one of them"),
    (lambda: gk.reinforce_plus_plus(X, kl=X), "kl needs a kl_coef other than 0; got 0.0"),
    (lambda: gk.reinforce_plus_plus(X, kl_coef=0.1), "kl_coef must be 0.0 without kl; got 0.1"),
    (lambda: gk.reinforce_plus_plus_baseline(X[0], X, group_size=3), r"\(2,\).*\(3,\)"),
    (lambda: gk.remax(X, X[0]), r"baselines.*\(2,\).*\(3,\)"),
    (lambda: gk.optimal_token_baseline(X, X[0], X, group_size=2), r"padded, \[S, T\]"),
    (lambda: gk.optimal_token_baseline(X, X, X, group_size=3), "group_size.*divide the 2"),
    (lambda: gk.process_advantages(X, X, X, group_size=2), "step_ends must be integers.*float32"),
    (lambda: gk.process_advantages(X, X.long() + 3, X, group_size=2), r"step_ends must be in \[0, 3\); got 3"),
    (lambda: gk.process_advantages(X, X[:1].long(), X, group_size=2), r"\[S, K\].*\(2, 3\) and \(1, 3\)"),
    (lambda: gk.process_advantages(X, X.long(), X[:1], group_size=2), r"mask must be \[S, T\] with S = 2"),
    (lambda: gk.pass_at_k_advantages(X[0], group_size=3, scale="batch"), "scale.*'group', 'none'.*'batch'"),
    (lambda: gk.pass_at_k_advantages(X, group_size=3), r"rewards must be \[S\]"),
    (lambda: gk.gpg_advantages(X[0], group_size=3, f_norm=0.0), "f_norm.*0.0"),
    (lambda: gk.gdpo_advantages(X[0], group_size=3), r"rewards must be \[S, K\]"),
    (lambda: gk.gdpo_advantages(X, group_size=2, reward_weights=[1.0]), r"reward_weights.*\(3,\).*\(1,\)"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_user_errors(case: int) -> None:
    call, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
