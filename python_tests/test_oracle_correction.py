"""Rollout correction against the trainers: verl's and TRL's code as it is, the others' rules written out row by row."""

from __future__ import annotations

import inspect
import itertools
import math
import textwrap
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from oracles import assert_matches as assert_loss_matches
from oracles import assert_near, differentiated, make_batch, poisoned
from oracles import one_thread as one_thread
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.correction_config import CORRECTION_PRESETS

EDGE = 5e-5
BOUNDS = (0.5, 2.0, 3.0, 5.0, 0.125, 8.0, 1e-4)
NEAR_BOUNDS = [math.log(bound) + side for bound in BOUNDS for side in (-EDGE, EDGE)]
LENGTHS = [24, 24, 20, 0, 17, 1, 22, 24, 3, 12, 9, 30]
# What a row's d averages, around the geometric filters, or adds up to, around the products' bounds.
MEANS = [
    0.0,
    math.log(1.001) + EDGE,
    math.log(0.999) + EDGE,
    0.0,
    math.log(1.001) - EDGE,
    0.3,
    0.1,
    math.log(0.5) - EDGE,
]
SUMS = [math.log(2) - EDGE, math.log(3) + EDGE, 0.4, -2.0]


class Batch(NamedTuple):
    """Float64 that float32 holds exactly; [B, T] but for the advantages."""

    old: Tensor
    roll: Tensor
    logps: Tensor
    mask: Tensor  # int64
    advantages: Tensor


def mismatch(*, far: bool = False, spread: float = 0.3, seed: int = 3) -> Batch:
    """`far`: differences beyond the trainers' clamps of 20, on rows of their own."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shape = (len(LENGTHS), max(LENGTHS))
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    mask[6, 4:9] = 0
    mask[7, 0] = 0
    d = spread * normal(*shape) * torch.rand(shape[0], 1, generator=g, dtype=torch.float64)
    n = mask.sum(-1).clamp(min=1)
    totals = torch.cat([torch.tensor(MEANS) * n[: len(MEANS)], torch.tensor(SUMS)])
    d += ((totals - (d * mask).sum(-1)) / n)[:, None]
    d[0, : len(NEAR_BOUNDS)] = torch.tensor(NEAR_BOUNDS, dtype=torch.float64)
    if far:
        d[1, :4] = torch.tensor([25.0, -25.0, 20.5, 12.0])
        d[2, 2], d[7, 5] = 30.0, -21.0
    old = -1.0 - torch.rand(shape, generator=g, dtype=torch.float64)
    old = (old - d.clamp(min=0)).float().double()
    logps = old + 0.4 * normal(*shape) + 0.1 * normal(shape[0], 1)
    advantages = normal(shape[0])
    advantages[4] = 0
    return Batch(old, *(x.float().double() for x in (old - d, logps)), mask, advantages.float().double())


VARIANTS = list(itertools.product([torch.float64, torch.float32], [False, True]))  # dtype, packed


def ours(
    b: Batch,
    config: gk.CorrectionConfig,
    dtype: torch.dtype,
    packed: bool,
    missing: Tensor | None = None,
    **others: Tensor,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Weights and mask, [B, T], and metrics. What is masked is poisoned, `missing` tokens of the sampler are NaN."""
    roll = b.roll if missing is None else torch.where(missing, math.nan, b.roll)
    kept = b.mask.flip(-1).cumsum(-1).flip(-1) > 0

    def given(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return x.to(dtype)
        x = poisoned(x, b.mask).to(dtype)
        return torch.cat([x[kept], x.new_full((2,), math.nan)]) if packed else x  # a tail of no sequence

    options: dict[str, Any] = {name: given(x) for name, x in others.items()}
    mask = torch.cat([b.mask[kept], torch.ones(2).long()]) if packed else b.mask
    if packed:
        options["cu_seqlens"] = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0)).int()
    out = gk.rollout_correction(given(b.old), given(roll), mask, config=config, **options)
    assert out.token_weights.dtype == dtype and out.mask.dtype == torch.bool
    whole = []
    for x in out[:2]:
        assert x.shape == mask.shape
        if packed:
            assert not x[-2:].any(), "a token past the last boundary counts"
            x = torch.zeros(b.mask.shape, dtype=x.dtype).masked_scatter(kept, x[:-2])
        assert not x[b.mask == 0].any(), "a masked token counts"
        whole.append(x)
    return whole[0].double(), whole[1], {name: float(x) for name, x in out.metrics.items()}


def assert_matches(
    b: Batch,
    config: gk.CorrectionConfig,
    weights: Tensor,
    mask: Tensor,
    metrics: dict[str, float] | None = None,
    missing: Tensor | None = None,
    **others: Tensor,
) -> None:
    """Against an oracle's weights and mask, [B, T], in both dtypes and layouts."""
    for dtype, packed in VARIANTS:
        w, m, got = ours(b, config, dtype, packed, missing, **others)
        what, tolerance = f"{dtype} packed={packed}", 1e-6 if dtype == torch.float32 else 1e-12
        assert torch.equal(m, (mask != 0) & (b.mask != 0)), f"{what} mask"
        assert_near(w, weights * (b.mask != 0), tolerance, f"{what} weights")
        assert all(map(math.isfinite, got.values())), got
        for name, value in (metrics or {}).items():
            assert got[name] == pytest.approx(value, rel=2e-6, abs=2e-7), f"{what} {name}"


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
    """Its unified function, which computes in the dtype given: float64."""
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
    """Under our names; of the rows that have tokens, as its means over rows count the empty ones too."""
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
        if options["rollout_is"] == "token":  # at the other level it reports the unbounded ratio's
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
    """The lines of _generate_and_score_completions that compute the ratio, run as they are."""
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
    """The whole of _compute_loss: its sampler ratio and off-policy mask against our weights in our loss."""
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


# ---- the rest, written out with math over Python lists ----


class Row(NamedTuple):
    """The active tokens of a row."""

    d: list[float]  # old - roll
    old: list[float]
    roll: list[float]
    drift: list[float]  # old - current
    advantage: float

    @property
    def ratios(self) -> list[float]:
        return [math.exp(x) for x in self.d]

    @property
    def geometric(self) -> float:
        return math.exp(sum(self.d) / len(self.d))


def row_by_row(b: Batch, rule: Any) -> tuple[Tensor, Tensor]:
    """`rule` of a Row gives each token's weight and whether it stays in the mask."""
    weights, mask = torch.zeros_like(b.old), torch.zeros_like(b.mask)
    for i in range(len(b.mask)):
        at = b.mask[i].nonzero()[:, 0]
        if len(at):
            values = [x[i, at].tolist() for x in (b.old - b.roll, b.old, b.roll, b.old - b.logps)]
            w, m = rule(Row(*values, float(b.advantages[i])))
            weights[i, at], mask[i, at] = torch.tensor(w, dtype=torch.float64), torch.tensor(m).long()
    return weights * mask, mask


def always(weights: list[float]) -> tuple[list[float], list[bool]]:
    return weights, [True] * len(weights)


def clamp(x: float, low: float, high: float) -> float:
    return max(low, min(x, high))


def mis(weight: Any, token_keep: Any = lambda r: True) -> Any:
    """slime's helper: ratios with d clamped to +-20; what it rejects, and rows with a token below 1e-4, leave the mask."""

    def rule(row: Row) -> tuple[list[float], list[bool]]:
        safe = [math.exp(clamp(x, -20, 20)) for x in row.d]
        vetoed = any(x < math.log(1e-4) for x in row.d)
        return [weight(r) for r in safe], [token_keep(r) and not vetoed for r in safe]

    return rule


def prime(row: Row) -> tuple[list[float], list[bool]]:
    keep = 0.1 <= row.geometric <= 10 and max(row.ratios) <= 100
    return always([r * (keep and 0.125 <= r <= 8) for r in row.ratios])


def logprob_error(row: Row) -> tuple[list[float], list[bool]]:
    keep = sum(math.exp(abs(x)) for x in row.d) / len(row.d) <= 2.0
    return [1.0] * len(row.d), [keep] * len(row.d)


WRITTEN = {
    "openrlhf_tis": lambda row: always([clamp(r, 0.5, 5.0) for r in row.ratios]),
    "openrlhf_icepop": lambda row: always([r * (0.5 <= r <= 5.0) for r in row.ratios]),
    "openrlhf_seq_mask_tis": lambda row: always([r * (0.5 <= row.geometric <= 5.0) for r in row.ratios]),
    "slime_tis": lambda row: always([clamp(r, 0.0, 2.0) for r in row.ratios]),
    "slime_icepop": lambda row: always([r * (0.0 <= r <= 2.0) for r in row.ratios]),
    "slime_opsm": lambda row: always(
        [float(not (row.advantage < 0 and sum(row.drift) / len(row.drift) > 1e-4)) for _ in row.d]
    ),
    "slime_mis_truncate": mis(lambda r: min(r, 2.0)),
    "slime_mis_clip": mis(lambda r: clamp(r, 0.5, 2.0)),
    "slime_mis_mask": mis(lambda r: r, lambda r: 0.5 <= r <= 2.0),
    "nemo_tis": lambda row: always([clamp(r, 0.0, 5.0) for r in row.ratios]),
    "nemo_icepop": lambda row: always([r * (0.5 <= r <= 5.0) for r in row.ratios]),
    "nemo_seq_mask_tis": lambda row: always([r * (0.999 <= row.geometric <= 1.002) for r in row.ratios]),
    "nemo_logprob_error": logprob_error,
    "prime_masks": prime,
}


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("name", WRITTEN)
def test_written(name: str, far: bool) -> None:
    b = mismatch(far=far, spread=1.5 if name == "nemo_logprob_error" else 0.3)
    weights, mask = row_by_row(b, WRITTEN[name])
    config = gk.CorrectionConfig.preset(name)
    given = {"logps": b.logps, "advantages": b.advantages} if config.opsm_delta is not None else {}
    lost = (mask == 0) & (b.mask > 0)
    assert lost.any() == config.renormalise and weights.any() and not torch.equal(weights, b.mask.double())
    assert_matches(
        b, config, weights, mask, {"rejected_tokens": float(lost.sum() / b.mask.sum())} if lost.any() else {}, **given
    )


def test_every_preset_is_compared() -> None:
    left = {name for name in CORRECTION_PRESETS if not name.startswith(("verl_", "trl_"))}
    assert left == set(WRITTEN)


@pytest.mark.parametrize("level", ["sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "clip", "mask"])
def test_slime_mis_of_rows(level: str, mode: str) -> None:
    """mis_level sequence and geometric: one ratio a row."""

    def rule(row: Row) -> tuple[list[float], list[bool]]:
        total = sum(row.d) if level == "sequence" else sum(row.d) / len(row.d)
        r = math.exp(clamp(total, -20, 20))
        keep = not any(x < math.log(1e-4) for x in row.d) and (mode != "mask" or 0.5 <= r <= 2.0)
        w = {"truncate": min(r, 2.0), "clip": clamp(r, 0.5, 2.0), "mask": r}[mode]
        return [w] * len(row.d), [keep] * len(row.d)

    b = mismatch(far=True)
    reduction = {"sequence": "sum", "geometric": "mean"}[level]
    changes: dict[str, Any] = {"level": f"sequence_{reduction}"}
    if mode == "mask":
        changes["filters"] = (gk.RejectionFilter("ratio", reduction, 0.5, 2.0),)
    config = gk.CorrectionConfig.preset(f"slime_mis_{mode}", **changes)
    assert_matches(b, config, *row_by_row(b, rule))


def test_nemo_product_of_the_row() -> None:
    """sequence_level_importance_ratios: one weight a row, its product."""
    b = mismatch()
    rule = lambda row: always([min(math.exp(sum(row.d)), 5.0)] * len(row.d))  # noqa: E731
    assert_matches(b, gk.CorrectionConfig.preset("nemo_tis", level="sequence_sum"), *row_by_row(b, rule))


def test_nemo_weight_that_is_not_finite_is_zero() -> None:
    b = mismatch()
    b.roll[0, 3], b.roll[4, 2], b.old[2, 1] = math.nan, -math.inf, -math.inf  # NaN, rho = inf, rho = 0
    config = gk.CorrectionConfig.preset("nemo_tis")
    rho = (b.old - b.roll).exp()
    weights = torch.nan_to_num(rho, nan=0.0, posinf=0.0, neginf=0.0).clamp(max=5.0)
    for dtype, packed in VARIANTS:
        w, m, _ = ours(b, config, dtype, packed)
        assert torch.equal(m, b.mask > 0)
        assert_near(w, weights * b.mask, 1e-6 if dtype == torch.float32 else 1e-12, str(dtype))


def test_total_variation_of_tokens() -> None:
    """|p_old - p_roll|, what OpenRLHF's tv gating and prime-rl's ipo compare at the old log-probs."""
    rule = lambda row: always(  # noqa: E731
        [float(abs(math.exp(o) - math.exp(r)) <= 0.05) for o, r in zip(row.old, row.roll, strict=True)]
    )
    b = mismatch()
    assert_matches(
        b, gk.CorrectionConfig(filters=(gk.RejectionFilter("tv", "token", high=0.05),)), row_by_row(b, rule)[0], b.mask
    )


# ---- teeth ----

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
def test_teeth(wrong: str) -> None:
    """One thing wrong, and the comparison says so."""
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
