"""kl_divergence against verl's function and the other trainers' formulas, values and gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import assert_near, make_batch, poisoned
from oracle_cases import one_thread as one_thread
from torch import Tensor

import grpo_kernels as gk

FAR = (25.0, -25.0, 20.5, -20.5, 11.0, -11.0, 2.5, -2.5)  # beyond every clamp, and k3 = 10 from both sides
CLAMPS = {"input_clamp": 20.0, "output_clamp": 10.0}
ESTIMATORS = ["k1", "abs", "k2", "k3"]


def batch():
    return make_batch(holes=True, large=FAR)


def value_and_gradient(f, logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of the masked sum, with a different weight at every token."""
    x = logps.detach().clone().requires_grad_()
    kl = f(x)
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).view(x.shape) * (mask != 0)
    (torch.where(mask != 0, kl, 0.0) * weights).sum().backward()
    return kl.detach()[mask != 0], x.grad[mask != 0]


def assert_matches(oracle, estimator: str = "k3", *, only_double: bool = False, **options: Any) -> None:
    """Compares ours in both dtypes and layouts, with NaN at masked tokens; a string among the options names a tensor of
    the batch. `only_double`: eager torch itself loses the gradient in float32, where e^u cancels."""
    b = batch()
    exact = value_and_gradient(lambda x: oracle(x, b), b.logps, b.mask)
    assert exact[0].isfinite().all() and exact[1].isfinite().all()
    for dtype, shape in itertools.product(
        [torch.float64] if only_double else [torch.float32, torch.float64], [(-1,), b.mask.shape]
    ):

        def given_(name: str, dtype=dtype, shape=shape) -> Tensor:
            return poisoned(getattr(b, name), b.mask).to(dtype).reshape(shape)

        own = {k: given_(v) if v in ("old", "roll") else v for k, v in options.items()}

        def ours(x: Tensor, own=own, given_=given_, dtype=dtype, shape=shape) -> Tensor:
            kl = gk.kl_divergence(
                x.to(dtype).reshape(shape), given_("ref"), estimator, mask=b.mask.reshape(shape), **own
            )
            assert kl.dtype == dtype and not kl.reshape(b.mask.shape)[b.mask == 0].any()
            return kl.reshape(b.mask.shape)

        got = value_and_gradient(ours, poisoned(b.logps, b.mask), b.mask)
        for name, mine, theirs in zip(("value", "gradient"), got, exact, strict=True):
            assert_near(mine, theirs, 2e-5 if dtype == torch.float32 else 1e-12, f"{dtype} {name}")


VERL = {
    "kl": {"estimator": "k1"}, "k1": {"estimator": "k1"}, "abs": {"estimator": "abs"}, "mse": {"estimator": "k2"},
    "k2": {"estimator": "k2"}, "low_var_kl": CLAMPS, "k3": CLAMPS,
}  # fmt: skip


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("kind", VERL)
def test_verl(kind: str, plus: str) -> None:
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="pip install verl==0.9.1")
    options = VERL[kind] | ({"gradient": "straight_through"} if plus else {})
    assert_matches(lambda x, b: core_algos.kl_penalty(x, b.ref, kind + plus), **options)


def estimate(estimator: str, u: Tensor) -> Tensor:
    return {"k1": -u, "abs": u.abs(), "k2": u * u / 2, "k3": u.exp() - 1 - u}[estimator]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_openrlhf(estimator: str) -> None:
    """Every estimate is clamped to +-10; the exponent is not."""
    assert_matches(lambda x, b: estimate(estimator, b.ref - x).clamp(-10, 10), estimator=estimator, output_clamp=10.0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_slime(estimator: str, unbiased: bool) -> None:
    """use_unbiased_kl multiplies by exp(lp - old) and keeps its gradient."""

    def oracle(x, b):
        return estimate(estimator, b.ref - x) * ((x - b.old).exp() if unbiased else 1.0)

    gradient = "importance_weighted" if unbiased else "pathwise"
    assert_matches(oracle, estimator, gradient=gradient, old_logps="old", only_double=unbiased)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("behaviour", [False, True])
def test_nemo(estimator: str, behaviour: bool) -> None:
    """u is clamped to +-20, weighted, then clamped to +-10; use_on_policy_kl_approximation weighs by exp(lp - roll)."""

    def oracle(x, b):
        u, weight = b.ref - x, (x - (b.roll if behaviour else x.detach())).exp()
        weight = torch.where(u.abs() > 20, weight.detach(), weight)
        return (weight * estimate(estimator, u.clamp(-20, 20))).clamp(-10, 10)

    gradient = "behaviour_weighted" if behaviour else "score_function"
    assert_matches(oracle, estimator=estimator, gradient=gradient, rollout_logps="roll", **CLAMPS)


def test_trl_bias_correction_on_policy() -> None:
    assert_matches(
        lambda x, b: (x - x.detach()).exp() * estimate("k3", b.ref - x),
        gradient="importance_weighted",
        only_double=True,
    )


def test_the_losses_use_this_penalty() -> None:
    """kl_loss of policy_loss is kl_coef times the mean of kl_divergence, in every form."""
    b = batch()
    for estimator in ESTIMATORS:
        for gradient in ("pathwise", "straight_through", "importance_weighted", "score_function", "behaviour_weighted"):
            tensors = {"old_logps": b.old, "rollout_logps": b.roll}
            config = gk.LossConfig(
                kl_coef=0.3, kl_estimator=estimator, kl_gradient=gradient, kl_input_clamp=20.0, kl_output_clamp=10.0
            )
            kl = gk.kl_divergence(b.logps, b.ref, estimator, mask=b.mask, gradient=gradient, **CLAMPS, **tensors)
            out = gk.policy_loss(b.logps, 0 * b.advantages, b.mask, ref_logps=b.ref, config=config, **tensors)
            assert_near(out.loss, 0.3 * kl.sum() / b.mask.sum(), 1e-12, f"{estimator} {gradient}")


def test_same_log_probs_have_no_divergence() -> None:
    x = -torch.rand(50)
    for estimator in ESTIMATORS:
        assert (gk.kl_divergence(x, x, estimator) == 0).all()


def test_k3_keeps_small_differences() -> None:
    """Without expm1, e^u - 1 - u in float32 would be 0 or noise here."""
    u = torch.tensor([1e-4, -1e-4])
    torch.testing.assert_close(gk.kl_divergence(-u, torch.zeros(2)), u * u / 2, rtol=2e-3, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 200), st.integers(0, 2**31), st.sampled_from(ESTIMATORS[1:]))
def test_not_negative_and_k1_has_the_mean(vocab: int, seed: int, estimator: str) -> None:
    """All but k1 are never negative; k1 and k3 average to the exact KL over the policy's own distribution."""
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(vocab, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    assert (gk.kl_divergence(p, q, estimator) >= 0).all()
    exact = (p.exp() * (p - q)).sum()
    for unbiased in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * gk.kl_divergence(p, q, unbiased)).sum(), exact, rtol=1e-10, atol=1e-12)


def test_tokens_of_probability_0() -> None:
    """-inf log-probs: an infinite KL is infinite, a clamped one is the clamp, and gradients are not NaN."""
    inf = math.inf
    logps, ref = torch.tensor([-1.0, -inf, -1.0]), torch.tensor([-inf, -1.0, -2.0])
    assert gk.kl_divergence(logps, ref, "k1").tolist() == [inf, -inf, 1.0]
    x = logps.clone().requires_grad_()
    kl = gk.kl_divergence(x, ref, "k3", **CLAMPS)
    assert kl[:2].tolist() == [10.0, 10.0]
    kl.sum().backward()
    assert x.grad[:2].tolist() == [0.0, 0.0] and x.grad[2].isfinite()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (1,)])
def test_few_tokens(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    kl = gk.kl_divergence(x, x.detach() - 1, "k1")
    kl.sum().backward()
    assert kl.shape == x.grad.shape == shape and (kl == 1).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"estimator": "k4"}, "estimator must be one of 'k1', 'abs', 'k2', 'k3'; got 'k4'"),
        ({"gradient": "plus"}, "gradient must be one of 'pathwise'.*; got 'plus'"),
        ({"input_clamp": 0.0}, "input_clamp must be .* above 0, or None; got 0.0"),
        ({"output_clamp": -1.0}, "output_clamp must be .*; got -1.0"),
        ({"output_clamp": math.nan}, "output_clamp must be .*; got nan"),
        ({"gradient": "behaviour_weighted"}, "needs rollout_logps; got None"),
        ({"mask": torch.ones(2)}, r"mask must have the shape of the tokens, \(2, 3\); got \(2,\)"),
        ({"old_logps": torch.ones(3, 2)}, r"old_logps must have the shape of the tokens, \(2, 3\); got \(3, 2\)"),
        ({"ref_logps": torch.ones(6)}, r"ref_logps must have the shape of the tokens, \(2, 3\); got \(6,\)"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    arguments = {"ref_logps": torch.zeros(2, 3)} | options
    with pytest.raises(ValueError, match=message):
        gk.kl_divergence(torch.zeros(2, 3), **arguments)


@pytest.mark.parametrize("gradient", ["pathwise", "straight_through", "importance_weighted", "behaviour_weighted"])
def test_compiled_is_eager(gradient: str) -> None:
    b = batch()

    def f(x: Tensor) -> Tensor:
        return gk.kl_divergence(
            x, b.ref, "k3", mask=b.mask, gradient=gradient, old_logps=b.old, rollout_logps=b.roll, **CLAMPS
        )

    exact = value_and_gradient(f, b.logps, b.mask)
    got = value_and_gradient(torch.compile(f, fullgraph=True), b.logps, b.mask)
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
