"""Backwards of outputs that are used partly, twice or not at all: gradients that nobody needs are not computed."""

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.testing.inputs import make_batch


class Drops(torch.autograd.Function):
    """Uses its input, and has no gradient for it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


def leaf(x, dtype):
    return x.to(dtype).clone().requires_grad_()


def logits_loss(**options):
    def make(dtype, backend):
        b = make_batch().to(dtype)
        x = leaf(b.logits, dtype)
        return (x,), gk.grpo_loss(x * 1, b.targets, b.advantages, b.mask, backend=backend, **options).loss

    return make


def linear_loss(**options):
    def make(dtype, backend):
        b = make_batch().to(dtype)
        hidden, weight = leaf(b.logits[..., :9], dtype), leaf(torch.linspace(-1, 1, 133 * 9).view(133, 9), dtype)
        loss = gk.linear_grpo_loss(hidden, weight, b.targets, b.advantages, b.mask, backend=backend, **options).loss
        return (hidden, weight), loss

    return make


def loss_from_logps(dtype, backend):
    b = make_batch().to(dtype)
    x = leaf(b.old_logps, dtype)
    return (x,), gk.policy_loss(x, b.advantages, b.mask, backend=backend).loss


def critic_loss(dtype, backend):
    b = make_batch().to(dtype)
    x = leaf(b.old_logps, dtype)
    return (x,), gk.value_loss(x, b.ref_logps, b.rollout_logps, b.mask, backend=backend).loss


LOSSES = {
    "single pass": logits_loss(),
    "single pass in place": logits_loss(inplace=True),
    "two sweeps": logits_loss(single_pass=False),
    "two sweeps in place": logits_loss(single_pass=False, inplace=True),
    "linear": linear_loss(),
    "linear, recomputed": linear_loss(single_pass=False),
    "policy": loss_from_logps,
    "value": critic_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_a_gradient_gives_none(name, backend, acc_dtype):
    """And what a later backward needs is not overwritten."""
    leaves, loss = LOSSES[name](acc_dtype, backend)
    torch.autograd.backward(Drops.apply(loss), retain_graph=True)
    assert all(x.grad is None for x in leaves)
    loss.backward()
    others, again = LOSSES[name](acc_dtype, backend)
    again.backward()
    for x, y in zip(leaves, others, strict=True):
        assert torch.equal(x.grad, y.grad) and x.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_used_twice(name, backend, acc_dtype):
    leaves, loss = LOSSES[name](acc_dtype, backend)
    (loss + 2 * loss).backward()
    others, once = LOSSES[name](acc_dtype, backend)
    (3 * once).backward()
    for x, y in zip(leaves, others, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def logps_of(linear, inplace, backend, acc_dtype):
    b = make_batch().to(acc_dtype)
    k = {"mask": b.mask, "return_entropy": True, "backend": backend}
    if linear:
        x, w = leaf(b.logits[..., :9], acc_dtype), torch.linspace(-1, 1, 133 * 9, dtype=acc_dtype).view(133, 9)
        return x, gk.linear_token_logps(x, w, b.targets, **k)
    x = leaf(b.logits, acc_dtype)
    return x, gk.token_logps(x * 1, b.targets, inplace_backward=inplace, **k)


@pytest.mark.parametrize("linear, inplace", [(False, False), (False, True), (True, False)])
def test_logps_and_entropy_alone_add_up_to_both(linear, inplace, backend, acc_dtype):
    gradients = []
    for uses in ((1, 0), (0, 1), (1, 1)):
        x, out = logps_of(linear, inplace, backend, acc_dtype)
        used = [n * y.sum() for n, y in zip(uses, out[:2], strict=True) if n]
        sum(used).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2], rtol=1e-4, atol=1e-5)
    assert gradients[0].any() and gradients[1].any()


@pytest.mark.parametrize("linear, inplace", [(False, False), (False, True), (True, False)])
def test_logps_without_a_gradient_give_none(linear, inplace, backend, acc_dtype):
    x, out = logps_of(linear, inplace, backend, acc_dtype)
    torch.autograd.backward(Drops.apply(out.logps).sum() + Drops.apply(out.entropy).sum(), retain_graph=True)
    assert x.grad is None
    out.logps.sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("linear", [False, True])
def test_no_entropy_gradient_is_computed_unless_needed(linear, backend, acc_dtype, monkeypatch):
    """The entropy's gradient is None, rather than zeros that the kernel would multiply by."""
    from grpo_kernels import backends

    seen, module = [], backends.implementation(backend)
    run = module.row_backward
    monkeypatch.setattr(module, "row_backward", lambda *a: (seen.append(a[3]), run(*a))[1])
    _, out = logps_of(linear, False, backend, acc_dtype)
    out.logps.sum().backward()
    assert seen == [None]


def test_entropy_alone_has_a_gradient(backend, acc_dtype):
    b = make_batch().to(acc_dtype)
    entropy = leaf(b.old_logps.abs(), acc_dtype)
    k = {"config": gk.LossConfig(entropy_coef=0.1), "backend": backend}
    gk.policy_loss(b.old_logps, b.advantages, b.mask, entropy=entropy, **k).loss.backward()
    torch.testing.assert_close(entropy.grad, torch.where(b.mask, -0.1 / b.mask.sum(), 0.0).to(acc_dtype))
