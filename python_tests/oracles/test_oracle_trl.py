"""TRL's own loss decides what the trl_* presets compute: value, gradient and metrics."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from oracle_cases import (
    ADVANTAGES,
    DELTA,
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
)
from oracle_cases import one_thread as one_thread
from torch import Tensor

import grpo_kernels as gk

REASON = "the oracle is TRL itself: pip install trl==1.16.0"
grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON)
gmpo_trainer = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer", reason=REASON)
rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer", reason=REASON)
trl_utils = pytest.importorskip("trl.trainer.utils", reason=REASON)

CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]
LOSS_TYPES = [*CLIPPED, "cispo", "sapo", "vespo"]
LEVELS = ["token", "sequence"]
LOSSES = [
    (loss, level) for loss, level in itertools.product(LOSS_TYPES, LEVELS) if (loss, level) != ("vespo", "sequence")
]
CISPO_CAP = 1.1  # TRL reads epsilon_high as the cap itself
TAUS = {"sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05}
VESPO = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
MAX_LENGTH = 512
ITEMS = 75  # num_items_in_batch: differs from the tokens of this batch
BETA = 0.3
ENTROPY_COEF = 0.05


class Case(dict):
    """The differences from a plain GRPO step: `Case(beta=0.3, vllm="row")`."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


OPTIONS = {
    "plain": Case(),
    "eval": Case(evaluating=True, accumulation=4),
    "on_policy": Case(on_policy=True),
    "delta": Case(delta=DELTA),
    "token_advantages": Case(token_advantages=True),
    "tool_mask": Case(holes=True),
    "vllm_token_ratio": Case(vllm="token"),
    "vllm_sequence_ratio": Case(vllm="row"),
    "top_entropy": Case(quantile=0.4),
    "entropy_bonus": Case(bonus=True),
    "entropy_bonus_top": Case(bonus=True, quantile=0.4),
    "accumulation": Case(accumulation=2, generation_steps=4, processes=2, bonus=True),
    "everything": Case(
        delta=DELTA, token_advantages=True, holes=True, vllm="token", bonus=True, quantile=0.6, accumulation=2,
        generation_steps=2,
    ),
}  # fmt: skip
KLS = {"no_kl": Case(), "kl": Case(beta=BETA), "bias_corrected_kl": Case(beta=BETA, corrected=True)}


def trainer(loss_type: str, level: str, case: Case, outputs: tuple[Tensor, Tensor]) -> SimpleNamespace:
    """Stands in for a GRPOTrainer on one process: the attributes that `_compute_loss` uses."""
    accelerator = SimpleNamespace(
        num_processes=case.processes or 1, sync_gradients=True, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x, pad_across_processes=lambda x, dim, pad_index: x,
    )  # fmt: skip
    me = SimpleNamespace(
        loss_type=loss_type, importance_sampling_level=level, beta=case.beta or 0.0, epsilon_low=EPS_LOW,
        epsilon_high=CISPO_CAP if loss_type == "cispo" else EPS_HIGH, max_completion_length=MAX_LENGTH, top_entropy_quantile=case.quantile or 1.0,
        off_policy_mask_threshold=None, use_vllm=case.vllm is not None, vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=case.accumulation or 1, aux_loss_enabled=False, use_adaptive_entropy=False,
        _entropy_bonus_enabled=bool(case.bonus), entropy_coef=ENTROPY_COEF, accelerator=accelerator,
        model=SimpleNamespace(training=not case.evaluating), _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(
            delta=case.delta, use_bias_correction_kl=bool(case.corrected),
            steps_per_generation=case.generation_steps or 1, sapo_temperature_pos=TAUS["sapo_tau_pos"],
            sapo_temperature_neg=TAUS["sapo_tau_neg"], **VESPO,
        ),
        get_gamma_weights=grpo_trainer.GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (*outputs, None),
    )  # fmt: skip
    me.get_high_entropy_mask = MethodType(grpo_trainer.GRPOTrainer.get_high_entropy_mask, me)
    return me


def trl_inputs(batch: Batch, case: Case) -> dict[str, Tensor]:
    ids = torch.zeros_like(batch.mask)
    completion_mask = (batch.mask.flip(-1).cumsum(-1).flip(-1) > 0).long()
    inputs = {
        "prompt_ids": ids[:, :2], "prompt_mask": ids[:, :2] + 1, "completion_ids": ids,
        "completion_mask": completion_mask, "tool_mask": torch.where(completion_mask > 0, batch.mask, 1),
        "num_items_in_batch": torch.tensor(ITEMS),
        "advantages": batch.token_advantages if case.token_advantages else batch.advantages,
        "old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref,
    }  # fmt: skip
    if case.vllm:
        ratio = batch.token_weights if case.vllm == "token" else batch.row_weights
        inputs["importance_sampling_ratio"] = torch.where(batch.mask > 0, ratio, 1.0) if case.vllm == "token" else ratio
    unused = {"old_per_token_logps": case.on_policy, "ref_per_token_logps": not case.beta, "tool_mask": not case.holes}
    return {name: value for name, value in inputs.items() if not unused.get(name)}


@contextmanager
def float64_numbers() -> Iterator[None]:
    """Makes torch.where(..., 1.0, 1.05) and divisions of integers float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def theirs(loss_type: str, level: str, case: Case, batch: Batch) -> Result:
    inputs, seen = trl_inputs(batch, case), []

    def loss(logps: Tensor, entropy: Tensor) -> Tensor:
        seen.append(trainer(loss_type, level, case, (logps, entropy)))
        return grpo_trainer.GRPOTrainer._compute_loss(seen[0], None, inputs)

    with float64_numbers():
        result = differentiated(loss, batch.logps, batch.entropy)
    metrics = seen[0]._metrics["eval" if case.evaluating else "train"]
    return result._replace(metrics={name: values[0] for name, values in metrics.items()})


def entropy_mask(batch: Batch, case: Case) -> Tensor:
    me = trainer("grpo", "token", case, (batch.logps, batch.entropy))
    return me.get_high_entropy_mask(batch.entropy, batch.mask, 1 - case.quantile).double()


def our_call(loss_type: str, level: str, case: Case, batch: Batch) -> dict[str, Any]:
    """Our arguments for the same step: a preset, and the trainer's normaliser as scale and denominator."""
    changes: dict[str, Any] = {"ratio_level": level}
    if loss_type in CLIPPED:
        changes |= {"eps_low": EPS_LOW, "eps_high": EPS_HIGH, "delta": case.delta}
    elif loss_type == "cispo":
        changes["cispo_high"] = CISPO_CAP
    if case.beta:
        changes |= {"kl_coef": case.beta, "kl_gradient": "importance_weighted" if case.corrected else "pathwise"}
    if case.bonus:
        changes["entropy_coef"] = ENTROPY_COEF
    accumulation = 1 if case.evaluating else case.accumulation or 1
    call: dict[str, Any] = {"scale": 1 / accumulation}
    if loss_type in (
        "dapo",
        "cispo",
        "vespo",
    ):  # items of the generation batch, scaled to one window; `scale` contains the accumulation
        call["denominator"] = torch.tensor(ITEMS / (case.processes or 1) / (case.generation_steps or 1))
    if case.vllm:
        call["token_weights"] = batch.token_weights if case.vllm == "token" else batch.row_weights
    if case.quantile:
        call["entropy_mask"] = entropy_mask(batch, case)
    return call | {
        "config": gk.LossConfig.preset(f"trl_{loss_type}", **changes), "logps": batch.logps, "mask": batch.mask,
        "advantages": batch.token_advantages if case.token_advantages else batch.advantages,
        "entropy": batch.entropy if case.bonus else None, "old_logps": None if case.on_policy else batch.old,
        "ref_logps": batch.ref if case.beta else None,
    }  # fmt: skip


METRICS = {
    "clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean", "clip_region": "clip_ratio/region_mean",
    "clip_low_min": "clip_ratio/low_min", "clip_high_max": "clip_ratio/high_max",
}  # fmt: skip


def metrics_of(loss_type: str, trl: dict[str, float], level: str, case: Case) -> dict[str, float]:
    """TRL's token-level metrics under our names; with one ratio per sequence it logs means over sequences instead."""
    if level == "sequence":
        return {}
    metrics = {ours: trl[name] for ours, name in METRICS.items()} if loss_type in CLIPPED else {}
    if loss_type == "cispo":
        metrics["clip_high"] = trl["cispo_clip_ratio"]
    if case.bonus:
        metrics["entropy"] = trl["entropy"]
    return metrics | ({"kl": trl["kl"]} if case.beta else {})


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_loss(loss_type: str, level: str, kl: str, option: str) -> None:
    case = Case(**KLS[kl], **OPTIONS[option])
    if case.delta and loss_type not in CLIPPED:
        case.pop("delta")
    batch = make_batch(level, holes=bool(case.holes))
    exact = theirs(loss_type, level, case, batch)
    if not case.bonus:
        exact = exact._replace(entropy_gradient=None)
    metrics = metrics_of(loss_type, exact.metrics, level, case)
    assert_matches(exact, **our_call(loss_type, level, case, batch), metrics=metrics)


@pytest.mark.parametrize("x", [19.0, 21.0, -19.0, -21.0])
def test_vespo_clamps(x: float) -> None:
    """A token's log-ratio, the logarithm of an importance weight and their sum, each beyond each bound."""
    batch = make_batch(large=(x, 0.3, -0.2))
    weights = batch.token_weights.clone()
    weights[0, :2], weights[1, 2] = torch.tensor([1e-9, 0.0]), 1e12
    batch = batch._replace(token_weights=weights)
    case = Case(vllm="token")
    exact = theirs("vespo", "token", case, batch)._replace(entropy_gradient=None)
    assert_matches(exact, **our_call("vespo", "token", case, batch))


@pytest.mark.parametrize("option", ["plain", "on_policy", "tool_mask", "top_entropy", "accumulation"])
@pytest.mark.parametrize("kl", ["no_kl", "kl"])
def test_gmpo(kl: str, option: str) -> None:
    case = Case(**KLS[kl], **{**OPTIONS[option], "bonus": False})
    batch = make_batch(holes=bool(case.holes))
    batch = batch._replace(
        advantages=batch.advantages * (batch.mask.sum(-1) > 0)
    )  # a row without tokens adds a constant in TRL

    def loss(logps: Tensor, entropy: Tensor) -> Tensor:
        me = trainer("grpo", "token", case, (logps, entropy))
        return gmpo_trainer.GMPOTrainer._compute_loss(me, None, trl_inputs(batch, case))

    exact = differentiated(loss, batch.logps, batch.entropy)._replace(entropy_gradient=None)
    call = our_call("gmpo", "token", case, batch)
    call["config"] = replace(call["config"], eps_low=EPS_LOW, eps_high=EPS_HIGH)
    assert_matches(exact, **call)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_preset_is_the_trainers_default(loss_type: str) -> None:
    default = {field.name: field.default for field in fields(grpo_trainer.GRPOConfig)}
    preset = gk.LossConfig.preset(f"trl_{loss_type}")
    assert {name: getattr(preset, name) for name in (*TAUS, *VESPO)} == {
        **{f"sapo_tau_{sign}": default[f"sapo_temperature_{sign}"] for sign in ("pos", "neg")},
        **{name: default[name] for name in VESPO},
    }
    if loss_type == "cispo":
        assert preset.cispo_low is None and preset.cispo_high == (default["epsilon_high"] or default["epsilon"])
    assert (preset.eps_low, preset.eps_high, preset.delta) == tuple(
        default[k] for k in ("epsilon", "epsilon_high", "delta")
    )
    assert (preset.kl_coef, preset.entropy_coef) == (default["beta"], default["entropy_coef"])
    assert preset.max_length in (None, default["max_completion_length"])
    # Only luspo departs from importance_sampling_level's default: TRL's documentation asks for another level with it.
    assert preset.ratio_level == ("sequence" if loss_type == "luspo" else default["importance_sampling_level"])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_preset_kl_is_the_trainers_default(loss_type: str) -> None:
    """Only beta is given; the rest are GRPOConfig's defaults."""
    default = {field.name: field.default for field in fields(grpo_trainer.GRPOConfig)}["use_bias_correction_kl"]
    preset = gk.LossConfig.preset(f"trl_{loss_type}", kl_coef=BETA)
    assert preset.kl_gradient == ("importance_weighted" if default else "pathwise")


@pytest.mark.parametrize("bounds", [(0.0, 0.0, None), (0.0, 0.0, 1.0), (0.5, 0.0, 1.0)], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_ratio_exactly_at_its_bounds(level: str, bounds: tuple[float, float, float | None]) -> None:
    """A ratio of exactly 1 where 1 is the bound: at the bound the gradient passes."""
    low, high, delta = bounds
    batch = make_batch(level)
    batch = batch._replace(old=batch.logps)

    def loss(logps: Tensor, entropy: Tensor) -> Tensor:
        me = trainer("grpo", level, Case(delta=delta), (logps, entropy))
        me.epsilon_low, me.epsilon_high = low, high
        return grpo_trainer.GRPOTrainer._compute_loss(me, None, trl_inputs(batch, Case()))

    exact = differentiated(loss, batch.logps, batch.entropy)._replace(entropy_gradient=None)
    assert (exact.gradient != 0).sum() == batch.mask[batch.advantages != 0].sum()
    config = gk.LossConfig.preset("trl_grpo", eps_low=low, eps_high=high, delta=delta, ratio_level=level)
    assert_matches(exact, config, batch.logps, batch.advantages, batch.mask, old_logps=batch.old)


def test_rloo() -> None:
    """RLOOTrainer: the product of the token ratios, and a mean over sequences. A completion without tokens adds the
    constant -A / B there and nothing here, so the test gives it an advantage of 0; it has no gradient in either."""
    batch = make_batch("product")
    batch = batch._replace(advantages=batch.advantages * (batch.mask.sum(-1) > 0))
    inputs = trl_inputs(batch, Case()) | {"old_logps": (batch.old * batch.mask).sum(-1)}

    def loss(logps: Tensor) -> Tensor:
        me = trainer("grpo", "token", Case(), (logps, batch.entropy))
        return rloo_trainer.RLOOTrainer._compute_loss(me, None, inputs)

    config = gk.LossConfig.preset("trl_grpo", eps_low=EPS_LOW, eps_high=EPS_HIGH, ratio_level="sequence_product")
    exact = differentiated(loss, batch.logps)
    assert_matches(exact, config, batch.logps, batch.advantages, batch.mask, old_logps=batch.old)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("variant", PADDED, ids=str)
def test_logps_and_entropy(variant: Variant, temperature: float) -> None:
    """selective_log_softmax and entropy_from_logits, through a random gradient of both."""
    g = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(4, 6, 211, generator=g)).double()
    targets = torch.randint(211, (4, 6), generator=g)
    weights = torch.randn(2, 4, 6, generator=g).double()
    leaves = [logits.clone().requires_grad_(), logits.to(variant.dtype).requires_grad_()]
    exact = (
        trl_utils.selective_log_softmax(leaves[0], targets, temperature=temperature),
        trl_utils.entropy_from_logits(leaves[0] / temperature),
    )
    got = gk.token_logps(leaves[1], targets, temperature=temperature, return_entropy=True, backend=variant.backend)
    for name, mine, value in zip(("logps", "entropy"), got, exact, strict=False):
        assert_near(mine.detach(), value.detach(), variant.tolerance, name)
    for logps, entropy in (exact, got[:2]):
        (weights[0] * logps + weights[1] * entropy).sum().backward()
    assert_near(leaves[1].grad, leaves[0].grad, variant.tolerance, "gradient")


@pytest.mark.parametrize("variant", PADDED, ids=str)
@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_loss_from_logits(loss_type: str, level: str, variant: Variant) -> None:
    """From logits to loss, with KL and entropy bonus: the gradient of the logits is TRL's."""
    g = torch.Generator().manual_seed(6)
    batch = make_batch()
    logits = (2 * torch.randn(*batch.mask.shape, 97, generator=g)).double()
    targets = torch.randint(97, batch.mask.shape, generator=g)
    logps = trl_utils.selective_log_softmax(logits, targets)
    moved = [(logps + 0.4 * torch.randn(logps.shape, generator=g)).float().double() for _ in range(2)]
    batch, case = batch._replace(logps=logps, old=moved[0], ref=moved[1]), Case(beta=BETA, bonus=True)
    leaves = [logits.clone().requires_grad_(), logits.to(variant.dtype).requires_grad_()]
    outputs = trl_utils.selective_log_softmax(leaves[0], targets), trl_utils.entropy_from_logits(leaves[0])
    me = trainer(loss_type, level, case, outputs)
    with float64_numbers():
        exact = grpo_trainer.GRPOTrainer._compute_loss(me, None, trl_inputs(batch, case))
    call = our_call(loss_type, level, case, batch)
    given = {k: v.to(variant.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    del given["logps"], given["entropy"]
    got = gk.grpo_loss(leaves[1], targets, **given, backend=variant.backend)
    exact.backward()
    got.loss.backward()
    assert_near(got.loss.detach(), exact.detach(), variant.tolerance, "loss")
    assert_near(leaves[1].grad, leaves[0].grad, variant.tolerance, "gradient")


# ---- mutations ----

WRONG = {
    "bounds_swapped": lambda call, b: call | {"config": _changed(call, eps_low=EPS_HIGH, eps_high=EPS_LOW)},
    "no_delta": lambda call, b: call | {"config": _changed(call, delta=None)},
    "kl_not_corrected": lambda call, b: call | {"config": _changed(call, kl_gradient="pathwise")},
    "kl_other_estimator": lambda call, b: call | {"config": _changed(call, kl_estimator="k2")},
    "entropy_over_all_tokens": lambda call, b: call | {"config": _changed(call, entropy_mask_bonus=False)},
    "tool_tokens_counted": lambda call, b: call | {"mask": make_batch().mask},
    "weights_dropped": lambda call, b: call | {"token_weights": None},
    "row_advantages": lambda call, b: call | {"advantages": b.advantages},
    "old_is_rollout": lambda call, b: call | {"old_logps": b.roll},
    "other_normaliser": lambda call, b: call | {"scale": 1.0},
    "per_token_gradient": lambda call, b: call | {"config": _changed(call, ratio_level="sequence_token")},
}


def _changed(call: dict[str, Any], **changes: Any) -> gk.LossConfig:
    return replace(call["config"], **changes)


@pytest.mark.parametrize(("level", "wrong"), list(itertools.product(LEVELS, WRONG)))
def test_mutations(level: str, wrong: str) -> None:
    """The comparison fails when one thing is wrong."""
    case = Case(**KLS["bias_corrected_kl"], **OPTIONS["everything"])
    batch = make_batch(level, holes=True)
    exact, call = theirs("grpo", level, case, batch), our_call("grpo", level, case, batch)
    variant = Variant("cpu", torch.float32)
    assert_same(ours(variant, **call), exact, batch.mask, variant.tolerance)
    with pytest.raises(AssertionError):
        assert_same(ours(variant, **WRONG[wrong](call, batch)), exact, call["mask"], variant.tolerance)


def test_batch_reaches_every_branch() -> None:
    batch = make_batch(holes=True)
    ratio = (batch.logps - batch.old).exp()[batch.mask > 0]
    for bound in (1 - EPS_LOW, 1 + EPS_HIGH, DELTA):
        for side in (ratio < bound, ratio > bound):
            assert (side & ((ratio - bound).abs() < 3e-4)).any()
    assert {(a > 0) - (a < 0) for a in ADVANTAGES} == {-1, 0, 1} and (batch.mask.sum(-1) == 0).any()
