"""Peers' bugs in log-probs, entropy and the gradient in the logits."""

import math

import pytest
import torch
from conftest import BACKENDS_HERE
from fuzz.build import LOWEST
from oracle_cases import one_thread as one_thread

import grpo_kernels as gk

INF, NAN = math.inf, math.nan


@pytest.fixture(params=BACKENDS_HERE)
def every_backend(request):
    return request.param


def loss_and_gradient(z, targets, backend, *, advantages=None, config=None, **options):
    x = z.clone().requires_grad_()
    adv = torch.ones(targets.shape) if advantages is None else advantages
    out = gk.grpo_loss(x, targets, adv, config=config, backend=backend, **options)
    return out, torch.autograd.grad(out.loss, x)[0]


@pytest.mark.parametrize("low", [-INF, LOWEST[torch.float32]])
def test_r1_a_row_of_almost_only_masked_columns(every_backend, low):
    """flash-attention #1930: NaN when most logits are -inf."""
    z = torch.full((1, 2, 300), low)
    z[0, 0, [7, 299]], z[0, 1, 0] = torch.tensor([1.0, 2.0]), -3.0
    targets = torch.tensor([[7, 0]])
    out, g = loss_and_gradient(z, targets, every_backend)
    expected = torch.log_softmax(torch.tensor([1.0, 2.0]), 0)
    torch.testing.assert_close(out.logps[0].float(), torch.tensor([expected[0], 0.0]), rtol=1e-6, atol=1e-7)
    others = (expected.exp() - torch.tensor([1.0, 0.0])) / 2
    torch.testing.assert_close(g[0, 0, [7, 299]], others, rtol=1e-6, atol=1e-7)
    g[0, 0, [7, 299]] = 0
    assert (g == 0).all()


@pytest.mark.parametrize("offset", [2.0**14, -(2.0**14), 2.0**20])
def test_r2_shared_offset_does_not_cost_the_gap(every_backend, offset):
    """mlx #4188: logit - logsumexp loses the gap between logits under a large offset that they share."""
    z = torch.tensor([[[1.0, 2.0, 0.5, -3.0, 0.25]]])
    plain, far = (
        gk.token_logps(x, torch.tensor([[0]]), return_entropy=True, backend=every_backend) for x in (z, z + offset)
    )
    assert torch.equal(plain.logps, far.logps) and torch.equal(plain.entropy, far.entropy)
    assert abs(float(plain.logps) - float(torch.log_softmax(z.double(), -1)[0, 0, 0])) < 3e-7


@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_r3_entropy_at_zero_probability(every_backend, objective):
    """TRL #7221, SkyRL #2259, VeOmni #720: entropy and its gradient are NaN where a token has no probability."""
    z = torch.tensor([[[1.0, 2.0, -INF, 0.5]]])
    config = gk.LossConfig(objective=objective, entropy_coef=0.3)
    out, g = loss_and_gradient(z, torch.tensor([[0]]), every_backend, config=config)
    kept = [0, 1, 3]
    small, expected = loss_and_gradient(z[..., kept].double(), torch.tensor([[0]]), "reference", config=config)
    torch.testing.assert_close(out.loss.double(), small.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(g[..., kept].double(), expected, rtol=1e-5, atol=1e-7)
    assert g[0, 0, 2] == 0 and out.entropy.isfinite().all()


def test_r6_a_target_without_probability_is_not_given_one(every_backend):
    """NeMo-RL #3551: -inf replaced by 0.0 fabricates the ratio exp(-old); and dropping it drops its KL and its count."""
    z = torch.tensor([[[1.0, 2.0, -INF], [1.0, 2.0, 0.0]]])
    targets, old = torch.tensor([[2, 1]]), torch.tensor([[-5.0, -1.0]])
    out, g = loss_and_gradient(z, targets, every_backend, old_logps=old)
    assert out.logps[0, 0] == -INF and out.metrics["tokens"] == 2
    assert out.metrics["ratio_min"] == 0 and out.per_token_loss[0, 0] == 0 and (g[0, 0] == 0).all()
    alone, expected = loss_and_gradient(z[:, 1:], targets[:, 1:], every_backend, old_logps=old[:, 1:])
    torch.testing.assert_close(out.loss * 2, alone.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(2 * g[:, 1:], expected, rtol=1e-5, atol=1e-8)


def test_r6_a_rejected_token_keeps_its_kl(every_backend):
    z, targets = torch.tensor([[[1.0, 2.0, 0.5], [1.0, 2.0, 0.0]]]), torch.tensor([[2, 1]])
    config, ref = gk.LossConfig(kl_coef=0.1), torch.tensor([[-2.0, -3.0]])
    both = [
        loss_and_gradient(z, targets, every_backend, config=config, ref_logps=ref, token_weights=w)[0].metrics
        for w in (torch.tensor([[0.0, 1.0]]), torch.ones(1, 2))
    ]
    assert both[0]["kl"] == both[1]["kl"] > 0 and both[0]["kl_loss"] == both[1]["kl_loss"]


@pytest.mark.parametrize("gap", [4.0, 8.0, 12.0])
def test_g1_the_targets_gradient_of_a_peaked_row(every_backend, gap):
    """Liger #1268, #1329: in bfloat16 the target's gradient, p - 1, was rounded twice and lost up to all its digits."""
    z = torch.zeros(1, 1, 40, dtype=torch.bfloat16)
    z[0, 0, 3] = gap
    _, g = loss_and_gradient(z, torch.tensor([[3]]), every_backend)
    exact = torch.expm1(torch.log_softmax(z.double(), -1)[0, 0, 3])
    assert abs(float(g[0, 0, 3]) / float(exact) - 1) <= 2**-8


@pytest.mark.parametrize("shift", [-100.0, -1e4])
def test_g2_logits_that_are_all_negative(every_backend, shift):
    """verl's fused kernel, SkyRL #2141: a maximum that starts at 0 gives NaN, or wrong numbers."""
    z = torch.tensor([[[0.5, 1.0, -0.5, 0.25]]]) + shift
    out = gk.token_logps(z, torch.tensor([[1]]), return_entropy=True, backend=every_backend)
    exact = torch.log_softmax(z.double(), -1)[0, 0]
    torch.testing.assert_close(out.logps.double().squeeze(), exact[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.entropy.double().squeeze(), -(exact.exp() * exact).sum(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_g10_log_probs_are_never_above_0(every_backend, dtype):
    """verl #2656: a fused kernel with log-probs above 0, and the reward collapsed."""
    z = torch.zeros(1, 6, 37, dtype=dtype)
    z[0, torch.arange(6), torch.arange(6)] = torch.tensor([0.0, 5.0, 20.0, 50.0, 88.0, 2e4]).to(dtype)
    logps = gk.token_logps(z, torch.arange(6)[None], backend=every_backend).logps
    assert (logps <= 0).all() and (logps[0, 4:] == 0).all()


def test_g12_what_is_masked_reaches_nothing(every_backend):
    """unsloth: inf * 0 is NaN. Logits, targets and every log-prob under the mask hold what they like."""
    g = torch.Generator().manual_seed(0)
    z, mask = torch.randn(2, 3, 9, generator=g), torch.tensor([[1, 1, 0], [0, 1, 1]])
    targets, logps = torch.randint(9, (2, 3), generator=g), -torch.rand(2, 3, generator=g)
    config = gk.LossConfig(kl_coef=0.1, entropy_coef=0.1)
    for bad in (NAN, INF, -INF):
        dirty = [torch.where(mask[..., None] != 0, z, bad), torch.where(mask != 0, logps, bad)]
        results = [
            loss_and_gradient(
                x, targets, every_backend, config=config, mask=mask, old_logps=y, ref_logps=y, rollout_logps=y
            )
            for x, y in ((z, logps), dirty)
        ]
        assert torch.equal(results[0][0].loss, results[1][0].loss) and torch.equal(results[0][1], results[1][1])


def test_g15_the_loss_of_bfloat16_logits_is_float32(every_backend):
    """TransformerEngine #3193: the loss went through a bfloat16 buffer. 1/256 off at once, if so."""
    z = torch.tensor([[[1.0, 2.0, 0.5]] * 3], dtype=torch.bfloat16)
    out, _ = loss_and_gradient(z, torch.tensor([[0, 1, 2]]), every_backend, config=gk.LossConfig(objective="reinforce"))
    exact = -torch.log_softmax(z.double(), -1)[0, torch.arange(3), torch.arange(3)].mean()
    assert out.loss.dtype == torch.float32 and abs(float(out.loss) - float(exact)) < 1e-6


@pytest.mark.parametrize("backend", [name for name in BACKENDS_HERE if name in ("cpu", "reference", "cuda")])
def test_h9_bfloat16_at_a_vocabulary_of_152k(backend):
    """A log-prob of bfloat16 logits is good to 1e-3 at V = 152k: float32 sums, whatever the logits' own digits."""
    z = (3 * torch.randn(1, 2, 151_936, generator=torch.Generator().manual_seed(1))).bfloat16()
    out = gk.token_logps(z, torch.tensor([[5, 151_935]]), backend=backend).logps
    exact = torch.log_softmax(z.double(), -1)[0, [0, 1], [5, 151_935]]
    torch.testing.assert_close(out[0].double(), exact, rtol=0, atol=1e-4)


def test_x3_clip_statistics_are_of_the_ratio_before_its_clamp(every_backend):
    """RLinf #1529, verl #6806: counted after the clamp, nothing is ever clipped."""
    lp, old = torch.full((1, 4), -1.0), torch.tensor([[-1.0, -2.0, -0.5, -3.0]])
    for config, cap in (
        (gk.LossConfig(), "ratio_max"),
        (gk.LossConfig(objective="cispo", cispo_high=1.2), "ratio_max"),
    ):
        m = gk.policy_loss(lp, torch.ones(1), old_logps=old, config=config, backend=every_backend).metrics
        assert m["clip_high"] == 0.5
        assert abs(float(m[cap]) - math.exp(2)) < 1e-5


def test_x10_a_tensor_on_another_device_is_refused(every_backend):
    """Liger #1303: launched on the current GPU with a tensor of another one. By what a CPU can tell apart: meta."""
    lp, far = torch.full((2, 3), -1.0), torch.empty(2, 3, device="meta")
    for name in ("old_logps", "rollout_logps", "token_weights", "entropy_mask"):
        with pytest.raises(ValueError, match=rf"{name}.*meta"):
            gk.policy_loss(lp, torch.ones(2), backend=every_backend, **{name: far})
