"""TRL's advantages: the lines of _generate_and_score_completions, run from its source in float64."""

from __future__ import annotations

import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch
from oracle_cases import assert_near
from oracle_cases import one_thread as one_thread
from torch import Tensor

import grpo_kernels as gk

grpo_trainer = pytest.importorskip(
    "trl.trainer.grpo_trainer", reason="the oracle is TRL itself: pip install trl==1.16.0"
)
rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer")

NAN = float("nan")
REWARDS = torch.tensor([
    [1.0, 0.0, 0.5, 0.25], [2.0, 2.0, 2.0, 2.0], [0.1, 0.1, 0.1, 0.1], [NAN, 1.0, -3.0, 0.0],
    [NAN, NAN, 1.0, NAN], [NAN] * 4, [1e3 + 1, 1e3, 1e3, 1e3 - 1],
]).double().flatten()  # fmt: skip
BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float32, torch.float64]


def several(seed: int = 4) -> Tensor:
    """[S, 3]: some components are missing, one sample has none, and one component has constant groups."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(28, 3, generator=g).round(decimals=2)
    rewards[::5, 1] = NAN
    rewards[:4, 2], rewards[8:12, 0], rewards[3] = 0.3, -1.7, NAN
    rewards[20:24] = NAN
    return rewards.float().double()


def in_float64(block: str, names: dict) -> None:
    """nanstd divides integers, whose quotient has the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        exec(textwrap.dedent(block), names)
    finally:
        torch.set_default_dtype(before)


def trl_advantages(rewards: Tensor, weights: list[float], group_size: int, scale: str, aggregation: str) -> Tensor:
    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    begin, end = source.index("        unscorable_mask = torch.isnan("), "torch.nan_to_num(advantages, nan=0.0)"
    me = SimpleNamespace(
        multi_objective_aggregation=aggregation, reward_weights=torch.tensor(weights, dtype=torch.float64),
        scale_rewards=scale, reward_funcs=weights,
    )  # fmt: skip
    names = vars(grpo_trainer) | {
        "self": me,
        "rewards_per_func": rewards,
        "num_generations": group_size,
        "device": "cpu",
    }
    in_float64(source[begin : source.index(end) + len(end)], names)
    advantages = names["advantages"]
    advantages[advantages.abs() < 1e-11] = 0  # a constant group's rounding error over 1e-4; ours is exactly 0
    return advantages


def tolerance(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group_size", [4, 2, 14])
def test_one_reward(group_size: int, scale: str, backend: str, dtype: torch.dtype) -> None:
    exact = trl_advantages(REWARDS[:, None], [1.0], group_size, scale, "sum_then_normalize")
    got = gk.group_advantages(REWARDS.to(dtype), group_size=group_size, scale=scale, backend=backend).advantages
    assert_near(got, exact, tolerance(dtype), "advantages")
    order = torch.randperm(len(REWARDS), generator=torch.Generator().manual_seed(1))
    ids = 7 - 3 * (order // group_size)
    got = gk.group_advantages(REWARDS[order].to(dtype), group_ids=ids, scale=scale, backend=backend).advantages
    assert_near(got, exact[order], tolerance(dtype), "advantages by group ids")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 0.25, -0.5], [1.0, 0.0, 0.0]], ids=str)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group_size", [4, 14])
def test_sum_then_normalize(
    group_size: int, scale: str, weights: list[float], backend: str, dtype: torch.dtype
) -> None:
    rewards = several()
    exact = trl_advantages(rewards, weights, group_size, scale, "sum_then_normalize")
    got = gk.group_advantages(
        rewards.to(dtype), reward_weights=weights, group_size=group_size, scale=scale, backend=backend
    ).advantages
    assert_near(got, exact, tolerance(dtype), "advantages")
    assert not got[3] and not got[20:24].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 0.25, -0.5]], ids=str)
@pytest.mark.parametrize("group_size", [4, 14])
def test_normalize_then_sum(group_size: int, weights: list[float], backend: str, dtype: torch.dtype) -> None:
    rewards = several()
    exact = trl_advantages(rewards, weights, group_size, "group", "normalize_then_sum")
    got = gk.gdpo_advantages(
        rewards.to(dtype), reward_weights=torch.tensor(weights), group_size=group_size, backend=backend
    )
    assert_near(got.advantages, exact, tolerance(dtype), "advantages")
    if group_size == 4:
        assert not got.informative[20:24].any() and got.informative[:20].all()


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rloo(backend: str, normalise: bool) -> None:
    """RLOO's leave-one-out baseline, from its source."""
    source = inspect.getsource(rloo_trainer.RLOOTrainer._generate_and_score_completions)
    begin, end = "        grouped_rewards = rewards.view(", "advantages = torch.nan_to_num(advantages, nan=0.0)"
    block = source[source.index(begin) : source.index(end) + len(end)]
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(2)).double()
    rewards[::5] = NAN
    me = SimpleNamespace(num_generations=4, normalize_advantages=normalise)
    names = vars(rloo_trainer) | {"self": me, "rewards": rewards, "num_generations": 4, "device": "cpu"}
    in_float64(block, names)
    got = gk.group_advantages(rewards, group_size=4, baseline="leave_one_out", scale="none", backend=backend)
    advantages = got.advantages
    if normalise:
        advantages = gk.whiten(advantages, ~rewards.isnan(), eps=1e-4, eps_mode="std", backend=backend)
    assert_near(advantages, names["advantages"], 1e-9, "advantages")


def test_mutations() -> None:
    rewards, weights = several(), [2.0, 0.25, -0.5]
    exact = trl_advantages(rewards, weights, 4, "group", "sum_then_normalize")
    wrong = [
        {"reward_weights": [1.0, 0.25, -0.5]}, {"reward_weights": weights, "ddof": 0},
        {"reward_weights": weights, "eps": 1e-6}, {"reward_weights": weights, "scale": "batch"},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(AssertionError):
            got = gk.group_advantages(rewards, group_size=4, **options)
            assert_near(got.advantages, exact, 1e-6, "wrong")
    both = trl_advantages(rewards, weights, 4, "group", "normalize_then_sum")
    with pytest.raises(AssertionError):
        got = gk.gdpo_advantages(rewards, reward_weights=weights, group_size=4, batch_eps_mode="variance")
        assert_near(got.advantages, both, 1e-6, "wrong")
