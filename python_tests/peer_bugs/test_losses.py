"""Peers' bugs in ratios, KL, corrections, normalisers and metrics."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import BACKENDS_HERE
from forms import FORMS
from fuzz import oracle
from oracle_cases import one_thread as one_thread

import grpo_kernels as gk

INF, NAN = math.inf, math.nan


@pytest.fixture(params=BACKENDS_HERE)
def every_backend(request):
    return request.param


def run(logps, adv, backend, **options):
    x = torch.as_tensor(logps).clone().requires_grad_()
    out = gk.policy_loss(x, torch.as_tensor(adv), backend=backend, **options)
    return out, torch.autograd.grad(out.loss, x)[0]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- ratios and objectives ----


def test_r13_advantages_under_the_mask_do_not_enter_a_sequences_ratio(every_backend):
    """AReaL #1346: per-token advantages under the mask in a GSPO loss."""
    lp, mask = -torch.rand(2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]])
    adv, old = random(2, 4), lp + 0.1 * random(2, 4, seed=1)
    for level in ("sequence", "sequence_token", "sequence_product"):
        config = gk.LossConfig(ratio_level=level, aggregation="sequence_mean")
        results = [
            run(lp, torch.where(mask != 0, adv, bad), every_backend, mask=mask, old_logps=old, config=config)
            for bad in (0.0, 7.0, NAN)
        ]
        assert all(torch.equal(r[0].loss, results[0][0].loss) and torch.equal(r[1], results[0][1]) for r in results)


@pytest.mark.parametrize(
    "name", [name for name in FORMS if name not in ("vespo", "gmpo", "kl_cov", "clip_cov") and "sequence" not in name]
)
def test_r15_a_ratio_that_overflows_and_is_removed(every_backend, name):
    """TRL #5984, slime #2198, #2258, prime-rl #2973: exp of a far log-ratio poisons what a mask or a zero removed."""
    config = gk.LossConfig(**FORMS[name])
    lp, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-2000.0, -1.1]])
    for adv in (1.0, -1.0):
        out, g = run(
            lp,
            [adv],
            every_backend,
            old_logps=old,
            rollout_logps=old,
            token_weights=torch.tensor([[0.0, 1.0]]),
            config=config,
        )
        near = old.clamp(min=-1.1)
        good, expected = run(
            lp,
            [adv],
            every_backend,
            old_logps=near,
            rollout_logps=near,
            token_weights=torch.tensor([[0.0, 1.0]]),
            config=config,
        )
        assert torch.equal(out.loss, good.loss) and torch.equal(g, expected) and g[0, 0] == 0


def test_h1_every_objective_at_every_log_ratio(every_backend):
    """Value and derivative at x from -30 to 30, just beside the bounds too, with A of either sign and 0."""
    edges = [math.log(b) + side for b in (0.8, 1.2, 1.28, 2.0) for side in (-1e-3, 1e-3)]
    xs = torch.tensor([-30.0, -20.0, -1.0, -0.25, -1e-3, 1e-3, 0.125, 1.0, 20.0, 30.0, *edges])
    old = torch.full_like(xs, -0.5) - xs.clamp(min=0)
    lp = (old + xs)[None].repeat(3, 1)
    old, adv = old[None].repeat(3, 1), torch.tensor([1.5, 0.0, -0.75])
    active, sequence = np.ones(lp.numel(), bool), np.repeat(np.arange(3), lp.shape[1])
    flat = [x.double().flatten().numpy() for x in (adv[:, None].expand_as(lp), old, lp)]
    forms = {
        name: form
        for name, form in FORMS.items()
        if form.get("objective", "clip") not in ("clip_cov", "kl_cov", "gmpo", "vespo")
    }
    for name, form in forms.items():
        if form.get("ratio_level", "token") != "token":
            continue
        config = gk.LossConfig(**form, aggregation="token_sum")
        out, g = run(lp, adv, every_backend, old_logps=old, rollout_logps=old, config=config)
        exact = oracle.policy_loss(
            config, oracle.Tokens(active, sequence, 3, flat[0], flat[1], rollout=flat[1]), flat[2], None
        )
        for mine, true in ((out.per_token_loss, exact.per_token), (g, exact.d_logp)):
            torch.testing.assert_close(
                mine.double().flatten(),
                torch.tensor(true),
                rtol=3e-5,
                atol=1e-6,
                msg=lambda m, name=name: f"{name}: {m}",
            )


def test_h4_a_sequences_ratio_under_token_weights(every_backend):
    """GSPO with importance weights: TRL's form shares a sequence's gradient, verl's gives each token its own."""
    lp = torch.full((1, 2), -1.0)
    old, weights = torch.tensor([[-1.05, -0.95]]), torch.tensor([[2.0, 0.0]])
    g = {
        level: run(
            lp, [1.0], every_backend, old_logps=old, token_weights=weights, config=gk.LossConfig(ratio_level=level)
        )[1]
        for level in ("sequence", "sequence_token")
    }
    torch.testing.assert_close(g["sequence"], torch.tensor([[-0.5, -0.5]]))  # -s w_t / N, a mean of both
    torch.testing.assert_close(g["sequence_token"], torch.tensor([[-1.0, 0.0]]))


def test_h7_cispo_bounds_are_the_ratios_own(every_backend):
    """Not distances from 1: the same number means another cap in every trainer."""
    out, g = run(
        [[-1.0]],
        [2.0],
        every_backend,
        old_logps=torch.tensor([[-3.0]]),
        config=gk.LossConfig(objective="cispo", cispo_high=5.0),
    )
    assert out.loss == 10.0 and g.item() == -10.0


# ---- KL ----


def test_r14_score_function_kl_has_its_score_and_a_clamp_holds_both(every_backend):
    """NeMo-RL #2506: k3 without the score term; #2958: a clamped token still passed gradient through the weight."""
    lp, ref = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, 30.0]])
    config = gk.LossConfig(
        kl_coef=1.0, kl_gradient="score_function", kl_input_clamp=20.0, kl_output_clamp=10.0, aggregation="token_sum"
    )
    _, g = run(lp, [0.0], every_backend, ref_logps=ref, config=config)
    torch.testing.assert_close(g, torch.tensor([[0.5, 0.0]]))  # lp - ref; and nothing beyond the clamp
    for gradient in ("importance_weighted", "behaviour_weighted"):
        held = gk.LossConfig(kl_coef=1.0, kl_gradient=gradient, kl_input_clamp=20.0, kl_output_clamp=10.0)
        assert run(lp, [0.0], every_backend, ref_logps=ref, rollout_logps=lp, old_logps=lp, config=held)[1][0, 1] == 0


def test_h3_on_policy_three_kl_gradients_are_one(every_backend):
    """At r = 1: importance-weighted, score-function and k3's weighted k1 have the gradient lp - ref."""
    lp, ref = (
        -torch.rand(2, 3, generator=torch.Generator().manual_seed(2)),
        -torch.rand(2, 3, generator=torch.Generator().manual_seed(3)),
    )
    for gradient in ("importance_weighted", "score_function", "behaviour_weighted"):
        config = gk.LossConfig(kl_coef=1.0, kl_gradient=gradient, aggregation="token_sum")
        _, g = run(lp, [0.0, 0.0], every_backend, old_logps=lp, rollout_logps=lp, ref_logps=ref, config=config)
        torch.testing.assert_close(g, lp - ref, rtol=1e-5, atol=1e-6)


def test_h5_importance_weighted_kl_of_a_sequence_is_exact(every_backend):
    """s [(1 - e^u) w_t + (1/n) sum_j k3_j w_j], not a token's own ratio (Liger's)."""
    lp, old, ref = (torch.tensor([x]) for x in ([-1.0, -0.5, -2.0], [-1.2, -0.6, -1.7], [-0.8, -1.0, -2.5]))
    config = gk.LossConfig(
        ratio_level="sequence", kl_coef=1.0, kl_gradient="importance_weighted", aggregation="token_sum"
    )
    out, g = run(lp, [0.0], every_backend, old_logps=old, ref_logps=ref, config=config)
    u = ref - lp
    s, k3 = (lp - old).mean().exp(), torch.expm1(u) - u
    torch.testing.assert_close(out.loss.detach(), (s * k3).sum())
    torch.testing.assert_close(g, s * ((1 - u.exp()) + k3.mean()))


# ---- corrections ----


def test_r16_bounds_of_a_filter_are_on_its_own_statistic():
    """verl #6377: bounds of k1 were applied to minus the log-ratio, which mirrors those that are not reciprocal."""
    old, rollout = torch.tensor([[math.log(1.8) - 3, math.log(0.7) - 3]]), torch.full((1, 2), -3.0)
    ratio = gk.RejectionFilter("ratio", "token", low=0.5, high=1.5)
    k1 = gk.RejectionFilter("k1", "token", low=-math.log(1.5), high=-math.log(0.5))  # k1 = -d
    for one in (ratio, k1):
        kept = gk.rollout_correction(old, rollout, filters=(one,), renormalise=True).mask
        assert kept.tolist() == [[False, True]], one


def test_r17_the_mean_level_does_not_weigh_long_sequences_down():
    """NeMo-RL #2269: exp of a sum over 8k tokens weighs whole batches down 17-fold; its mean does not."""
    rollout = torch.full((1, 8192), -1.0)
    old = rollout - 3.5e-4
    weights = {
        level: float(gk.rollout_correction(old, rollout, weight="truncate", high=2.0, level=level).token_weights[0, 0])
        for level in ("sequence_mean", "sequence_sum")
    }
    assert abs(weights["sequence_mean"] - 1) < 1e-3 and weights["sequence_sum"] < 1 / 17


@pytest.mark.parametrize("nan", ["ignore", "reject"])
def test_r18_a_sampler_that_gives_nan(nan):
    """TRL #6166, #6296: vLLM gives NaN for near-certain tokens. Its weight is 1, or 0; nothing else changes."""
    old, rollout = torch.tensor([[-1.0, 0.0, -2.0]]), torch.tensor([[-1.1, NAN, -2.2]])
    c = gk.rollout_correction(old, rollout, weight="truncate", high=2.0, nan=nan)
    expected = [math.exp(0.1), 1.0 if nan == "ignore" else 0.0, math.exp(0.2)]
    torch.testing.assert_close(c.token_weights, torch.tensor([expected]))
    assert abs(float(c.metrics["missing_tokens"]) - 1 / 3) < 1e-6 and all(x.isfinite() for x in c.metrics.values())


def test_r18_a_nan_of_the_sampler_does_not_reach_a_loss_that_ignores_it(every_backend):
    lp, rollout = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.1, NAN]])
    out, g = run(lp, [1.0], every_backend, old_logps=lp, rollout_logps=rollout)
    good, expected = run(lp, [1.0], every_backend, old_logps=lp)
    assert torch.equal(out.loss, good.loss) and torch.equal(g, expected)


# ---- reductions ----


def test_r19_a_sequences_value_is_summed_over_its_tokens(every_backend):
    """ROLL #165, TRL #6042: an aggregation that does not fit the level. Ours says n_i-fold, as LUSPO wants it (h6)."""
    lp, mask = torch.full((2, 4), -1.0), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    for aggregation, expected in (("sequence_sum", -(4 + 1) / 2), ("sequence_mean", -1.0), ("token_mean", -1.0)):
        config = gk.LossConfig(ratio_level="sequence", aggregation=aggregation)
        assert float(run(lp, [1.0, 1.0], every_backend, mask=mask, old_logps=lp, config=config)[0].loss) == expected


@pytest.mark.parametrize("aggregation", ["token_mean", "token_sum", "sequence_mean", "sequence_sum", "fixed_length"])
def test_r25_micro_batches_with_the_whole_denominator_add_up(every_backend, aggregation):
    """TRL #6024, #6439, ms-swift #10117, verl #7913, #7200, Liger #1082 (g9): means of means. Ragged, a row empty."""
    lp, old, adv = -random(6, 4).abs(), -random(6, 4, seed=1).abs(), random(6, seed=2)
    mask = (torch.arange(4) < torch.tensor([4, 1, 0, 3, 2, 4])[:, None]).int()
    config = gk.LossConfig(
        aggregation=aggregation, kl_coef=0.1, max_length=4 if aggregation == "fixed_length" else None
    )
    whole, g = run(lp, adv, every_backend, mask=mask, old_logps=old, ref_logps=old, config=config)
    denominator = {"token_mean": mask.sum(), "token_sum": 1, "fixed_length": 6 * 4}.get(aggregation, 6)
    parts = [
        run(
            lp[p],
            adv[p],
            every_backend,
            mask=mask[p],
            old_logps=old[p],
            ref_logps=old[p],
            config=config,
            denominator=denominator,
        )
        for p in (slice(0, 1), slice(1, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(out.loss for out, _ in parts), whole.loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), g, rtol=1e-5, atol=1e-8)


def test_r25_rejected_tokens_stay_in_the_denominator_unless_told(every_backend):
    """TRL #6439: counted before truncated completions were masked."""
    lp = torch.full((1, 4), -1.0)
    _, kept = run(lp, [1.0], every_backend, token_weights=torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    _, gone = run(lp, [1.0], every_backend, mask=torch.tensor([[1, 1, 0, 0]]))
    assert kept.tolist() == [[-0.25, -0.25, 0.0, 0.0]] and gone.tolist() == [[-0.5, -0.5, 0.0, 0.0]]


# ---- options and metrics ----


def test_x2_metrics_of_parts_combine_into_the_whole(every_backend):
    """TRL #6380: metrics averaged per rank. Means combine by tokens, extremes by extremes, parts of the loss by sums."""
    lp, old, adv = -random(4, 3).abs(), -random(4, 3, seed=1).abs(), random(4, seed=2)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    halves = [
        run(lp[p], adv[p], every_backend, mask=mask[p], old_logps=old[p], denominator=mask.sum())[0].metrics
        for p in (slice(0, 2), slice(2, 4))
    ]
    whole = run(lp, adv, every_backend, mask=mask, old_logps=old)[0].metrics
    n = [m["tokens"] for m in halves]
    for name, value in whole.items():
        a, b = (m[name] for m in halves)
        if name in ("policy_loss", "kl_loss", "entropy_loss", "tokens"):
            combined = a + b
        elif name.endswith(("_min", "_max")):
            combined = (torch.minimum if name.endswith("_min") else torch.maximum)(a, b)
        elif name == "weight_ess":
            continue
        else:
            combined = (n[0] * a + n[1] * b) / sum(n)
        torch.testing.assert_close(combined, value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_x6_an_option_that_is_not_read_is_an_error(every_backend):
    """TRL #7270, #6808, #6368, RLinf #316: a loss name, or clip_ratio_c, swallowed without a word."""
    z, targets = torch.randn(1, 2, 5), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(TypeError):
        gk.grpo_loss(z, targets, torch.ones(1), clip_ratio_c=3.0, backend=every_backend)
    with pytest.raises(ValueError, match="advantage_scale"):
        gk.grpo_loss(z, targets, torch.ones(1), advantage_scale="nonsense", backend=every_backend)
    for options in (
        {"objective": "gmpo", "dual_clip": 3.0},
        {"objective": "cispo", "eps_low": 0.1},
        {"objective": "dapo"},
        {"sapo_tau_pos": 2.0},
    ):
        with pytest.raises(ValueError, match="|".join(options)):
            gk.LossConfig(**options)


def test_x8_the_entropy_that_is_logged_is_not_scaled(every_backend):
    """TRL #6140: the bonus used loss-scaled entropy, dr_grpo's denominator, ignored the mask and had no gradient."""
    z = random(2, 3, 7)
    targets, mask = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [1, 1, 1]])
    top = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    config = gk.LossConfig(
        entropy_coef=0.5,
        entropy_mask_bonus=True,
        entropy_aggregation="token_mean",
        aggregation="fixed_length",
        max_length=99,
    )
    x = z.clone().requires_grad_()
    out = gk.grpo_loss(
        x, targets, torch.zeros(2), mask, entropy_mask=top, config=config, scale=0.25, backend=every_backend
    )
    p = torch.log_softmax(z.double(), -1)
    h = -(p.exp() * p).sum(-1)
    torch.testing.assert_close(out.metrics["entropy"].double(), (h * mask).sum() / 5, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        out.metrics["entropy_loss"].double(), -0.25 * 0.5 * (h * top).sum() / 3, rtol=1e-5, atol=0
    )
    (g,) = torch.autograd.grad(out.loss, x)
    assert g[top != 0].any(-1).all() and not g[top == 0].any()


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_product"])
def test_x5_no_group_is_taken_without_a_word(every_backend, level):
    """Megatron-LM #7452, ms-swift #9947 (x4): gathered logits under a vocabulary group. Ours is refused."""
    z, targets = torch.randn(1, 2, 5), torch.zeros(1, 2, dtype=torch.int64)
    for name in ("tp_group", "cp_group"):
        with pytest.raises(NotImplementedError, match=name):
            gk.grpo_loss(
                z,
                targets,
                torch.ones(1),
                config=gk.LossConfig(ratio_level=level),
                backend=every_backend,
                **{name: object()},
            )


def test_h2_ties_pass_the_whole_gradient(every_backend):
    """r = 1: torch.min splits between equal branches, whose gradients are equal; a bound passes it at the bound."""
    lp = torch.full((1, 2), -1.0)
    for config, adv in itertools.product((gk.LossConfig(), gk.LossConfig(eps_low=0.0, eps_high=0.0)), (1.0, -1.0)):
        _, g = run(lp, [adv], every_backend, old_logps=lp, config=config)
        assert g.tolist() == [[-adv / 2, -adv / 2]]
