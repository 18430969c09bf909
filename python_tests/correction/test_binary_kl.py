"""The binary KL filter: OpenRLHF's gate, from its definition, and the properties of a divergence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kernels.correction.config import CorrectionConfig, RejectionFilter
from grpo_kernels.correction.rollout import rollout_correction


def expected(old: float, rollout: float) -> float:
    p, q = (min(max(math.exp(x), 1e-6), 1 - 1e-6) for x in (rollout, old))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def kept(old: list[float], rollout: list[float], high: float, reduction: str = "token") -> list[bool]:
    config = CorrectionConfig(filters=(RejectionFilter("binary_kl", reduction, high=high),))
    found = rollout_correction(
        torch.tensor([old], dtype=torch.float64), torch.tensor([rollout], dtype=torch.float64), config=config
    )
    return (found.token_weights[0] > 0).tolist()


LOGP = st.floats(-40, 0)


@settings(deadline=None, max_examples=60)
@given(LOGP, LOGP)
def test_value_of_a_token(old: float, rollout: float) -> None:
    """Kept just above its divergence, rejected just below, and never negative."""
    value = expected(old, rollout)
    assert value >= -1e-12
    margin = 1e-9 * (1 + value)
    assert kept([old], [rollout], max(value, 0) + margin) == [True]
    if value > 2 * margin:
        assert kept([old], [rollout], value - margin) == [False]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(LOGP, LOGP), min_size=2, max_size=6))
def test_mean_of_a_row(tokens: list[tuple[float, float]]) -> None:
    old, rollout = map(list, zip(*tokens, strict=True))
    mean = sum(map(expected, old, rollout)) / len(tokens)
    margin = 1e-9 * (1 + mean)
    assert all(kept(old, rollout, max(mean, 0) + margin, "mean"))
    if mean > 2 * margin:
        assert not any(kept(old, rollout, mean - margin, "mean"))


@pytest.mark.parametrize(("nan", "stays"), [("ignore", True), ("reject", False)])
def test_a_missing_logp(nan: str, stays: bool) -> None:
    config = CorrectionConfig(filters=(RejectionFilter("binary_kl", "token", high=0.1),), nan=nan)
    old, rollout = torch.tensor([[-1.0, -1.0]]), torch.tensor([[float("nan"), -1.0]])
    assert (rollout_correction(old, rollout, config=config).token_weights > 0).tolist() == [[stays, True]]
