"""Papers, and trainers that cannot be installed with the tests: their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle_cases import (
    DUAL_CLIP,
    EMPTY_ROW,
    EPS_HIGH,
    EPS_LOW,
    Batch,
    Result,
    Variant,
    assert_matches,
    assert_near,
    assert_same,
    differentiated,
    make_batch,
    ours,
)
from oracle_cases import one_thread as one_thread
from torch import Tensor

import grpo_kernels as gk

FAR = (25.0, -25.0, 20.5, -20.5, 19.5, -19.5)
TOKENS_TIMES_STEPS = 211.0  # a normaliser over more than this batch
SIBLINGS = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])  # rows with one number are samples of one rollout


def clipped(ratio: Tensor, adv: Tensor, dual_clip: float | None = None) -> Tensor:
    """The objective, to be maximised, as OpenRLHF has it; slime and NeMo-RL have its negative."""
    least = torch.min(ratio * adv, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * adv)
    return least if dual_clip is None else torch.where(adv < 0, torch.max(least, dual_clip * adv), least)


def masked_mean(values: Tensor, mask: Tensor, count: float | Tensor | None = None, dim: int | None = None) -> Tensor:
    """NeMo-RL's mean: 1e-8 is added to the number of tokens or sequences."""
    total = (values * mask).sum() if dim is None else (values * mask).sum(dim)
    return total / ((mask.sum() if dim is None else mask.sum(dim)) if count is None else count).add(1e-8)


def k(estimator: str, u: Tensor) -> Tensor:
    return {"k1": -u, "abs": u.abs(), "k2": u.square() / 2, "k3": u.exp() - 1 - u}[estimator]


def config(preset: str, **changes: Any) -> gk.LossConfig:
    return gk.LossConfig.preset(preset, **{"eps_low": EPS_LOW, "eps_high": EPS_HIGH, **changes})


CISPO = {"cispo_low": 1 - EPS_LOW, "cispo_high": 1 + EPS_HIGH}  # where a trainer writes 1 -+ eps


def cispo(logps: Tensor, old: Tensor, adv: Tensor) -> Tensor:
    """slime's and NeMo-RL's objective, to be maximised."""
    return (logps - old).exp().clamp(1 - EPS_LOW, 1 + EPS_HIGH).detach() * adv * logps


def at_the_clamp(batch: Batch) -> Batch:
    """Log-ratios of exactly 20 and -20 in two columns: at its bound a clamp passes the gradient."""
    logps, old = batch.logps.clone(), batch.old.clone()
    logps[:, 10], old[:, 10], logps[:, 11], old[:, 11] = -1.0, -21.0, -21.0, -1.0
    return batch._replace(logps=logps, old=old)


# ---- OpenRLHF: PolicyLoss, aggregate_loss, compute_approx_kl ----


def openrlhf(
    batch: Batch, dual_clip: float | None, count: float | Tensor, weights: Tensor | float = 1.0
) -> Callable[[Tensor], Tensor]:
    def loss(logps: Tensor) -> Tensor:
        ratio = (logps - batch.old).clamp(-20.0, 20.0).exp()
        return (-clipped(ratio, batch.token_advantages, dual_clip) * weights * batch.mask).sum() / count

    return loss


@pytest.mark.parametrize("spread", ["near", "far", "at_the_clamp"])
@pytest.mark.parametrize("weighted", [False, True], ids=["no_weights", "tis"])
@pytest.mark.parametrize("dual_clip", [None, DUAL_CLIP], ids=["no_dual_clip", "dual_clip"])
def test_openrlhf_ppo(dual_clip: float | None, weighted: bool, spread: str) -> None:
    batch = make_batch(holes=spread == "near", large=FAR if spread == "far" else ())
    batch = at_the_clamp(batch) if spread == "at_the_clamp" else batch
    weights = (batch.old - batch.roll).exp().clamp(0.5, 5.0) if weighted else None
    exact = differentiated(
        openrlhf(batch, dual_clip, TOKENS_TIMES_STEPS, 1.0 if weights is None else weights), batch.logps
    )
    assert_matches(
        exact, config("openrlhf_ppo", dual_clip=dual_clip), batch.logps, batch.token_advantages, batch.mask,
        old_logps=batch.old, token_weights=weights, denominator=TOKENS_TIMES_STEPS,
    )  # fmt: skip


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_openrlhf_kl_and_entropy(estimator: str) -> None:
    """Every estimator's output is clamped to +-10, its input is not."""
    batch = make_batch(holes=True, large=FAR)

    def loss(logps: Tensor, entropy: Tensor) -> Tensor:
        kl = k(estimator, batch.ref - logps).clamp(-10.0, 10.0)
        tokens = batch.mask.sum()
        return openrlhf(batch, None, tokens)(logps) + ((0.2 * kl - 0.05 * entropy) * batch.mask).sum() / tokens

    changes = {"kl_coef": 0.2, "kl_estimator": estimator, "kl_output_clamp": 10.0, "entropy_coef": 0.05}
    assert_matches(
        differentiated(loss, batch.logps, batch.entropy), config("openrlhf_ppo", **changes), batch.logps,
        batch.token_advantages, batch.mask, batch.entropy, old_logps=batch.old, ref_logps=batch.ref,
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True], ids=["no_weights", "sequence_tis"])
def test_openrlhf_gspo(weighted: bool) -> None:
    """policy_loss_type gspo: the mean over non-empty samples of their token means; the entropy is a token mean."""
    batch = make_batch("sequence", holes=True)
    n = batch.mask.sum(-1)
    weights = batch.row_weights if weighted else torch.ones_like(batch.row_weights)

    def loss(logps: Tensor, entropy: Tensor) -> Tensor:
        mean = ((logps - batch.old) * batch.mask).sum(-1) / n.clamp(min=1)
        terms = -clipped(mean.exp()[:, None] * batch.mask, batch.token_advantages) * weights
        samples = ((terms * batch.mask).sum(-1) / (n + 1e-8))[n > 0].mean()
        return samples - 0.05 * (entropy * batch.mask).sum() / n.sum()

    assert_matches(
        differentiated(loss, batch.logps, batch.entropy), config("openrlhf_gspo", entropy_coef=0.05), batch.logps,
        batch.token_advantages, batch.mask, batch.entropy, old_logps=batch.old, tolerance=5e-8,
        token_weights=weights.expand_as(batch.logps) if weighted else None,
    )  # fmt: skip


# ---- slime: compute_policy_loss, compute_gspo_kl, compute_approx_kl, sum_of_sample_mean ----


def slime(batch: Batch, level: str, kl_type: str | None, groups: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A sum over samples, each divided by the tokens of all its siblings, over the number of rollouts of the step."""
    own = batch.mask.sum(-1)
    tokens = torch.zeros(groups).long().index_add(0, SIBLINGS, own)[SIBLINGS].clamp(min=1)

    def mean(terms: Tensor) -> Tensor:
        return ((terms * batch.mask).sum(-1) / tokens).sum() / groups

    def loss(logps: Tensor, entropy: Tensor) -> Tensor:
        x = logps - batch.old
        if level == "sequence":
            x = ((x * batch.mask).sum(-1) / own.clamp(min=1))[:, None].expand_as(x)
        total = mean(-clipped(x.exp(), batch.advantages[:, None], DUAL_CLIP)) - 0.05 * mean(entropy)
        if kl_type is None:
            return total
        kl = k("k3", batch.ref - logps)
        if kl_type == "unbiased":
            kl = (logps - batch.old).exp() * kl
        return total + 0.2 * mean(kl.clamp(-10.0, 10.0))  # low_var_kl: the weighted value is clamped

    return loss


@pytest.mark.parametrize(
    ("level", "kl_type"),
    # gspo with unbiased KL is omitted: there slime weights by the token's ratio, ours by the loss's.
    [("token", None), ("token", "plain"), ("token", "unbiased"), ("sequence", None), ("sequence", "plain")],
)
def test_slime(level: str, kl_type: str | None) -> None:
    batch, groups = make_batch(level, holes=True), int(SIBLINGS.max()) + 1
    further = batch.ref + 2.5 * (torch.arange(batch.ref.shape[1]) % 5 == 1)  # k3 on both sides of 10
    batch = batch._replace(ref=further.float().double())
    changes: dict[str, Any] = {"ratio_level": level, "dual_clip": DUAL_CLIP, "entropy_coef": 0.05}
    if kl_type:
        gradient = "importance_weighted" if kl_type == "unbiased" else "pathwise"
        changes |= {"kl_coef": 0.2, "kl_gradient": gradient, "kl_output_clamp": 10.0}
    own = batch.mask.sum(-1).double()
    siblings = torch.stack([own[sample == SIBLINGS].sum() for sample in SIBLINGS]).clamp(min=1)
    exact = differentiated(slime(batch, level, kl_type, groups), batch.logps, batch.entropy)
    assert_matches(
        exact, config("slime_grpo", **changes), batch.logps, batch.advantages, batch.mask, batch.entropy,
        old_logps=batch.old, ref_logps=batch.ref if kl_type else None, sequence_weights=own / siblings,
        denominator=float(groups),
    )  # fmt: skip


def test_slime_presets() -> None:
    """gspo and cispo by --advantage-estimator, over samples that have no siblings."""
    for level, preset in (("sequence", "slime_gspo"), ("token", "slime_cispo")):
        batch = make_batch(level, holes=True)
        n = batch.mask.sum(-1).clamp(min=1)

        def loss(logps: Tensor, batch: Batch = batch, n: Tensor = n, preset: str = preset) -> Tensor:
            adv = batch.advantages[:, None]
            mean = (((logps - batch.old) * batch.mask).sum(-1) / n)[:, None].expand_as(logps)
            terms = clipped(mean.exp(), adv) if preset == "slime_gspo" else cispo(logps, batch.old, adv)
            return -((terms * batch.mask).sum(-1) / n).mean()

        ours = gk.LossConfig.preset("slime_cispo", **CISPO) if preset == "slime_cispo" else config(preset)
        exact = differentiated(loss, batch.logps)
        assert_matches(exact, ours, batch.logps, batch.advantages, batch.mask, old_logps=batch.old)


# ---- NeMo-RL: ClippedPGLoss, calculate_kl ----


def nemo_kl(estimator: str, logps: Tensor, ref: Tensor, weights: Tensor, clamps: tuple[float, float]) -> Tensor:
    u = ref - logps
    clamped = u.clamp(-clamps[0], clamps[0])
    weights = torch.where(clamped == u, weights, weights.detach())
    return (weights * k(estimator, clamped)).clamp(-clamps[1], clamps[1])


def nemo(
    batch: Batch,
    estimator: str,
    gradient: str,
    clamps: tuple[float, float],
    valid: Tensor,
    weights: Tensor | float = 1.0,
) -> Callable[[Tensor], Tensor]:
    def loss(logps: Tensor) -> Tensor:
        objective = clipped((logps - batch.old).exp(), batch.token_advantages, DUAL_CLIP)
        towards = logps - (logps.detach() if gradient == "score_function" else batch.roll)
        kl = nemo_kl(estimator, logps, batch.ref, towards.exp(), clamps)
        return masked_mean(-weights * objective, batch.mask, valid) + 0.3 * masked_mean(kl, batch.mask, valid)

    return loss


@pytest.mark.parametrize("clamps", [(20.0, 10.0), (20.0, math.inf), (math.inf, 10.0)], ids=str)
@pytest.mark.parametrize("gradient", ["score_function", "behaviour_weighted"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_nemo(estimator: str, gradient: str, clamps: tuple[float, float]) -> None:
    batch, valid = make_batch(holes=True), torch.tensor(TOKENS_TIMES_STEPS)
    u = torch.tensor([25.0, -25.0, 20.5, -20.5, -11.5, 0.0, 2.7, -5.0])
    ref = batch.ref.clone()
    ref[:, : len(u)] = (batch.logps[:, : len(u)] + u).float().double()
    batch = batch._replace(ref=ref)
    weights = (batch.old - batch.roll).exp()
    exact = differentiated(nemo(batch, estimator, gradient, clamps, valid, weights), batch.logps)
    finite = [None if math.isinf(clamp) else clamp for clamp in clamps]
    changes = {
        "kl_coef": 0.3, "kl_estimator": estimator, "kl_gradient": gradient, "dual_clip": DUAL_CLIP,
        "kl_input_clamp": finite[0], "kl_output_clamp": finite[1],
    }  # fmt: skip
    assert_matches(
        exact, config("nemo_grpo", **changes), batch.logps, batch.token_advantages, batch.mask, old_logps=batch.old,
        ref_logps=batch.ref, rollout_logps=batch.roll, token_weights=weights, denominator=valid,
    )  # fmt: skip


def test_nemo_sequence_level() -> None:
    """sequence_level_importance_ratios: means that divide by tokens + 1e-8 and by samples + 1e-8."""
    batch = make_batch("sequence", holes=True)
    samples = (torch.arange(len(batch.mask)) != 2).double()  # sample_mask drops a row

    def loss(logps: Tensor) -> Tensor:
        x = masked_mean(logps - batch.old, batch.mask, dim=-1)[:, None].expand_as(logps)
        terms = masked_mean(-clipped(x.exp(), batch.token_advantages), batch.mask, dim=-1)
        return masked_mean(terms, samples)

    call = config("nemo_grpo", kl_coef=0.0, ratio_level="sequence", aggregation="sequence_mean")
    mask = batch.mask * samples[:, None].long()
    assert_matches(
        differentiated(loss, batch.logps), call, batch.logps, batch.token_advantages, mask, old_logps=batch.old,
        denominator=samples.sum(), tolerance=5e-8,
    )  # fmt: skip


def test_nemo_cispo() -> None:
    """use_cispo, with the default KL."""
    batch = make_batch(holes=True)
    valid = torch.tensor(TOKENS_TIMES_STEPS)

    def loss(logps: Tensor) -> Tensor:
        kl = nemo_kl("k3", logps, batch.ref, (logps - logps.detach()).exp(), (20.0, 10.0))
        policy = -cispo(logps, batch.old, batch.token_advantages)
        return masked_mean(policy, batch.mask, valid) + 0.01 * masked_mean(kl, batch.mask, valid)

    assert_matches(
        differentiated(loss, batch.logps), gk.LossConfig.preset("nemo_cispo", **CISPO), batch.logps,
        batch.token_advantages, batch.mask, old_logps=batch.old, ref_logps=batch.ref, denominator=valid,
    )  # fmt: skip


def test_nemo_gspo_preset() -> None:
    assert replace(gk.LossConfig.preset("nemo_gspo"), count_empty_sequences=True) == gk.LossConfig.preset(
        "nemo_grpo", ratio_level="sequence", aggregation="sequence_mean"
    )


# ---- prime-rl: default_loss_fn, ipo_loss_fn ----


@pytest.mark.parametrize("adv_tau", [1.0, 0.7])
@pytest.mark.parametrize("loss_type", ["default", "ipo"])
def test_prime(loss_type: str, adv_tau: float) -> None:
    """Sums over the batch, divided by the tokens of all ranks; some probabilities move further than the bounds."""
    batch = make_batch(holes=True)

    def loss(logps: Tensor) -> Tensor:
        x, moved = logps - batch.roll, (logps.exp() - batch.roll.exp()).detach()
        low, high = moved < -0.05, moved > 0.08
        masked = torch.where(batch.token_advantages > 0, high, low) if loss_type == "default" else moved.abs() > 0.08
        keep = (batch.mask * ~masked).double()
        policy = keep * adv_tau * batch.token_advantages * x.exp()
        return (-policy + 1e-3 * x.square() * batch.mask).sum() / TOKENS_TIMES_STEPS

    bounds = {"tv_low": 0.05, "tv_high": 0.08} if loss_type == "default" else {"tv_high": 0.08}
    exact = differentiated(loss, batch.logps)
    assert_matches(
        exact, gk.LossConfig.preset(f"prime_{loss_type}", **bounds), batch.logps, adv_tau * batch.token_advantages,
        batch.mask, old_logps=batch.old, rollout_logps=batch.roll, denominator=TOKENS_TIMES_STEPS,
    )  # fmt: skip
    default = gk.LossConfig.preset(f"prime_{loss_type}")
    assert default.ratio_sq_coef == 1e-3 and default.tv_high == (0.2 if loss_type == "default" else 0.1)


# ---- papers ----


def test_deepseek_v32() -> None:
    """arXiv:2512.02556: k3 weighted by the ratio to the old policy, and off-policy sequences masked."""
    batch = make_batch(holes=True)
    n = batch.mask.sum(-1, keepdim=True).clamp(min=1)
    drift = ((batch.old - batch.logps) * batch.mask).sum(-1, keepdim=True) / n
    keep = ((batch.advantages[:, None] >= 0) | (drift <= 0.02)).double()
    assert keep.min() == 0 and keep[batch.advantages < 0].max() == 1

    def loss(logps: Tensor) -> Tensor:
        ratio = (logps - batch.old).exp()
        terms = -keep * clipped(ratio, batch.advantages[:, None]) + 0.2 * ratio * k("k3", batch.ref - logps)
        return ((terms * batch.mask).sum(-1) / n[:, 0]).mean()

    assert_matches(
        differentiated(loss, batch.logps), config("deepseek_v32", kl_coef=0.2), batch.logps, batch.advantages,
        batch.mask, old_logps=batch.old, ref_logps=batch.ref, token_weights=keep,
    )  # fmt: skip


def deepseekmath(batch: Batch, beta: float) -> Callable[[Tensor], Tensor]:
    """Equation 3 of arXiv:2402.03300, token by token."""

    def loss(logps: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, row in enumerate(batch.mask.tolist()):
            active = [t for t, on in enumerate(row) if on]
            for t in active:
                ratio = torch.exp(logps[i, t] - batch.old[i, t])
                adv, bounded = batch.advantages[i], ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
                towards = torch.exp(batch.ref[i, t] - logps[i, t])
                kl = towards - towards.log() - 1
                total = total + (torch.min(ratio * adv, bounded * adv) - beta * kl) / len(active)
        return -total / len(batch.mask)

    return loss


@pytest.mark.parametrize("beta", [0.04, 0.5])
def test_deepseekmath_grpo(beta: float) -> None:
    batch = make_batch(holes=True)
    assert_matches(
        differentiated(deepseekmath(batch, beta), batch.logps), config("deepseekmath_grpo", kl_coef=beta), batch.logps,
        batch.advantages, batch.mask, old_logps=batch.old, ref_logps=batch.ref,
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True], ids=["no_weights", "token_weights"])
def test_rloo_sequence_product(weighted: bool) -> None:
    """arXiv:2402.14740 with a clipped ratio per sequence, which is the value of each of its tokens."""
    batch = make_batch("product", holes=True)
    weights = batch.token_weights if weighted else torch.ones_like(batch.token_weights)

    def loss(logps: Tensor) -> Tensor:
        ratio = ((logps - batch.old) * batch.mask).sum(-1).exp()
        shares = (weights * batch.mask).sum(-1) / batch.mask.sum(-1).clamp(min=1)
        return -(shares * clipped(ratio, batch.advantages)).sum() / len(batch.mask)

    assert_matches(
        differentiated(loss, batch.logps),
        gk.LossConfig(eps_low=EPS_LOW, eps_high=EPS_HIGH, ratio_level="sequence_product", aggregation="sequence_mean"),
        batch.logps, batch.advantages, batch.mask, old_logps=batch.old, token_weights=weights if weighted else None,
    )  # fmt: skip


REWARDS = [[1.0, 0.0, 0.5, 0.25], [0.1, 0.1, 0.1, 0.1], [-3.0, 7.0, 0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("formula", ["deepseekmath", "rloo", "rloo_batch_std"])
def test_advantages(formula: str, backend: str, dtype: torch.dtype) -> None:
    """(r - mean) / std with the population std; r - mean of the others; the same divided by the batch's std."""
    flat = torch.tensor(REWARDS).double().flatten()
    mean = float(flat.mean())
    batch_std = math.sqrt(sum((r - mean) ** 2 for r in flat.tolist()) / (len(flat) - 1))
    expected: list[float] = []
    for group in torch.tensor(REWARDS).double().tolist():
        centre = sum(group) / len(group)
        std = math.sqrt(sum((r - centre) ** 2 for r in group) / len(group))
        for i, r in enumerate(group):
            others = group[:i] + group[i + 1 :]
            apart = r - sum(others) / len(others)
            grpo = (r - centre) / std if len(set(group)) > 1 else 0.0
            scaled = apart / (batch_std + 1e-4)
            expected.append({"deepseekmath": grpo, "rloo": apart, "rloo_batch_std": scaled}[formula])
    options: dict[str, dict[str, Any]] = {
        "deepseekmath": {"ddof": 0, "eps": 1e-12},
        "rloo": {"baseline": "leave_one_out", "scale": "none"},
        "rloo_batch_std": {"baseline": "leave_one_out", "scale": "batch"},
    }
    got = gk.group_advantages(flat.to(dtype), group_size=4, backend=backend, **options[formula])
    assert_near(got.advantages, torch.tensor(expected).double(), 1e-6, formula)
    assert not got.advantages[4:8].any() and got.informative.tolist() == [True] * 4 + [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    "backend",
    [
        "cpu",
        "reference",
    ],
)
def test_equal_rewards_without_eps(backend: str) -> None:
    """The paper's formula has no eps: equal rewards still give exactly 0."""
    for scale in ("group", "batch"):
        got = gk.group_advantages(torch.full((8,), 2.0), group_size=4, eps=0.0, scale=scale, backend=backend)
        assert got.advantages.tolist() == [0.0] * 8


# ---- mutations ----

WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bounds_swapped": ({"eps_low": EPS_HIGH, "eps_high": EPS_LOW}, {}),
    "no_dual_clip": ({"dual_clip": None}, {}),
    "pathwise_kl": ({"kl_gradient": "pathwise"}, {}),
    "no_input_clamp": ({"kl_input_clamp": None, "kl_output_clamp": None}, {}),
    "mask_dropped": ({}, {"mask": None}),
    "own_normaliser": ({}, {"denominator": None}),
    "sequence_mean": ({"aggregation": "sequence_mean"}, {}),
    "one_row_off": ({}, {"advantages": "rolled"}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mutations(wrong: str) -> None:
    """The comparison fails when one thing is wrong."""
    batch, valid = make_batch(holes=True, large=FAR), torch.tensor(TOKENS_TIMES_STEPS)
    exact: Result = differentiated(nemo(batch, "k3", "score_function", (20.0, 10.0), valid), batch.logps)
    call: dict[str, Any] = {
        "config": config("nemo_grpo", kl_coef=0.3, dual_clip=DUAL_CLIP), "logps": batch.logps, "mask": batch.mask,
        "advantages": batch.token_advantages, "old_logps": batch.old, "ref_logps": batch.ref, "denominator": valid,
    }  # fmt: skip
    variant = Variant("cpu", torch.float32)
    assert_same(ours(variant, **call), exact, batch.mask, variant.tolerance)
    changes, arguments = WRONG[wrong]
    call["config"] = replace(call["config"], **changes)
    arguments = {"advantages": batch.token_advantages.roll(1, 0)} if "advantages" in arguments else arguments
    arguments = {"mask": torch.ones_like(batch.mask)} if "mask" in arguments else arguments
    call |= arguments
    with pytest.raises(AssertionError):
        assert_same(ours(variant, **call), exact, call["mask"], variant.tolerance)


def test_an_empty_row_is_in_every_batch() -> None:
    for level in ("token", "sequence", "product"):
        assert not make_batch(level).mask[EMPTY_ROW].any() and make_batch(level).advantages[EMPTY_ROW] != 0
