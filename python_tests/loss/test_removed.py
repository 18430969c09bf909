"""What a weight, an advantage or a bound of exactly 0 removes contributes exactly 0, whatever it holds; a NaN that is not
removed is never hidden."""

import itertools
import math

import pytest
import torch
from conftest import BACKENDS_HERE
from forms import OBJECTIVES
from oracle_cases import one_thread as one_thread  # small tensors wait for a second thread longer than they compute

import grpo_kernels as gk
from grpo_kernels import config
from grpo_kernels.config import KL_GRADIENTS

INF, NAN = math.inf, math.nan
BY_COVARIANCE = [name for name, objective in config.OBJECTIVES.items() if objective.selects_tokens]
BY_SEQUENCE = [name for name, objective in config.OBJECTIVES.items() if objective.pooling != "none"]
LOSSES = {"clip": {}, "dual": {"dual_clip": 3.0}, "delta": {"delta": 1.5}, **OBJECTIVES}
# (logp, old and rollout): a ratio that overflows in every dtype, or is 0 / 0, and what has no number at all.
FAR = [(-1.0, -2000.0), (-1.0, -INF), (-2000.0, -1.0), (-INF, -1.0)]
BAD = [*FAR, (-1.0, NAN), (NAN, -1.0), (NAN, NAN)]
WAYS = ["token_weights", "entropy_mask", "sequence_weights"]


def run(config, logps, old, backend, real, *, adv, **options):
    x = torch.tensor(logps, dtype=real, requires_grad=True)
    old = torch.tensor(old, dtype=real)
    out = gk.policy_loss(
        x, torch.tensor(adv, dtype=real), old_logps=old, rollout_logps=old, config=config, backend=backend, **options
    )
    return out, torch.autograd.grad(out.loss, x)[0]


GOOD = [(-1.0, -1.1), (-0.5, -0.5)]


def columns(pairs):
    """Log-probs and old ones of one sequence: the bad tokens, then two good ones."""
    return tuple([[pair[i] for pair in (*pairs, *GOOD)]] for i in (0, 1))


def harmless(pairs):
    return [(-1.0, -1.0)] * len(pairs)


def removing(ways, bad, real):
    """Of a row for each way, the first `bad` tokens."""
    off = {way: torch.ones(len(ways), bad + len(GOOD), dtype=real) for way in ways}
    for i, way in enumerate(ways):
        off[way][i, :bad] = 0
    if "sequence_weights" in ways:
        off["sequence_weights"] = off["sequence_weights"][:, 0]
    return off


@pytest.fixture(params=BACKENDS_HERE)
def every_backend(request):
    return request.param


def acc_of(backend):
    return torch.float32 if backend in ("cuda", "emulated") else torch.float64


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_of_0_removes_the_token(every_backend, name):
    """By weights of the token, the mask of the top entropies, weights of the sequence: as if it were a good one."""
    config, real = gk.LossConfig(**LOSSES[name]), acc_of(every_backend)
    pooled = {"gmpo": WAYS[1:], "vespo": WAYS[2:]}  # what they pool is not removed
    ways = pooled.get(name, WAYS)
    pairs = [pair for pair in BAD if name not in BY_COVARIANCE or pair[0] == -1.0]  # they look at every log-prob
    for adv in (1.0, -1.0):
        options = {**removing(ways, len(pairs), real), "adv": [adv] * len(ways)}
        out, g = run(config, *(row * len(ways) for row in columns(pairs)), every_backend, real, **options)
        good, expected = run(
            config, *(row * len(ways) for row in columns(harmless(pairs))), every_backend, real, **options
        )
        assert torch.equal(out.loss, good.loss) and torch.equal(g, expected), (adv, out.loss, g, expected)
        assert (g[:, : len(pairs)] == 0).all() and (name == "clip_cov" or g[:-1, -1].all())


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("dro", "kl_cov")])
def test_an_advantage_of_0_removes_the_token(every_backend, name):
    squares = {"ratio_sq_coef": 0.0} if name in ("tv_mask", "ipo") else {}
    config, real = gk.LossConfig(**{**LOSSES[name], **squares}), acc_of(every_backend)
    pairs = [(lp, old) for lp, old in FAR if lp == -1.0 or name not in (*BY_SEQUENCE, "clip_cov")]
    rest = [0.0, 0.0] if name == "vespo" else [1.0, -1.0]  # it pools the ratios of every token
    adv = [[0.0] * len(pairs) + rest]
    out, g = run(config, *columns(pairs), every_backend, real, adv=adv)
    good, expected = run(config, *columns(harmless(pairs)), every_backend, real, adv=adv)
    assert torch.equal(out.loss, good.loss) and torch.equal(g, expected)
    assert (g[:, : len(pairs)] == 0).all()


BOUNDED = {  # options, A, and the loss of a token whose ratio overflows
    "clip": ({}, 1.0, -1.2),
    "delta": ({"delta": 1.5}, -1.0, 1.5),
    "delta above the range": ({"delta": 1.5}, 1.0, -1.2),
    "dual": ({"dual_clip": 3.0}, -1.0, 3.0),
    "cispo": ({"objective": "cispo"}, 2.0, 10.0),
    "sapo": ({"objective": "sapo"}, 1.0, -4.0),
    "dppo_tv": ({"objective": "dppo_tv"}, 1.0, 0.0),
    "dppo_kl": ({"objective": "dppo_kl"}, 1.0, 0.0),
    "tv_mask": ({"objective": "tv_mask"}, 1.0, 0.0),
    "ipo": ({"objective": "ipo"}, 1.0, 0.0),
    "clamped": ({"log_ratio_clamp": math.log(2), "eps_high": 3.0}, 1.0, -2.0),
}


@pytest.mark.parametrize("old", [-2000.0, -INF])
@pytest.mark.parametrize("name", BOUNDED)
def test_a_bound_holds_a_ratio_that_overflows(every_backend, name, old):
    (options, adv, value), real = BOUNDED[name], acc_of(every_backend)
    out, g = run(gk.LossConfig(**options), [[-1.0]], [[old]], every_backend, real, adv=[adv])
    torch.testing.assert_close(out.loss, torch.tensor(value, dtype=real))
    assert g.item() == (-10.0 if name == "cispo" else 0.0)


@pytest.mark.parametrize("name", ["cispo", "dppo_tv", "dppo_kl", "clip", "sapo", "kl_cov"])
@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_a_target_of_probability_0_weighs_nothing(every_backend, name, adv):
    options = {"cispo": {"objective": "cispo"}}.get(name, LOSSES[name])
    real = acc_of(every_backend)
    if name == "kl_cov":
        options = {"objective": "tv_mask", "tv_low": 2.0}  # -A r without a bound: r = 0
    out, g = run(gk.LossConfig(**options), [[-INF]], [[-5.0]], every_backend, real, adv=[adv])
    bounded = 0.8 if name == "clip" and adv < 0 else 0.0
    saturated = -4 / options["sapo_tau_pos" if adv > 0 else "sapo_tau_neg"] * adv if name == "sapo" else 0.0
    tau = options.get("sapo_tau_pos" if adv > 0 else "sapo_tau_neg", 1.0)
    expected = torch.tensor(bounded + saturated / (1 + math.exp(tau)), dtype=real)
    torch.testing.assert_close(out.loss, expected)
    assert g.item() == 0


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("vespo", "clip_cov", "kl_cov", "reinforce")])
@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_a_nan_is_not_hidden(every_backend, name, adv):
    """Of the old log-probs; vespo takes a ratio that is none for 0, as TRL does, and reinforce reads none."""
    real = acc_of(every_backend)
    out, g = run(gk.LossConfig(**LOSSES[name]), *columns([(-1.0, NAN)]), every_backend, real, adv=[adv])
    assert out.loss.isnan()
    if name not in BY_SEQUENCE and not name.startswith("dro"):
        assert g[0, 0].isnan() and g[0, 1:].isfinite().all()
    assert out.metrics["clip_region"] * 3 <= 2  # a NaN is on no side of a bound


@pytest.mark.parametrize("name", ["clip", "sapo", "gmpo", "tv_mask", "ipo", "kl_cov"])
def test_the_gradient_of_a_nan_without_advantage_is_not_hidden(every_backend, name):
    """As its loss is not: 0 * NaN. gmpo's advantages are 0 in the mean alone, as it reads no ratio where A is 0."""
    real, adv = acc_of(every_backend), [[1.0, -1.0, 0.0]] if name == "gmpo" else [0.0]
    squares = {"ratio_sq_coef": 0.0} if name in ("tv_mask", "ipo") else {}
    out, g = run(gk.LossConfig(**{**LOSSES[name], **squares}), *columns([(-1.0, NAN)]), every_backend, real, adv=adv)
    assert out.loss.isnan() and g[0, 0].isnan()


@pytest.mark.parametrize("gradient", KL_GRADIENTS)
@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_a_kl_of_0_is_0_under_any_weight(every_backend, estimator, gradient):
    """logp = ref, where both weights overflow; k1 alone has a slope there, which they multiply."""
    config = gk.LossConfig(kl_coef=0.5, kl_estimator=estimator, kl_gradient=gradient)
    real = acc_of(every_backend)
    ref = torch.tensor([[-1.0]], dtype=real)
    out, g = run(config, [[-1.0]], [[-2000.0]], every_backend, real, adv=[0.0], ref_logps=ref)
    assert out.loss == 0
    if estimator != "k1":
        assert g.item() == 0
    elif gradient in ("pathwise", "score_function"):
        assert g.item() == 0.5


@pytest.mark.parametrize("gradient", KL_GRADIENTS)
def test_a_clamp_holds_a_kl_that_overflows(every_backend, gradient):
    if gradient == "straight_through":
        pytest.skip("its gradient is k2's, which no clamp bounds")
    config = gk.LossConfig(kl_coef=0.5, kl_gradient=gradient, kl_input_clamp=20.0, kl_output_clamp=10.0)
    real = acc_of(every_backend)
    ref = torch.tensor([[999.0]], dtype=real)
    out, g = run(config, [[-1.0]], [[-2000.0]], every_backend, real, adv=[0.0], ref_logps=ref)
    assert out.loss == 5 and g.item() == 0


@pytest.mark.parametrize("gradient", [name for name in KL_GRADIENTS if name != "straight_through"])
def test_the_kl_of_a_target_of_probability_0_is_its_clamp(every_backend, gradient):
    """Weighted by a ratio, of 0, it is 0."""
    config = gk.LossConfig(kl_coef=0.5, kl_gradient=gradient, kl_input_clamp=20.0, kl_output_clamp=10.0)
    real = acc_of(every_backend)
    ref = torch.tensor([[-1.0]], dtype=real)
    out, g = run(config, [[-INF]], [[-1.0]], every_backend, real, adv=[0.0], ref_logps=ref)
    assert out.loss == (0 if gradient in ("importance_weighted", "behaviour_weighted") else 5) and g.item() == 0


@pytest.mark.parametrize("bad", [NAN, INF])
def test_an_entropy_without_a_coefficient_is_not_there(every_backend, bad):
    real = acc_of(every_backend)
    entropy = torch.tensor([[bad, 1.0]], dtype=real, requires_grad=True)
    x, old, adv = torch.tensor([[-1.0, -1.0]], dtype=real), torch.tensor([[-1.0, -1.0]], dtype=real), torch.ones(1)
    none = gk.policy_loss(x, adv, old_logps=old, entropy=entropy, return_entropy=True, backend=every_backend)
    assert none.loss == -1 and none.per_token_loss.isfinite().all()
    config = gk.LossConfig(entropy_coef=0.5, entropy_mask_bonus=True)
    mask = torch.tensor([[0.0, 1.0]], dtype=real)
    out = gk.policy_loss(
        x.requires_grad_(), adv, old_logps=old, entropy=entropy, entropy_mask=mask, config=config, backend=every_backend
    )
    g, h = torch.autograd.grad(out.loss, (x, entropy))
    assert out.loss == -0.5 - 0.5 and g[0, 0] == 0 and h.tolist() == [[0.0, -0.5]]


# ---- the vocabulary ----


def exact_row(z, target, old, adv, coef, temperature):
    """Loss and gradient of one row in float64, of the columns that have a probability alone."""
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
    """-inf columns, the target among them, have a finite gradient: p log p and its derivative are 0 where p is."""
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


def test_a_large_offset_is_taken_off_before_the_temperature(every_backend):
    z = torch.tensor([1.0, 2.0, 0.5, -3.0])
    for options in ({"temperature": 0.7}, {"logit_scale": 0.3}):
        plain, far = (
            gk.token_logps(x[None, None], torch.tensor([[0]]), backend=every_backend, **options).logps
            for x in (z, z + 2.0**20)
        )
        assert torch.equal(plain, far)
