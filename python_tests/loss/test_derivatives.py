"""Second derivatives raise or are right, and float16 gradients survive until a loss scale is known."""

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.testing.inputs import make_batch

HIDDEN = 6


def leaves(dtype=torch.float32):
    b, g = make_batch(3, 4, 17).to(dtype), torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*s, generator=g).to(dtype) for s in ((3, 4, HIDDEN), (17, HIDDEN)))
    return b, hidden, weight


def penalised(name, backend):
    """A loss, and the tensor that its gradient is penalised in."""
    b, hidden, weight = leaves(torch.float64 if backend == "reference" else torch.float32)
    x = {
        "policy_loss": b.old_logps,
        "value_loss": b.old_logps,
        "linear_token_logps": hidden,
        "linear_grpo_loss": hidden,
    }
    x = x.get(name, b.logits).clone().requires_grad_()
    # Not a constant under the second derivative: the ratio is away from 1 and unclipped, the entropy counts.
    k = {
        "old_logps": b.ref_logps,
        "config": gk.LossConfig(entropy_coef=0.1, eps_low=0.9, eps_high=9.0),
        "backend": backend,
    }
    losses = {
        "token_logps": lambda x: gk.token_logps(x, b.targets, mask=b.mask, backend=backend).logps.sum(),
        "linear_token_logps": lambda x: gk.linear_token_logps(
            x, weight, b.targets, mask=b.mask, backend=backend
        ).logps.sum(),
        "policy_loss": lambda x: gk.policy_loss(x, b.advantages, b.mask, **{**k, "config": None}).loss,
        "grpo_loss": lambda x: gk.grpo_loss(x, b.targets, b.advantages, b.mask, **k).loss,
        "grpo_loss in two passes": lambda x: (
            gk.grpo_loss(x, b.targets, b.advantages, b.mask, single_pass=False, **k).loss
        ),
        "linear_grpo_loss": lambda x: gk.linear_grpo_loss(x, weight, b.targets, b.advantages, b.mask, **k).loss,
        "value_loss": lambda x: gk.value_loss(x, b.ref_logps, b.rollout_logps, b.mask, backend=backend).loss,
    }
    return losses[name], x


FUNCTIONS = (
    "token_logps", "linear_token_logps", "policy_loss", "grpo_loss", "grpo_loss in two passes", "linear_grpo_loss",
    "value_loss",
)  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_of_a_kernel_raises(backend, name):
    """A constant upstream gradient, of which torch's once_differentiable says nothing."""
    loss, x = penalised(name, backend)
    value = loss(x)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*backend='reference'"):
        torch.autograd.grad(value, x, create_graph=True)
    loss(x).backward()  # the first one is as before
    assert x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_of_the_reference_is_right(name):
    loss, x = penalised(name, "reference")
    assert torch.autograd.gradgradcheck(loss, (x,), fast_mode=True)


# ---- float16: the gradient of a mean over many tokens is below its smallest number until the loss is scaled ----

TOKENS, VOCAB, SCALE = 1024, 2048, 65536.0


def many_tokens():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, TOKENS, VOCAB, generator=g).half()
    return logits, torch.randint(VOCAB, (4, TOKENS), generator=g), torch.tensor([1.0, -0.5, 0.25, 2.0])


def exact_gradient(logits, targets, advantages):
    x = logits.double().requires_grad_()
    (gk.grpo_loss(x, targets, advantages).loss * SCALE).backward()
    return x.grad


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.soak_where(lambda backend, **_: backend == "triton")
@pytest.mark.parametrize("inplace", [False, True])
def test_a_scaled_loss_of_float16_logits_has_its_whole_gradient(backend, inplace):
    logits, targets, advantages = many_tokens()
    x = logits.clone().requires_grad_()
    (gk.grpo_loss(x * 1, targets, advantages, inplace=inplace, backend=backend).loss * SCALE).backward()
    assert error(x.grad, exact_gradient(logits, targets, advantages)) < 2**-11


def test_written_before_the_scale_is_known_it_would_be_lost(monkeypatch):
    """What the rule is for: the same gradient written in the forward."""
    monkeypatch.setattr("grpo_kernels.loss.grpo._holds_gradient", lambda *_: True)
    logits, targets, advantages = many_tokens()
    x = logits.clone().requires_grad_()
    (gk.grpo_loss(x, targets, advantages).loss * SCALE).backward()
    assert (x.grad == 0).double().mean() > 0.05 and (exact_gradient(logits, targets, advantages) != 0).all()


@pytest.mark.parametrize("scale", [SCALE, torch.tensor(SCALE)], ids=["number", "tensor"])
def test_a_loss_scale_as_scale_takes_one_pass(scale, monkeypatch):
    monkeypatch.setattr("grpo_kernels.loss.grpo.FromLogits.logps", None)  # the way of two passes
    logits, targets, advantages = many_tokens()
    x = logits.clone().requires_grad_()
    gk.grpo_loss(x, targets, advantages, scale=scale).loss.backward()
    assert error(x.grad, exact_gradient(logits, targets, advantages)) < 2**-11


def test_a_grad_scaler_gives_its_scale_to_the_single_pass(monkeypatch):
    """As docs/migrating.md has it; a step of the optimizer with the unscaled gradient follows."""
    monkeypatch.setattr("grpo_kernels.loss.grpo.FromLogits.logps", None)
    logits, targets, advantages = many_tokens()
    x = torch.nn.Parameter(logits.float())
    optimizer, scaler = torch.optim.SGD([x], lr=SCALE), torch.amp.GradScaler("cpu", init_scale=SCALE)
    gk.grpo_loss(x.half(), targets, advantages, scale=scaler.scale(torch.ones(()))).loss.backward()
    scaler.step(optimizer)
    scaler.update()
    step = logits.float() - x.detach()
    assert error(step, exact_gradient(logits, targets, advantages)) < 2**-10


@pytest.mark.parametrize("function", ["grpo_loss", "linear_grpo_loss"])
def test_a_grad_scaler_trains_float16(function):
    """torch.amp.GradScaler around our loss: the unscaled gradient of float32 leaves, to float16's precision."""
    _, targets, advantages = many_tokens()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(4, TOKENS, 16, generator=g).half(), (torch.randn(VOCAB, 16, generator=g) / 4).half()

    def gradients(dtype, scaled):
        x, w = (t.to(torch.float32 if scaled else dtype).requires_grad_() for t in (hidden, weight))
        h, head = x.to(dtype), w.to(dtype)
        if function == "grpo_loss":
            loss = gk.grpo_loss(h @ head.T, targets, advantages).loss
        else:
            loss = gk.linear_grpo_loss(h, head, targets, advantages).loss
        (scaler.scale(loss) if scaled else loss).backward()
        return [t.grad.double() / (SCALE if scaled else 1) for t in (x, w)]

    exact = gradients(torch.float64, scaled=False)
    for found, expected in zip(gradients(torch.float16, scaled=True), exact, strict=True):
        assert error(found, expected) < 2e-3
