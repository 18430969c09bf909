"""Columns of probability 0, and what a shift of the logits does not change. What weights and bounds remove is in
test_zero_rule.py."""

import itertools
import math

import pytest
import torch
from conftest import BACKENDS_HERE
from oracle_cases import one_thread as one_thread  # small tensors wait for a second thread longer than they compute

import grpo_kernels as gk

INF = math.inf


@pytest.fixture(params=BACKENDS_HERE)
def every_backend(request):
    return request.param


def exact_row(z, target, old, adv, coef, temperature):
    """Loss and gradient of one row in float64, computed from the columns of non-zero probability only."""
    z = z.double()
    there = z > -1e30
    leaf = z[there].requires_grad_()
    log_p = torch.log_softmax(leaf / temperature, -1)
    zero = torch.zeros((), dtype=torch.float64)
    lp = log_p[there[:target].sum()] if there[target] else zero - INF
    ratio = (lp - old).exp()
    loss = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv) + coef * (log_p.exp() * log_p).sum()
    (g,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), torch.zeros_like(z).masked_scatter(there, g)


@pytest.mark.parametrize("coef", [0.0, 0.1])
@pytest.mark.parametrize("single_pass", [True, False])
def test_columns_of_probability_0(every_backend, coef, single_pass):
    """Columns at -inf, even the target, have a finite gradient: p log p and its derivative are 0 where p is 0."""
    for target, low in itertools.product((0, 2), (-INF, torch.finfo(torch.float32).min)):
        z = torch.tensor([1.0, 2.0, low, 0.5, low])
        x = z.clone()[None, None].requires_grad_()
        config = gk.LossConfig(entropy_coef=coef)
        out = gk.grpo_loss(
            x * 1, torch.tensor([[target]]), torch.ones(1), old_logps=torch.tensor([[-1.5]]), config=config,
            temperature=0.5, single_pass=single_pass, backend=every_backend,
        )  # fmt: skip
        (g,) = torch.autograd.grad(out.loss, x)
        loss, expected = exact_row(z, target, -1.5, 1.0, coef, 0.5)
        torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(g[0, 0].double(), expected, rtol=1e-5, atol=1e-7)
        assert (g[0, 0, [2, 4]] == 0).all()


def test_a_large_offset_is_subtracted_before_the_temperature_divides(every_backend):
    z = torch.tensor([1.0, 2.0, 0.5, -3.0])
    for options in ({"temperature": 0.7}, {"logit_scale": 0.3}):
        plain, far = (
            gk.token_logps(x[None, None], torch.tensor([[0]]), backend=every_backend, **options).logps
            for x in (z, z + 2.0**20)
        )
        assert torch.equal(plain, far)
