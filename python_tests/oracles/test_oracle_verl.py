"""verl's own functions decide what the verl_* presets compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle_cases import (
    DUAL_CLIP,
    EPS_HIGH,
    EPS_LOW,
    PADDED,
    Batch,
    Result,
    Variant,
    assert_matches,
    assert_near,
    assert_same,
    differentiated,
    make_batch,
    ours,
    poisoned,
)
from oracle_cases import one_thread as one_thread
from torch import Tensor

import grpo_kernels as gk

REASON = "the oracle is verl itself: pip install verl==0.9.1"
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason=REASON)
verl_torch = pytest.importorskip("verl.utils.torch_functional", reason=REASON)
verl_config = pytest.importorskip("verl.workers.config", reason=REASON)
verl_algorithm = pytest.importorskip("verl.trainer.config.algorithm", reason=REASON)
verl_losses = pytest.importorskip("verl.workers.utils.losses", reason=REASON)

AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "fixed_length",
    "seq-mean-token-mean": "sequence_mean",
}
LEVELS = {"vanilla": "token", "gspo": "sequence"}
DIVERGENCE = {"clip_ratio_low": 0.03, "clip_ratio_high": 0.05}  # of dppo: probabilities in the batch move by as much
DRO_BETA, COV_RATIO = 0.3, 0.2
# A loss's configuration in verl, ours for the same, and the aggregation that it forces.
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "vanilla": ({}, {"eps_low": EPS_LOW, "eps_high": EPS_HIGH}, None),
    "gspo": ({}, {"eps_low": EPS_LOW, "eps_high": EPS_HIGH}, None),
    "cispo": ({}, {"cispo_low": 1 - EPS_LOW, "cispo_high": 1 + EPS_HIGH}, None),
    "sapo": ({}, {}, "seq-mean-token-mean"),
    "geo_mean": ({}, {"eps_low": EPS_LOW, "eps_high": EPS_HIGH}, "seq-mean-token-mean"),
    "gpg": ({}, {}, None),
    "dppo_tv": (DIVERGENCE, {"eps_low": 0.03, "eps_high": 0.05}, None),
    "dppo_kl": (DIVERGENCE, {"eps_low": 0.03, "eps_high": 0.05}, None),
    "dro": ({"policy_loss": {"dro_beta": DRO_BETA}}, {"dro_beta": DRO_BETA}, None),
    # More tokens are wanted than there are candidates, so that nothing is random.
    "clip_cov": (
        {"policy_loss": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": 0.4}},
        {"eps_low": EPS_LOW, "eps_high": EPS_HIGH, "cov_ratio": 1.0, "cov_low": 0.05, "cov_high": 0.4}, None,
    ),
    "kl_cov": (
        {"policy_loss": {"kl_cov_ratio": COV_RATIO, "ppo_kl_coef": 0.4}}, {"cov_ratio": COV_RATIO, "cov_kl": 0.4}, None,
    ),
}  # fmt: skip
CLIP_METRICS = {"cispo": ("clip_low", "clip_high", "clip_cap"), "clip_cov": ("clip_cap",), "geo_mean": ()}
HORIZON = 128  # loss_scale_factor
GLOBAL = {"dp_size": 2, "batch_num_tokens": 211, "global_batch_size": 24, "loss_scale_factor": HORIZON}
WIDE = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "loss_scale_factor": None}
NO_TOKEN_EPS = 2e-8  # seq-mean-token-mean divides by n + 1e-8


def actor(global_batch_info: dict[str, Any] | None = None, **changes: Any) -> Any:
    if isinstance(changes.get("policy_loss"), dict):
        changes["policy_loss"] = verl_config.PolicyLossConfig(**changes["policy_loss"])
    bounds = {"clip_ratio_low": EPS_LOW, "clip_ratio_high": EPS_HIGH, "clip_ratio_c": DUAL_CLIP}
    return verl_config.ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1,
        **{**bounds, "global_batch_info": dict(global_batch_info or {}), **changes},
    )  # fmt: skip


def our_call(loss: str, mode: str, batch: Batch, info: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The preset with one of verl's aggregations, and verl's global normalisers as scale and denominator."""
    info, aggregation = info or {}, AGGREGATIONS[mode]
    if aggregation == "fixed_length":
        changes["max_length"] = info.get("loss_scale_factor") or batch.mask.shape[1]
    denominators = {"token_mean": info.get("batch_num_tokens"), "token_sum": None}
    denominator = denominators.get(aggregation, info.get("global_batch_size"))
    if denominator and aggregation == "fixed_length":
        denominator *= changes["max_length"]
    config = gk.LossConfig.preset(f"verl_{loss}", aggregation=aggregation, **{**LOSSES[loss][1], **changes})
    return {
        "config": config, "logps": batch.logps, "advantages": batch.token_advantages, "mask": batch.mask,
        "old_logps": batch.old, "denominator": denominator, "scale": float(info.get("dp_size", 1)),
    }  # fmt: skip


def theirs(loss: str, mode: str, batch: Batch, config: Any, weights: Tensor | None = None) -> Result:
    """A policy loss of verl, with its metrics under our names."""
    seen: dict[str, float] = {}

    def run(logps: Tensor) -> Tensor:
        value, metrics = core_algos.get_policy_loss_fn(loss)(
            batch.old, logps, batch.token_advantages, batch.mask, mode, config, weights
        )
        seen.update(metrics)
        return value

    result = differentiated(run, batch.logps)
    return result._replace(metrics=seen)


def assert_metrics(loss: str, verl: dict[str, float], call: dict[str, Any], batch: Batch) -> None:
    """verl's metrics under our names: sums of ours where verl has one number for several of our cases."""
    got = ours(Variant("cpu", torch.float64), **call).metrics
    expected = {}
    if loss != "kl_cov" and loss != "gpg":
        expected["actor/ppo_kl"] = got["approx_kl"]
    if "actor/pg_clipfrac" in verl and loss != "geo_mean":
        names = CLIP_METRICS.get(loss, ("clip_low", "clip_high"))
        expected["actor/pg_clipfrac"] = sum(got[name] for name in names)
    if loss in ("vanilla", "dppo_tv", "dppo_kl"):
        expected["actor/pg_clipfrac_lower"] = got["clip_cap"]
    for name, mine in expected.items():
        assert abs(mine - verl[name]) <= 2e-5 * max(abs(verl[name]), 1e-3), f"{name}: {mine}, not {verl[name]}"


def tolerance_of(mode: str) -> float:
    return NO_TOKEN_EPS if mode == "seq-mean-token-mean" else 0.0


@pytest.mark.parametrize("weighted", [False, True], ids=["no_weights", "rollout_is_weights"])
@pytest.mark.parametrize("info", [None, WIDE, GLOBAL], ids=["own_batch", "no_globals", "global_batch"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_policy_loss(loss: str, mode: str, info: dict[str, Any] | None, weighted: bool) -> None:
    changes, _, forced = LOSSES[loss]
    if forced and mode != forced:
        pytest.skip(f"verl's {loss} is always {forced}")
    batch = make_batch(LEVELS.get(loss, "token"), holes=weighted)
    weights = batch.token_weights if weighted else None
    exact = theirs(loss, mode, batch, actor(info, **changes), weights)
    call = our_call(loss, mode, batch, None if loss == "geo_mean" else info)  # it ignores the global batch
    assert_matches(exact, **call, token_weights=weights, tolerance=tolerance_of(mode))
    assert_metrics(loss, exact.metrics, call, batch)


@pytest.mark.parametrize("loss", ["cispo", "sapo", "dppo_tv", "dppo_kl"])
def test_policy_loss_beyond_the_clamp(loss: str) -> None:
    changes, _, forced = LOSSES[loss]
    batch, mode = make_batch(holes=True, large=(25.0, -25.0, 20.5, -20.5, 19.5, -19.5)), forced or "token-mean"
    exact = theirs(loss, mode, batch, actor(**changes))
    assert_matches(exact, **our_call(loss, mode, batch), tolerance=tolerance_of(mode))


def test_geo_mean_with_token_advantages_of_zero() -> None:
    """A token without advantage adds no log-ratio to the mean, but is still counted in it."""
    batch = make_batch()
    zero = torch.arange(batch.mask.shape[1]) % 3 == 0
    batch = batch._replace(token_advantages=torch.where(zero, 0.0, batch.token_advantages))
    exact = theirs("geo_mean", "seq-mean-token-mean", batch, actor())
    assert_matches(exact, **our_call("geo_mean", "seq-mean-token-mean", batch), tolerance=NO_TOKEN_EPS)


def test_clip_cov_selects_its_tokens_at_random() -> None:
    """As many tokens as verl, from the same candidates, all equally likely; another generator state, other tokens."""
    batch = make_batch()
    batch = batch._replace(token_advantages=batch.token_advantages + 0.01)  # so that a term of 0 means: selected
    candidates = actor(policy_loss={"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": 0.4})
    total = theirs("clip_cov", "token-mean", batch, candidates).metrics["actor/pg_clipfrac"] * batch.mask.sum()
    few = actor(policy_loss={"clip_cov_ratio": 0.05, "clip_cov_lb": 0.05, "clip_cov_ub": 0.4})
    fraction = theirs("clip_cov", "token-mean", batch, few).metrics["actor/pg_clipfrac"]
    call = our_call("clip_cov", "token-mean", batch, cov_ratio=0.05)
    picked = torch.zeros_like(batch.logps)
    rounds, wanted = 400, fraction * batch.mask.sum()
    torch.manual_seed(0)
    for _ in range(rounds):
        terms = gk.policy_loss(**call)
        assert abs(float(terms.metrics["clip_cap"]) - fraction) < 1e-6
        picked += (terms.per_token_loss == 0) & (batch.mask > 0)
    assert (picked > 0).sum() == round(float(total))
    expected = rounds * wanted / total
    assert ((picked[picked > 0] - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_bypass_mode(loss_type: str) -> None:
    """old is the sampler; the weights, if any, compare the current policy with it."""
    batch = make_batch(holes=True)
    correction = {"loss_type": loss_type, "rollout_is": "token", "rollout_is_threshold": 1.3}
    config = actor(policy_loss={"rollout_correction": verl_algorithm.RolloutCorrectionConfig(**correction)})
    exact = theirs("bypass_mode", "token-mean", batch, config)
    if loss_type == "ppo_clip":
        return assert_matches(exact, **our_call("vanilla", "token-mean", batch))
    weights = (batch.logps - batch.old).exp().clamp(max=1.3)
    call = our_call("gpg", "token-mean", batch) | {"config": gk.LossConfig.preset("verl_bypass_reinforce")}
    assert_matches(exact, **call, token_weights=weights)


@pytest.mark.parametrize("mode", ["token-mean", "token-sum"])
@pytest.mark.parametrize("loss", LEVELS)
def test_policy_loss_with_large_ratios_and_masked_nans(loss: str, mode: str) -> None:
    """|x| beyond verl's clamp of 20; and NaN at masked tokens, which its token aggregations skip over as ours do."""
    batch = make_batch(LEVELS[loss], holes=True, large=(25.0, -25.0, 20.5, -20.5, 19.5, -19.5))
    dirty = batch
    if loss == "vanilla":  # gspo's sum over the sequence would include it
        dirty = batch._replace(**{name: poisoned(getattr(batch, name), batch.mask) for name in ("logps", "old")})
    assert_matches(theirs(loss, mode, dirty, actor()), **our_call(loss, mode, batch))


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_gspo_bound_on_the_sequence_ratio(mode: str) -> None:
    """log s above 10 has the value e^10 and no gradient where A < 0 leaves the ratio unclipped."""
    rows = [10.5, 10.5, 0.3, 0.0, 9.9, 0.1, -11.0, 10.1, 9.5]
    batch = make_batch("sequence", row_log_ratios=rows)
    exact = theirs("gspo", mode, batch, actor())
    assert not exact.gradient[[1, 7]].any() and exact.gradient[[4, 8]].any()
    assert_matches(exact, **our_call("gspo", mode, batch), tolerance=tolerance_of(mode))


@pytest.mark.parametrize("loss", LEVELS)
def test_ratio_exactly_at_its_bounds(loss: str) -> None:
    """clip_ratio 0 and a ratio of exactly 1: at the bound the gradient passes."""
    batch = make_batch(LEVELS[loss])
    batch = batch._replace(old=batch.logps)
    exact = theirs(loss, "token-mean", batch, actor(clip_ratio_low=0.0, clip_ratio_high=0.0))
    assert (exact.gradient != 0).sum() == ((batch.mask > 0) & (batch.token_advantages != 0)).sum()
    config = gk.LossConfig.preset(f"verl_{loss}", eps_low=0.0, eps_high=0.0)
    assert_matches(exact, **{**our_call(loss, "token-mean", batch), "config": config})


@pytest.mark.parametrize("loss", LEVELS)
def test_preset_is_the_trainers_default(loss: str) -> None:
    plain = verl_config.ActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1)
    preset = gk.LossConfig.preset(f"verl_{loss}")
    assert preset.eps_low == plain.clip_ratio_low and (preset.eps_high or preset.eps_low) == plain.clip_ratio_high
    assert preset.aggregation == AGGREGATIONS[plain.loss_agg_mode]
    assert loss == "gspo" or preset.dual_clip == plain.clip_ratio_c
    assert preset.entropy_coef == plain.entropy_coeff and not preset.kl_coef and not plain.use_kl_loss


def test_presets_are_the_trainers_defaults() -> None:
    plain = verl_config.ActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1)
    own, low, high = plain.policy_loss, 1 - plain.clip_ratio_low, 1 + plain.clip_ratio_high
    expected = {
        "cispo": {"cispo_low": low, "cispo_high": high},
        "sapo": {"sapo_tau_pos": plain.tau_pos, "sapo_tau_neg": plain.tau_neg},
        "geo_mean": {"eps_low": plain.clip_ratio_low},
        "dppo_tv": {"eps_low": plain.clip_ratio_low, "ratio_cap": plain.clip_ratio_c},
        "dppo_kl": {"eps_low": plain.clip_ratio_low, "ratio_cap": plain.clip_ratio_c},
        "clip_cov": {"cov_ratio": own.clip_cov_ratio, "cov_low": own.clip_cov_lb, "cov_high": own.clip_cov_ub},
        "kl_cov": {"cov_ratio": own.kl_cov_ratio, "cov_kl": own.ppo_kl_coef},
        "gpg": {},
    }
    for loss, options in expected.items():
        preset = gk.LossConfig.preset(f"verl_{loss}")
        assert {name: getattr(preset, name) for name in options} == options, loss
    registered = set(core_algos.POLICY_LOSS_REGISTRY) - {"bypass_mode"}
    assert registered == {*LEVELS, *expected, "dro"}


@pytest.mark.parametrize("info", [WIDE, GLOBAL], ids=["own_batch", "global_batch"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_agg_loss(mode: str, info: dict[str, Any]) -> None:
    """Any per-token loss L is -A r with A = -L on policy."""
    batch = make_batch(holes=True)
    terms = batch.ref

    def loss(logps: Tensor) -> Tensor:
        return core_algos.agg_loss(terms * (logps - logps.detach()).exp(), batch.mask, mode, **info)

    call = our_call("vanilla", mode, batch._replace(token_advantages=-terms), info) | {"old_logps": None}
    assert_matches(differentiated(loss, batch.logps), **call, tolerance=tolerance_of(mode))


# ---- KL ----

NO_CLAMPS: dict[str, float | None] = {"kl_input_clamp": None, "kl_output_clamp": None}
CLAMPS: dict[str, float | None] = {"kl_input_clamp": 20.0, "kl_output_clamp": 10.0}
KL_TYPES = {
    "kl": ("k1", NO_CLAMPS), "k1": ("k1", NO_CLAMPS), "abs": ("abs", NO_CLAMPS), "mse": ("k2", NO_CLAMPS),
    "k2": ("k2", NO_CLAMPS), "low_var_kl": ("k3", CLAMPS), "k3": ("k3", CLAMPS),
}  # fmt: skip


def our_kl(kl_type: str, coefficient: float) -> dict[str, Any]:
    estimator, clamps = KL_TYPES[kl_type.removesuffix("+")]
    gradient = "straight_through" if kl_type.endswith("+") else "pathwise"
    return {"kl_coef": coefficient, "kl_estimator": estimator, "kl_gradient": gradient, **clamps}


def kl_batch() -> Batch:
    """u = ref - logp beyond both clamps of k3 (|u| > 20, k3 > 10), within them, and exactly 0."""
    batch = make_batch(holes=True, large=(25.0, -25.0, 20.5, -20.5, 11.5, -10.5, 2.7, -12.0))
    return batch._replace(ref=torch.where(torch.arange(batch.ref.shape[1]) == 2, batch.logps, batch.ref))


@pytest.mark.parametrize("kl_type", [name + plus for name in KL_TYPES for plus in ("", "+")])
def test_kl_penalty(kl_type: str) -> None:
    batch = kl_batch()

    def loss(logps: Tensor) -> Tensor:
        return core_algos.agg_loss(core_algos.kl_penalty(logps, batch.ref, kl_type), batch.mask, "token-mean")

    call = our_call("vanilla", "token-mean", batch, **our_kl(kl_type, 1.0))
    call |= {"advantages": torch.zeros_like(batch.advantages), "ref_logps": batch.ref}
    assert_matches(differentiated(loss, batch.logps), **call)


@pytest.mark.parametrize("loss", LEVELS)
def test_preset_kl_is_the_trainers_default(loss: str) -> None:
    """Only the coefficient is given; the rest are ActorConfig's defaults, with kl_loss_type "low_var_kl"."""
    preset = gk.LossConfig.preset(f"verl_{loss}", kl_coef=0.001)
    expected = our_kl(verl_config.ActorConfig.kl_loss_type, 0.001)
    assert {name: getattr(preset, name) for name in expected} == expected


class Data(dict):
    """The part of a TensorDict that ppo_loss uses."""

    def select(self, *fields: str) -> Data:
        return Data({name: self[name] for name in fields})

    def to_padded_tensor(self) -> Data:
        return self


@pytest.mark.parametrize("kl_type", ["low_var_kl", "k3+", "kl"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("loss", LEVELS)
def test_actor_loss(loss: str, mode: str, kl_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of ppo_loss: policy with rollout weights, entropy bonus and KL, over the global batch."""
    monkeypatch.setattr(verl_losses, "no_padding_2_padding", lambda values, _: values)
    batch = make_batch(LEVELS[loss], holes=True)
    config = actor(
        policy_loss=verl_config.PolicyLossConfig(loss_mode=loss), loss_agg_mode=mode, loss_scale_factor=HORIZON,
        use_kl_loss=True, kl_loss_coef=0.3, kl_loss_type=kl_type, entropy_coeff=0.07,
    )  # fmt: skip
    data = Data(
        GLOBAL, response_mask=batch.mask, old_log_probs=batch.old, advantages=batch.token_advantages,
        ref_log_prob=batch.ref, rollout_is_weights=batch.token_weights,
    )  # fmt: skip

    def run(logps: Tensor, entropy: Tensor) -> Tensor:
        return verl_losses.ppo_loss(config, {"log_probs": logps, "entropy": entropy}, data)[0]

    call = our_call(loss, mode, batch, GLOBAL, entropy_coef=0.07, **our_kl(kl_type, 0.3))
    assert_matches(
        differentiated(run, batch.logps, batch.entropy), **call, entropy=batch.entropy, ref_logps=batch.ref,
        token_weights=batch.token_weights, tolerance=tolerance_of(mode),
    )  # fmt: skip


# ---- log-probs ----


@pytest.mark.parametrize("variant", PADDED, ids=str)
def test_logps_and_entropy(variant: Variant) -> None:
    g = torch.Generator().manual_seed(3)
    logits = (5 * torch.randn(3, 5, 130, generator=g)).double()
    targets = torch.randint(130, (3, 5), generator=g)
    got = gk.token_logps(
        logits.to(variant.dtype), targets, return_entropy=True, return_sum_p2=True, backend=variant.backend
    )
    assert_near(got.logps, verl_torch.logprobs_from_logits(logits, targets), variant.tolerance, "logps")
    assert_near(got.entropy, verl_torch.entropy_from_logits(logits), variant.tolerance, "entropy")
    squares = verl_torch.calculate_sum_pi_squared_from_logits(logits)
    assert_near(got.sum_p2, squares, variant.tolerance, "sum_p2")


# ---- mutations ----

WRONG = {
    "bounds_swapped": {"eps_low": EPS_HIGH, "eps_high": EPS_LOW},
    "no_dual_clip": {"dual_clip": None},
    "other_aggregation": {"aggregation": "sequence_mean"},
    "empty_sequences_counted": {"aggregation": "sequence_sum", "count_empty_sequences": True},
    "kl_without_clamps": {"kl_input_clamp": None, "kl_output_clamp": None},
    "kl_other_gradient": {"kl_gradient": "straight_through"},
    "mask_dropped": {},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mutations(wrong: str) -> None:
    """The comparison fails when one thing is wrong."""
    batch, changes = kl_batch(), WRONG[wrong]
    mode = "seq-mean-token-sum" if wrong == "empty_sequences_counted" else "token-mean"

    def run(logps: Tensor) -> Tensor:
        loss, _ = core_algos.get_policy_loss_fn("vanilla")(
            batch.old, logps, batch.token_advantages, batch.mask, mode, actor()
        )
        kl = core_algos.kl_penalty(logps, batch.ref, "k3")
        return loss + 0.3 * core_algos.agg_loss(kl, batch.mask, mode)

    exact, call = differentiated(run, batch.logps), our_call("vanilla", mode, batch, **our_kl("k3", 0.3))
    variant = Variant("cpu", torch.float32)
    assert_same(ours(variant, **call, ref_logps=batch.ref), exact, batch.mask, variant.tolerance)
    call |= {"config": replace(call["config"], **changes)}
    if wrong == "mask_dropped":
        call["mask"] = torch.ones_like(batch.mask)
    with pytest.raises(AssertionError):
        assert_same(ours(variant, **call, ref_logps=batch.ref), exact, call["mask"], variant.tolerance)
