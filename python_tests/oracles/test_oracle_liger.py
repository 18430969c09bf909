"""Liger's chunked loss over hidden states, run as it is, decides what linear_grpo_loss computes: value and gradients.

Liger computes its log-probs in float32 whatever it is given, so ours is held to float32's tolerance in both dtypes.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from oracle_cases import DELTA, EPS_HIGH, EPS_LOW, PADDED, Variant, assert_near, make_batch, poisoned
from oracle_cases import one_thread as one_thread
from torch import Tensor

import grpo_kernels as gk

REASON = "the oracle is Liger itself: pip install liger-kernel==0.8.5"
liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason=REASON)

HIDDEN, VOCAB, TOLERANCE = 24, 97, 2e-5
MAX_LENGTH, ITEMS, BETA = 512, 75, 0.3
CLIP = {"epsilon_low": EPS_LOW, "epsilon_high": EPS_HIGH}
CISPO_CAP = 1.1  # Liger reads epsilon_high as the cap itself
OUR_CLIP = {"eps_low": EPS_LOW, "eps_high": EPS_HIGH}


class Loss(NamedTuple):
    """One of Liger's losses and the same as ours. A loss with other options than the clip's has them in its own row."""

    preset: str
    type: str
    level: str = "token"
    liger: dict[str, Any] = CLIP
    ours: dict[str, Any] = OUR_CLIP


LOSSES = {
    **{f"{t}_{level}": Loss(f"trl_{t}", t, level) for t in ("grpo", "bnpo", "dapo") for level in ("token", "sequence")},
    "dr_grpo_token": Loss("trl_dr_grpo", "dr_grpo", "token", CLIP | {"max_completion_length": MAX_LENGTH}),
    "dr_grpo_sequence": Loss("trl_dr_grpo", "dr_grpo", "sequence", CLIP | {"max_completion_length": MAX_LENGTH}),
    "gspo": Loss("trl_gspo", "grpo", "sequence"),
    "luspo": Loss("trl_luspo", "luspo", "sequence"),
    "cispo": Loss("trl_cispo", "cispo", liger={"epsilon_high": CISPO_CAP}, ours={"cispo_high": CISPO_CAP}),
    "sapo": Loss("trl_sapo", "sapo", liger={}, ours={}),
    "vespo": Loss("trl_vespo", "vespo", liger={}, ours={}),
}
UNCLIPPED = (
    "cispo",
    "sapo",
    "vespo",
)  # no delta; in vespo a weight per row would enter once per token, so it is not compared
# Liger's luspo takes the mean of per-token terms over masked positions too; only a term per sequence is luspo's.
PER_TOKEN_TERMS = ("kl", "bias_corrected_kl", "token_weights")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "on_policy": {"on_policy": True},
    "delta": {"delta": DELTA},
    "holes": {"holes": True},
    "token_weights": {"weights": "token"},
    "row_weights": {"weights": "row"},
    "temperature": {"temperature": 0.7},
    "items": {"items": ITEMS},
    "chunks_of_4": {"chunk_size": 4, "delta": DELTA, "holes": True, "weights": "row", "temperature": 1.3},
}
KLS: dict[str, dict[str, Any]] = {"no_kl": {}, "kl": {"beta": BETA}, "bias_corrected_kl": {"beta": BETA, "bias": True}}
CASES = [
    (loss, kl, option)
    for loss, kl, option in itertools.product(LOSSES, KLS, OPTIONS)
    if not (loss == "luspo" and {kl, option} & {*PER_TOKEN_TERMS})
    and ("items" not in OPTIONS[option] or LOSSES[loss].type in ("dapo", "cispo", "vespo"))
    and not (loss in UNCLIPPED and "delta" in OPTIONS[option])
    and not (loss == "vespo" and OPTIONS[option].get("weights"))
]


class Inputs(NamedTuple):
    """Values in float64 that are exact in float32; the log-ratios approach the bounds, as in the oracle batch."""

    parameters: tuple[Tensor, Tensor, Tensor]  # hidden, weight, bias
    targets: Tensor
    mask: Tensor
    advantages: Tensor
    old: Tensor
    ref: Tensor
    weights: dict[str | None, Tensor | None]


class Outcome(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]
    metrics: list[Tensor] | dict[str, Tensor]


def make_inputs(level: str, case: dict[str, Any]) -> Inputs:
    batch, g = make_batch(level, holes=bool(case.get("holes"))), torch.Generator().manual_seed(3)
    shapes = (*batch.mask.shape, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)
    hidden, weight, bias = (torch.randn(shape, generator=g).double() for shape in shapes)
    weight = (weight * 0.3).float().double()
    targets = torch.randint(VOCAB, batch.mask.shape, generator=g)
    logits = (hidden @ weight.T + bias) / case.get("temperature", 1.0)
    logps = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    old, ref = (logps + moved - batch.logps for moved in (batch.old, batch.ref))
    weights = {None: None, "token": batch.token_weights, "row": batch.row_weights}
    return Inputs((hidden, weight, bias), targets, batch.mask, batch.advantages, old, ref, weights)


def leaves_of(inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype, copy=True).requires_grad_() for x in inputs.parameters]


def theirs(loss: Loss, case: dict[str, Any], inputs: Inputs) -> Outcome:
    fused = liger.LigerFusedLinearGRPOLoss(
        beta=case.get("beta", 0.0), compiled=False, use_ref_model="beta" in case, loss_type=loss.type,
        chunk_size=case.get("chunk_size", 1), importance_sampling_level=loss.level,
        temperature=case.get("temperature", 1.0), delta=case.get("delta"),
        use_bias_correction_kl=case.get("bias", False), **loss.liger,
    )  # fmt: skip
    hidden, weight, bias = leaves = leaves_of(inputs, torch.float64)
    value, metrics = fused(
        hidden, weight, inputs.targets, inputs.mask, inputs.advantages, bias,
        ref_per_token_logps=inputs.ref if "beta" in case else None,
        old_per_token_logps=None if case.get("on_policy") else inputs.old,
        vllm_is_ratio=inputs.weights[case.get("weights")], num_items_in_batch=case.get("items"),
    )  # fmt: skip
    value.backward()
    return Outcome(value.detach(), tuple(x.grad for x in leaves), list(metrics))


def our_config(loss: Loss, case: dict[str, Any]) -> gk.LossConfig:
    changes = loss.ours | {"ratio_level": loss.level} | ({"delta": case["delta"]} if "delta" in case else {})
    if "beta" in case:
        changes |= {"kl_coef": BETA, "kl_gradient": "importance_weighted" if case.get("bias") else "pathwise"}
    return gk.LossConfig.preset(loss.preset, **changes)


def ours(config: gk.LossConfig, case: dict[str, Any], inputs: Inputs, variant: Variant) -> Outcome:
    """Masked values are replaced by NaN first, except in the parameters."""

    def given(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return (poisoned(values, inputs.mask) if values.shape == inputs.mask.shape else values).to(variant.dtype)

    hidden, weight, bias = leaves = leaves_of(inputs, variant.dtype)
    out = gk.linear_grpo_loss(
        hidden, weight, inputs.targets, given(inputs.advantages), inputs.mask, bias=bias, config=config,
        old_logps=None if case.get("on_policy") else given(inputs.old),
        ref_logps=given(inputs.ref) if "beta" in case else None,
        token_weights=given(inputs.weights[case.get("weights")]), temperature=case.get("temperature", 1.0),
        denominator=case.get("items"), chunk_rows=37 if "chunk_size" in case else None, backend=variant.backend,
    )  # fmt: skip
    out.loss.backward()
    return Outcome(out.loss.detach(), tuple(x.grad for x in leaves), out.metrics)


def assert_same(got: Outcome, exact: Outcome, what: str) -> None:
    assert_near(got.loss, exact.loss, TOLERANCE, f"{what} loss")
    for name, mine, value in zip(("hidden", "weight", "bias"), got.gradients, exact.gradients, strict=True):
        assert_near(mine, value, TOLERANCE, f"{what} gradient of {name}")
    names = ["kl", "clip_region"][-len(exact.metrics) :]  # Liger's, in its order
    for name, value in zip(names, exact.metrics, strict=True):
        assert_near(got.metrics[name].reshape(1), value.reshape(1), TOLERANCE, f"{what} {name}")


@pytest.mark.parametrize(("loss", "kl", "option"), CASES)
def test_loss(loss: str, kl: str, option: str) -> None:
    row, case = LOSSES[loss], KLS[kl] | OPTIONS[option]
    inputs = make_inputs(row.level, case)
    exact, config = theirs(row, case, inputs), our_config(row, case)
    for variant in PADDED:
        assert_same(ours(config, case, inputs, variant), exact, str(variant))


WRONG: dict[str, dict[str, Any]] = {
    "bounds_swapped": {"eps_low": EPS_HIGH, "eps_high": EPS_LOW},
    "no_delta": {"delta": None},
    "kl_not_corrected": {"kl_gradient": "pathwise"},
    "kl_other_estimator": {"kl_estimator": "k2"},
    "other_aggregation": {"aggregation": "sequence_sum"},
    "per_token_gradient": {"ratio_level": "sequence_token"},
}


@pytest.mark.parametrize(("level", "wrong"), list(itertools.product(("token", "sequence"), WRONG)))
def test_mutations(level: str, wrong: str) -> None:
    """The comparison fails when one thing is wrong."""
    row, case = LOSSES[f"grpo_{level}"], KLS["bias_corrected_kl"] | OPTIONS["chunks_of_4"] | OPTIONS["token_weights"]
    inputs, variant = make_inputs(level, case), Variant("cpu", torch.float32)
    exact, config = theirs(row, case, inputs), our_config(row, case)
    assert_same(ours(config, case, inputs, variant), exact, "right")
    with pytest.raises(AssertionError):
        assert_same(ours(replace(config, **WRONG[wrong]), case, inputs, variant), exact, wrong)
