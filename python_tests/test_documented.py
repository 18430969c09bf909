"""What the docstrings and docs/objectives.md say of behaviours that could as well be otherwise."""

import math

import pytest
import torch
from conftest import BACKENDS_HERE
from oracle_cases import one_thread as one_thread

import grpo_kernels as gk

NAN = math.nan


@pytest.fixture(params=BACKENDS_HERE)
def every_backend(request):
    return request.param


def tensor(*rows):
    return torch.tensor(rows)


def test_r16_verls_bounds_of_k1_are_mirrored_on_the_ratio():
    (kept,) = gk.CorrectionConfig.from_verl(rollout_rs="token_k1", rollout_rs_threshold="0.5_1.5").filters
    ratios = tensor([0.6, 0.7, 1.6, 1.9, 2.1])
    mask = gk.rollout_correction(ratios.log(), torch.zeros(1, 5), filters=(kept,), renormalise=True).mask
    assert mask.tolist() == [[False, True, True, True, False]]


def test_r10_a_reward_on_a_masked_token_is_not_read():
    mask, on, off = torch.tensor([[1, 1, 0]] * 2), torch.zeros(2, 3), torch.zeros(2, 3)
    on[0, 2] = 1.0
    outcome = tensor(1.0, 0.0)
    zero = torch.zeros(2, 3)
    functions = {
        "gae": lambda r: gk.gae(r, zero, mask, gamma=1.0, lam=1.0),
        "remax": lambda r: gk.remax(r, torch.zeros(2), mask),
        "reinforce_plus_plus": lambda r: gk.reinforce_plus_plus(r, mask),
        "optimal_token_baseline": lambda r: gk.optimal_token_baseline(r, zero - 1, zero + 0.3, mask, group_size=2),
    }
    for name, function in functions.items():
        assert torch.equal(function(on).returns, function(off).returns), name
        assert function(outcome).returns.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], name


def test_r18_a_nan_of_the_sampler_stays_at_its_token(every_backend):
    roll, ref = tensor([NAN, -1.0, -1.0]), tensor([-1.0, -1.5, -1.2])
    kl = {"kl_coef": 0.1, "kl_gradient": "behaviour_weighted"}
    for options in ({"objective": "tv_mask"}, {"objective": "ipo"}, kl):
        lp = tensor([-1.0, -1.1, -0.9]).requires_grad_()
        out = gk.policy_loss(
            lp, tensor(1.0), rollout_logps=roll, ref_logps=ref, config=gk.LossConfig(**options), backend=every_backend
        )
        (g,) = torch.autograd.grad(out.loss, lp)
        assert out.loss.isnan() and g.isnan().tolist() == [[True, False, False]], options


def test_straight_through_ignores_both_clamps(every_backend):
    lp = tensor([-30.0]).requires_grad_()
    config = gk.LossConfig(kl_coef=1.0, kl_gradient="straight_through", kl_input_clamp=20.0, kl_output_clamp=10.0)
    out = gk.policy_loss(lp, tensor(0.0), ref_logps=tensor([-5.0]), config=config, backend=every_backend)
    (g,) = torch.autograd.grad(out.loss, lp)
    assert (out.loss.item(), g.item()) == (10.0, -25.0)


@pytest.mark.parametrize("own", [None, "token_mean"])
def test_an_entropy_aggregation_of_its_own_takes_no_denominator(every_backend, own):
    entropy, lp = tensor([1.0, 2.0], [3.0, 6.0]), torch.full((2, 2), -1.0)
    config = gk.LossConfig(entropy_coef=1.0, entropy_aggregation=own)

    def part(rows, **options):
        out = gk.policy_loss(
            lp[rows], torch.zeros(len(lp[rows])), entropy=entropy[rows], config=config, backend=every_backend, **options
        )
        return out.loss.item()

    halves = slice(0, 1), slice(1, 2)
    assert part(slice(0, 2)) == -3.0
    assert sum(part(rows, denominator=4) for rows in halves) == (-3.0 if own is None else -6.0)
    assert own is None or sum(part(rows, scale=0.5) for rows in halves) == -3.0


def test_empty_sequences_count_unless_told(every_backend):
    lp, mask = torch.full((2, 2), -1.0), tensor([1, 1], [0, 0])
    for count, expected in ((True, -0.5), (False, -1.0)):
        config = gk.LossConfig(aggregation="sequence_mean", count_empty_sequences=count)
        assert gk.policy_loss(lp, tensor(1.0, 1.0), mask, config=config, backend=every_backend).loss == expected


def test_r25_kl_cov_picks_within_a_call():
    """One token of a call: two calls pick two."""
    lp, old, adv = tensor([-1.0, -2.0], [-0.5, -3.0]), torch.full((2, 2), -1.5), tensor([2.0, -1.0], [1.0, 0.0])
    config = gk.LossConfig(objective="kl_cov", cov_ratio=0.25, cov_kl=1.0, aggregation="token_sum")
    whole = gk.policy_loss(lp, adv, old_logps=old, config=config)
    parts = [gk.policy_loss(lp[i : i + 1], adv[i : i + 1], old_logps=old[i : i + 1], config=config) for i in (0, 1)]
    assert sum(out.metrics["clip_cap"] * 2 for out in parts) == 2 and whole.metrics["clip_cap"] * 4 == 1
    assert abs(sum(out.loss for out in parts) - whole.loss) > 0.1


def test_x2_what_a_call_without_tokens_reports(every_backend):
    lp = torch.full((1, 2), -1.0)
    metrics = gk.policy_loss(lp, tensor(1.0), torch.zeros(1, 2), backend=every_backend).metrics
    ones = {n for n in metrics if n.startswith(("ratio_", "weight_"))} | {"gradient_weight"}
    assert {name for name, x in metrics.items() if x == 1} == ones
    assert all(x == 0 for name, x in metrics.items() if name not in ones)


def test_gae_multiplies_by_gamma_and_lam_of_0(every_backend):
    values = tensor([1.0, NAN, 3.0])
    for gamma, lam in ((0.0, 1.0), (1.0, 0.0)):
        out = gk.gae(torch.ones(1, 3), values, gamma=gamma, lam=lam, backend=every_backend)
        assert out.advantages.isnan().tolist() == [[True, True, False]]


def test_a_fully_masked_row_counts_in_its_group_unless_multi_turn():
    rewards, lp, p2 = tensor(1.0, 5.0), torch.full((2, 2), -1.0), torch.full((2, 2), 0.3)
    mask = tensor([1, 1], [0, 0])

    def advantages(multi_turn):
        return gk.optimal_token_baseline(
            rewards, lp, p2, mask, group_size=2, multi_turn=multi_turn, zero_tail=False
        ).advantages[0]

    assert advantages(True).tolist() == [1.0, 1.0]
    assert advantages(False).abs().max() < 1e-6  # its own reward is the baseline


def test_an_unknown_option_of_a_module_is_refused_at_once():
    for module in (gk.GRPOLoss, gk.LinearGRPOLoss):
        with pytest.raises(TypeError, match="typo"):
            module(gk.LossConfig(), typo=1)


def test_group_diversity_refuses_what_no_memory_holds():
    ids = torch.zeros(1, 1, dtype=torch.int64).expand(2**30, 2**30)
    with pytest.raises(ValueError, match="token_ids must have at most"):
        gk.group_diversity(ids, group_size=2)
