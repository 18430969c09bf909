"""Peers' bugs in what autograd, in-place writes and torch.compile make of a fused loss."""

import pytest
import torch
from conftest import BACKENDS_HERE
from oracle_cases import one_thread as one_thread

import grpo_kernels as gk


@pytest.fixture(params=BACKENDS_HERE)
def every_backend(request):
    return request.param


def data(batch=2, tokens=3, vocab=11, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, tokens, vocab, generator=g).to(dtype)
    return z, torch.randint(vocab, (batch, tokens), generator=g), torch.randn(batch, generator=g)


@pytest.mark.parametrize("single_pass", [True, False])
def test_r4_float32_logits_are_left_as_they_are(every_backend, single_pass):
    """Megatron-LM #1594, verl #2484: `.float()` of float32 logits is no copy, and in-place work wrote into the caller's."""
    z, targets, adv = data()
    x = z.clone().requires_grad_()
    config = gk.LossConfig(entropy_coef=0.1)
    gk.grpo_loss(
        x, targets, adv, config=config, single_pass=single_pass, temperature=0.7, backend=every_backend
    ).loss.backward()
    gk.token_logps(x, targets, backend=every_backend).logps.sum().backward()
    assert torch.equal(x.detach(), z)


class Head(torch.autograd.Function):
    """A custom function with an output to squeeze, as verl's fused head has."""

    @staticmethod
    def forward(ctx, x):
        return (2 * x)[None]

    @staticmethod
    def backward(ctx, g):
        return 2 * g[0]


@pytest.mark.parametrize("single_pass", [True, False])
def test_r5_in_place_on_a_squeezed_view_of_a_functions_output(every_backend, single_pass):
    """verl #6935: autograd refuses it, or worse, accepts it with a wrong gradient."""
    z, targets, adv = data()
    gradients = []
    for inplace in (False, True):
        x = z.clone().requires_grad_()
        logits = Head.apply(x).squeeze(0)
        gk.grpo_loss(
            logits, targets, adv, inplace=inplace, single_pass=single_pass, backend=every_backend
        ).loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("function", ["logits", "linear"])
def test_r20_any_upstream_gradient(every_backend, function):
    """Liger #1298: grad_output[0] multiplied every token's gradient."""
    z, targets, _ = data()
    up = torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, -0.25]])
    x = z.double().requires_grad_()
    exact = torch.autograd.grad((torch.log_softmax(x, -1).gather(-1, targets[..., None])[..., 0] * up).sum(), x)[0]
    y, eye = z.clone().requires_grad_(), torch.eye(11)
    if function == "logits":
        logps = gk.token_logps(y, targets, backend=every_backend).logps
    else:
        logps = gk.linear_token_logps(y, eye, targets, chunk_rows=2, backend=every_backend).logps
    (g,) = torch.autograd.grad(logps, y, up)
    torch.testing.assert_close(g.double(), exact, rtol=1e-5, atol=1e-6)


def test_g3_an_upstream_gradient_that_is_expanded_or_strided(every_backend):
    """Liger's luspo: a gradient of shape (B, 1), expanded, was read past its end."""
    z, targets, _ = data()
    base = torch.tensor([[2.0], [-1.0]])
    strided = torch.arange(12.0).view(2, 6)[:, ::2]
    for up in (base.expand(2, 3), strided, strided.flip(0), torch.ones(3, 2).t()):
        results = []
        for g in (up, up.contiguous()):
            x = z.clone().requires_grad_()
            results.append(torch.autograd.grad(gk.token_logps(x, targets, backend=every_backend).logps, x, g)[0])
        assert torch.equal(*results)


def test_r21_a_head_that_is_used_twice(every_backend):
    """unsloth-zoo #892: backward inside a Function wrote .grad and returned it too: lm_head's gradient came twice."""
    hidden, targets, adv = data(vocab=4)
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    targets = targets.clamp(max=8)

    def loss(w):
        return gk.linear_grpo_loss(hidden, w, targets, adv, chunk_rows=2, backend=every_backend).loss

    once, twice = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(once).backward()
    (loss(twice) + loss(twice)).backward()
    torch.testing.assert_close(twice.grad, 2 * once.grad, rtol=1e-6, atol=1e-8)
    reference = weight.clone().requires_grad_()
    gk.grpo_loss(hidden @ reference.t(), targets, adv, backend="reference").loss.backward()
    torch.testing.assert_close(once.grad, reference.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_r22_the_backbone_gets_its_gradient(every_backend, frozen):
    """verl #6913, Liger #1251: requires_grad read after flatten or clone, inside forward, is False. With a frozen head
    (g16: a LoRA's, ZeRO-3's) too."""
    x, targets, adv = data(vocab=4)
    body = torch.nn.Linear(4, 4)
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(3)).requires_grad_(not frozen)
    hidden = body(x)
    for view in (hidden.flatten(0, 1).view(2, 3, 4), hidden.clone(), hidden):
        out = gk.linear_grpo_loss(view, weight, targets.clamp(max=8), adv, chunk_rows=2, backend=every_backend)
        (g,) = torch.autograd.grad(out.loss, body.weight, retain_graph=True)
        assert g.shape == (4, 4) and g.any()


@pytest.mark.parametrize("backend", [name for name in BACKENDS_HERE if name in ("cpu", "emulated", "cuda")])
def test_r23_a_compiled_slice_and_rows_that_are_skipped(backend):
    """Liger #1338, PyTorch #180642: a compiled kernel's write into a slice is lost; rows that it skips keep garbage."""
    z, targets, adv = data(tokens=4)
    targets = torch.where(torch.tensor([[1, 0, 1]]) == 0, -100, targets[:, :3])

    def loss(x):
        return gk.grpo_loss((x * 1)[:, 1:], targets, adv, inplace=True, backend=backend).loss

    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(y), y)
    assert torch.equal(eager, compiled) and (compiled[:, 0] == 0).all() and (compiled[:, 2] == 0).all()
    assert compiled[:, [1, 3]].any()


@pytest.mark.parametrize("single_pass", [True, False])
def test_g6_a_second_backward_through_overwritten_logits_raises(every_backend, single_pass):
    """Liger's `.data`, QuACK #209: silently wrong. Where nothing was overwritten it is right."""
    z, targets, adv = data()
    x = z.clone().requires_grad_()
    loss = gk.grpo_loss(x * 1, targets, adv, inplace=True, single_pass=single_pass, backend=every_backend).loss
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    if every_backend == "reference":
        assert torch.equal(first, torch.autograd.grad(loss, x)[0])  # it has no such memory to save
        return
    with pytest.raises(RuntimeError, match="propagated once"):
        torch.autograd.grad(loss, x)


def test_g13_the_first_call_in_place_is_like_the_next(every_backend):
    """SkyRL: an autotuner ran a kernel that overwrites its input several times."""
    z, targets, adv = data(vocab=67)
    results = []
    for _ in range(3):
        x = z.clone().requires_grad_()
        out = gk.grpo_loss(x * 1, targets, adv, inplace=True, backend=every_backend)
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, x)[0]))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_g7_a_head_of_many_bfloat16_rows(every_backend):
    """cut-cross-entropy #14: lm_head's gradient was added up in bfloat16. A column that every row wants."""
    rows = 128 if every_backend in ("triton", "emulated") else 4096
    hidden = torch.ones(1, rows, 4, dtype=torch.bfloat16)
    weight = torch.zeros(3, 4, dtype=torch.bfloat16).requires_grad_()
    gk.linear_grpo_loss(
        hidden, weight, torch.zeros(1, rows, dtype=torch.int64), torch.ones(1), chunk_rows=rows // 16,
        config=gk.LossConfig(aggregation="token_sum"), backend=every_backend,
    ).loss.backward()  # fmt: skip
    exact = torch.tensor([-2 / 3, 1 / 3, 1 / 3]) * rows
    torch.testing.assert_close(weight.grad[:, 0].float(), exact, rtol=2**-7, atol=0)


def test_g18_tokens_without_advantage_keep_their_kl_and_entropy(every_backend):
    """TRL #5640, #7068: a group of equal rewards still has a KL gradient; rows are skipped only where nothing is left."""
    z, targets, _ = data()
    ref = torch.full((2, 3), -2.0)
    for options in ({"kl_coef": 0.1}, {"entropy_coef": 0.1}):
        x = z.clone().requires_grad_()
        out = gk.grpo_loss(
            x, targets, torch.zeros(2), ref_logps=ref, config=gk.LossConfig(**options), backend=every_backend
        )
        assert torch.autograd.grad(out.loss, x)[0].abs().amax(-1).all()


def test_x8_the_chunked_entropy_has_its_gradient(every_backend):
    """TRL #6625: the chunked backward dropped grad_entropy; #6140: the bonus had none."""
    hidden, targets, adv = data(vocab=4)
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    config = gk.LossConfig(entropy_coef=0.5)
    gradients = []
    for single_pass in (True, False):
        h = hidden.clone().requires_grad_()
        out = gk.linear_grpo_loss(
            h,
            weight,
            targets.clamp(max=8),
            adv,
            config=config,
            chunk_rows=2,
            single_pass=single_pass,
            backend=every_backend,
        )
        gradients.append(torch.autograd.grad(out.loss, h)[0])
    h = hidden.double().requires_grad_()
    out = gk.grpo_loss(h @ weight.double().t(), targets.clamp(max=8), adv, config=config, backend="reference")
    exact = torch.autograd.grad(out.loss, h)[0]
    for g in gradients:
        torch.testing.assert_close(g.double(), exact, rtol=1e-5, atol=1e-6)


def test_x12_what_is_logged_holds_no_graph(every_backend):
    """verl #6699: metrics kept a graph per micro-batch alive."""
    z, targets, adv = data()
    out = gk.grpo_loss(z.requires_grad_(), targets, adv, return_entropy=True, backend=every_backend)
    logged = [*out.metrics.values(), out.logps, out.entropy, out.per_token_loss]
    assert out.loss.requires_grad and not any(x.requires_grad for x in logged)
    correction = gk.rollout_correction(z[..., 0].detach(), z[..., 1].detach(), weight="truncate", high=2.0)
    assert not any(x.requires_grad for x in (correction.token_weights, *correction.metrics.values()))


def test_x7_the_log_probs_of_a_result_are_not_the_callers(every_backend):
    """slime #2114, verl #5974: KL, advantages and returns shared memory and were edited through each other."""
    lp = torch.full((2, 3), -1.0)
    gk.policy_loss(lp, torch.ones(2), backend=every_backend).logps.zero_()
    assert (lp == -1).all()


def test_x7_the_mask_of_a_correction_is_not_the_callers():
    lp, mask = torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool)
    gk.rollout_correction(lp, lp, mask).mask[0, 0] = False
    assert mask.all()


def test_x7_advantages_and_returns_are_two_tensors(every_backend):
    rewards, values = torch.full((2, 3), -1.0), torch.ones(2, 3)
    out = gk.gae(rewards, values, gamma=1.0, lam=1.0, backend=every_backend)
    out.advantages.zero_()
    assert out.returns.any() and (rewards == -1).all() and (values == 1).all()
    gk.reinforce_plus_plus(rewards, torch.ones(2, 3), backend=every_backend).advantages.zero_()
    assert (rewards == -1).all()
