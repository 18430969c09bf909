"""Rollout correction against verl's and TRL's own code."""

from __future__ import annotations

import inspect
import math
import textwrap
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from correction_oracles import LENGTHS, VARIANTS, Batch, assert_matches, mismatch, ours
from oracle_cases import assert_matches as assert_loss_matches
from oracle_cases import assert_near, differentiated, make_batch
from oracle_cases import one_thread as one_thread
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.correction.config import CORRECTION_PRESETS

# ---- verl ----

VERL_REASON = "the oracle is verl itself: pip install verl==0.9.1"
RS = {
    "token_k1": "0.5_2.0", "token_k2": "0.1", "token_k3": 0.02, "seq_sum_k1": "0.5_2.0", "seq_sum_k2": "0.4",
    "seq_sum_k3": "0.6", "seq_mean_k1": "0.999_1.001", "seq_mean_k2": "0.02", "seq_mean_k3": 0.01, "seq_max_k2": "0.2",
    "seq_max_k3": "0.3", "seq_mean_k1,token_k1": "1.1", "token_k3,seq_max_k2,seq_sum_k1": "0.3,0.5,0.25_4",
}  # fmt: skip
IS = [
    (None, 2.0, False), ("token", 2.0, False), ("token", "3.0", True), ("token", "0.5_5.0", False),
    ("token", "0.5_5.0", True), ("sequence", 2.0, False), ("sequence", "0.5_3.0", False), ("sequence", 3.0, True),
]  # fmt: skip


def verl(b: Batch, *, rows: Tensor | None = None, **options: Any) -> tuple[Tensor | None, Tensor, dict[str, float]]:
    """verl's unified function, which computes in the dtype of its inputs: float64."""
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", reason=VERL_REASON)
    rows = torch.ones(len(LENGTHS), dtype=torch.bool) if rows is None else rows
    proto, mask, metrics = helper.compute_rollout_correction_and_rejection_mask(
        b.old[rows], b.roll[rows], b.mask[rows], **options
    )
    weights = None if proto is None else proto.batch["rollout_is_weights"]
    return weights, mask, {name.removeprefix("rollout_corr/"): value for name, value in metrics.items()}


def verl_options(level: str | None, threshold: Any, normalise: bool, rs: str | None) -> dict[str, Any]:
    return {
        "rollout_is": level, "rollout_is_threshold": threshold, "rollout_is_batch_normalize": normalise,
        "rollout_rs": rs, "rollout_rs_threshold": RS[rs] if rs else None,
    }  # fmt: skip


def verl_metrics(b: Batch, options: dict[str, Any]) -> dict[str, float]:
    """Its metrics under our names, computed on the rows that have tokens: its means over rows include empty ones."""
    m = verl(b, rows=b.mask.any(-1), **options)[2]
    names = {
        "k1": "kl",
        "k3": "k3_kl",
        "ppl_ratio": "ppl_ratio",
        "chi2_token": "chi2_token",
        "chi2_sequence": "chi2_seq",
    }
    if options["rollout_is"]:
        names |= {"weight_mean": "rollout_is_mean", "weight_std": "rollout_is_std"}
        names |= {"effective_sample_size": "rollout_is_eff_sample_size", "ratio_high": "rollout_is_ratio_fraction_high"}
        if "_" in str(options["rollout_is_threshold"]):
            names["ratio_low"] = "rollout_is_ratio_fraction_low"
        if options["rollout_is"] == "token":  # at the sequence level it reports those of the unbounded ratio
            names |= {"weight_min": "rollout_is_min", "weight_max": "rollout_is_max"}
    if options["rollout_rs"]:
        names |= {"rejected_tokens": "rollout_rs_masked_fraction", "rejected_rows": "rollout_rs_seq_masked_fraction"}
    return {ours: m[theirs] for ours, theirs in names.items()}


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("rs", [None, *RS])
@pytest.mark.parametrize("importance", IS, ids=str)
def test_verl(importance: tuple[Any, ...], rs: str | None, far: bool) -> None:
    b, options = mismatch(far=far), verl_options(*importance, rs)
    weights, mask, _ = verl(b, **options)
    weights = torch.ones_like(b.old) if weights is None else weights
    config = gk.CorrectionConfig.from_verl(**options)
    assert config.renormalise == (rs is not None)
    assert_matches(b, config, weights * mask, mask, {} if far else verl_metrics(b, options))


def test_verl_batch_reaches_both_sides() -> None:
    b = mismatch()
    for rs in RS:
        kept = verl(b, **verl_options(None, None, False, rs))[1].sum()
        assert 0 < kept < b.mask.sum(), rs


VERL_PRESETS = [
    "token_is", "seq_is", "token_icepop", "seq_is_rs", "geo_rs", "geo_rs_token_tis", "geo_rs_seq_tis", "k3_rs",
    "k3_rs_token_tis", "k3_rs_seq_tis",
]  # fmt: skip


@pytest.mark.parametrize("name", VERL_PRESETS)
def test_verl_presets(name: str) -> None:
    module = pytest.importorskip("verl.trainer.config.algorithm", reason=VERL_REASON)
    c = getattr(module.RolloutCorrectionConfig, f"decoupled_{name}")()
    theirs = gk.CorrectionConfig.from_verl(
        c.rollout_is, c.rollout_is_threshold, c.rollout_is_batch_normalize, c.rollout_rs, c.rollout_rs_threshold
    )
    assert gk.CorrectionConfig.preset(f"verl_{name}") == theirs


def test_every_verl_preset_is_compared() -> None:
    assert {f"verl_{name}" for name in VERL_PRESETS} == {
        name for name in CORRECTION_PRESETS if name.startswith("verl_")
    }


# ---- TRL ----

TRL_REASON = "the oracle is TRL itself: pip install trl==1.16.0"
TRL_MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
TRL_CLIPS = [(None, 3.0), (0.5, 3.0), (0.5, None), (0.125, 2.0), (None, None)]
TRL_CASES = [  # without bounds it refuses to truncate
    (mode, clips) for mode in TRL_MODES for clips in TRL_CLIPS if clips != (None, None) or mode.endswith("mask")
]


def trl_block(b: Batch, roll: Tensor, mode: str, low: float | None, high: float | None) -> dict[str, Any]:
    """Runs the lines of _generate_and_score_completions that compute the ratio."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=TRL_REASON)
    source = inspect.getsource(trainer.GRPOTrainer._generate_and_score_completions)
    begin = source.index("                mask = completion_mask if tool_mask is None")
    end = source.index("            # Compute the per-token log probabilities for the reference model")
    me = SimpleNamespace(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    names = {
        "self": me, "completion_mask": torch.ones_like(b.mask), "tool_mask": b.mask, "old_per_token_logps": b.old,
        "sampling_per_token_logps": roll,
    }  # fmt: skip
    exec(textwrap.dedent(source[begin:end]), vars(trainer) | names, names)
    return names


def trl_config(mode: str, low: float | None, high: float | None) -> gk.CorrectionConfig:
    weight = mode.split("_")[1]
    if (low, high) == (None, None):
        weight = "ratio"
    elif weight == "truncate" and low is not None:
        weight = "clip"
    return gk.CorrectionConfig.preset(f"trl_{mode}", weight=weight, low=low, high=high)


@pytest.mark.parametrize("holes", [False, True], ids=["scored", "unscored"])
@pytest.mark.parametrize(("mode", "clips"), TRL_CASES, ids=str)
def test_trl(mode: str, clips: tuple[float | None, float | None], holes: bool) -> None:
    b = mismatch(far=clips[1] is not None)
    missing = torch.rand(b.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.2 if holes else None
    roll = b.roll if missing is None else torch.where(missing, math.nan, b.roll)
    ratio = trl_block(b, roll, mode, *clips)["vllm_importance_sampling_ratio"]
    delta = (b.old - roll).abs()[(b.mask > 0) & ~roll.isnan()]
    metrics = {"logp_difference_mean": float(delta.mean()), "logp_difference_max": float(delta.max())}
    if mode.startswith("token"):
        flat = ratio[b.mask > 0]
        metrics |= {"weight_mean": float(flat.mean()), "weight_min": float(flat.min()), "weight_max": float(flat.max())}
    if holes:
        metrics["missing_tokens"] = float((missing & (b.mask > 0)).sum() / b.mask.sum())
    config = trl_config(mode, *clips)
    for dtype, packed in VARIANTS:
        w, m, got = ours(b, config, dtype, packed, missing)
        assert torch.equal(m, b.mask > 0)
        assert_near(w, ratio.expand(b.mask.shape) * b.mask, 1e-6 if dtype == torch.float32 else 1e-12, str(dtype))
        for name, value in metrics.items():
            assert got[name] == pytest.approx(value, rel=2e-6), name


def test_trl_presets_are_its_defaults() -> None:
    module = pytest.importorskip("trl.trainer.grpo_config", reason=TRL_REASON)
    default = {f.name: f.default for f in fields(module.GRPOConfig)}
    for mode in TRL_MODES:
        config = gk.CorrectionConfig.preset(f"trl_{mode}")
        bounds = default["vllm_importance_sampling_clip_min"], default["vllm_importance_sampling_clip_max"]
        assert (config.low, config.high) == bounds and not config.renormalise and config.opsm_delta is None
    assert default["vllm_importance_sampling_mode"] == "sequence_mask"


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.02, 0.06])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("behaviour", ["rollout", "old"])
def test_trl_off_policy_mask(behaviour: str, per_token: bool, delta: float) -> None:
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=TRL_REASON)
    b = mismatch()
    missing = torch.rand(b.mask.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    sampler = torch.where(missing, math.nan, b.roll) if behaviour == "rollout" else b.old
    g = torch.Generator().manual_seed(4)
    advantages = b.advantages[:, None]
    if per_token:
        advantages = advantages + torch.randn(b.mask.shape, generator=g).double()
    keep = trainer.GRPOTrainer.get_off_policy_mask(advantages, b.logps, sampler, b.mask, delta).expand(b.mask.shape)
    assert 0 < (keep * b.mask).sum() < b.mask.sum()
    config = gk.CorrectionConfig(opsm_delta=delta, opsm_behaviour=behaviour)
    given = {"logps": b.logps, "advantages": advantages if per_token else b.advantages}
    rejected = float(((keep == 0) & (b.mask > 0)).sum() / b.mask.sum())
    assert_matches(b, config, keep.double(), b.mask, {"rejected_tokens": rejected}, missing, **given)


def test_trl_loss_with_everything() -> None:
    """All of _compute_loss: its sampler ratio and off-policy mask against our weights in our loss."""
    trl = pytest.importorskip("trl.trainer.grpo_trainer", reason=TRL_REASON)
    from test_oracle_trl import EPS_HIGH, EPS_LOW, Case, trainer, trl_inputs

    b, case = make_batch(), Case(vllm="token")
    drift = torch.linspace(-0.25, 0.25, len(b.mask)).double()[
        torch.randperm(len(b.mask), generator=torch.Generator().manual_seed(2))
    ]
    b = b._replace(roll=(b.roll + drift[:, None]).float().double())
    mismatched = Batch(b.old, b.roll, b.logps, b.mask, b.advantages)
    ratio = trl_block(mismatched, b.roll, "token_mask", 0.8, 1.2)["vllm_importance_sampling_ratio"]
    inputs = trl_inputs(b, case) | {"importance_sampling_ratio": ratio, "sampling_per_token_logps": b.roll}

    def loss(logps: Tensor, entropy: Tensor) -> Tensor:
        me = trainer("grpo", "token", case, (logps, entropy))
        me.off_policy_mask_threshold, me.get_off_policy_mask = 0.01, trl.GRPOTrainer.get_off_policy_mask
        return trl.GRPOTrainer._compute_loss(me, None, inputs)

    exact = differentiated(loss, b.logps, b.entropy)._replace(entropy_gradient=None)
    config = gk.CorrectionConfig.preset("trl_token_mask", low=0.8, high=1.2, opsm_delta=0.01)
    c = gk.rollout_correction(b.old, b.roll, b.mask, logps=b.logps, advantages=b.advantages, config=config)
    assert 0 < c.metrics["rejected_rows"] < 1 and c.metrics["ratio_high"] > 0 and c.metrics["ratio_low"] > 0
    loss_config = gk.LossConfig.preset("trl_grpo", eps_low=EPS_LOW, eps_high=EPS_HIGH)
    assert_loss_matches(
        exact, loss_config, b.logps, b.advantages, c.mask, old_logps=b.old, token_weights=c.token_weights
    )


# ---- mutations ----

TEETH = {
    "other_sign": lambda c: {"filters": tuple(gk.RejectionFilter("k1", "mean", -f.high, -f.low) for f in c.filters)},
    "no_filter": lambda c: {"filters": (), "renormalise": False},
    "sum_for_mean": lambda c: {"filters": tuple(gk.RejectionFilter("k1", "sum", f.low, f.high) for f in c.filters)},
    "kept_in_the_mask": lambda c: {"renormalise": False},
    "other_level": lambda c: {"level": "sequence_mean"},
    "not_normalised": lambda c: {"batch_normalise": False},
    "other_bound": lambda c: {"high": 2.0001},
}


@pytest.mark.parametrize("wrong", TEETH)
def test_mutations(wrong: str) -> None:
    """The comparison fails when one thing is wrong."""
    b = mismatch()
    options = {
        "rollout_is": "token", "rollout_is_threshold": 2.0, "rollout_is_batch_normalize": True,
        "rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.6_1.05",
    }  # fmt: skip
    weights, mask, _ = verl(b, **options)
    config = gk.CorrectionConfig.from_verl(**options)
    assert_matches(b, config, weights * mask, mask)
    with pytest.raises(AssertionError):
        assert_matches(b, replace(config, **TEETH[wrong](config)), weights * mask, mask)
