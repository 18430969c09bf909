"""Rollout correction against the rules of OpenRLHF, slime, NeMo-RL and prime-rl, written with Python lists."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from correction_oracles import VARIANTS, Batch, assert_matches, mismatch, ours
from oracle_cases import assert_near
from oracle_cases import one_thread as one_thread
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.correction.config import CORRECTION_PRESETS


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
    """`rule` maps a Row to each token's weight and whether it stays in the mask."""
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
    """slime's helper: ratios with d clamped to +-20; rejected tokens and rows with a token below 1e-4 are masked."""

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


FORMULAS = {
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
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str, far: bool) -> None:
    b = mismatch(far=far, spread=1.5 if name == "nemo_logprob_error" else 0.3)
    weights, mask = row_by_row(b, FORMULAS[name])
    config = gk.CorrectionConfig.preset(name)
    given = {"logps": b.logps, "advantages": b.advantages} if config.opsm_delta is not None else {}
    rejected = (mask == 0) & (b.mask > 0)
    assert rejected.any() == config.renormalise and weights.any() and not torch.equal(weights, b.mask.double())
    assert_matches(
        b,
        config,
        weights,
        mask,
        {"rejected_tokens": float(rejected.sum() / b.mask.sum())} if rejected.any() else {},
        **given,
    )


def test_every_preset_is_compared() -> None:
    names = {name for name in CORRECTION_PRESETS if not name.startswith(("verl_", "trl_"))}
    assert names == set(FORMULAS)


@pytest.mark.parametrize("level", ["sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "clip", "mask"])
def test_slime_mis_of_rows(level: str, mode: str) -> None:
    """mis_level sequence and geometric: one ratio per row."""

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
    """sequence_level_importance_ratios: one weight per row, the product of its tokens' ratios."""
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
    """|p_old - p_roll|, which OpenRLHF's tv gating and prime-rl's ipo compare with a bound at the old log-probs."""
    rule = lambda row: always(  # noqa: E731
        [float(abs(math.exp(o) - math.exp(r)) <= 0.05) for o, r in zip(row.old, row.roll, strict=True)]
    )
    b = mismatch()
    assert_matches(
        b, gk.CorrectionConfig(filters=(gk.RejectionFilter("tv", "token", high=0.05),)), row_by_row(b, rule)[0], b.mask
    )
