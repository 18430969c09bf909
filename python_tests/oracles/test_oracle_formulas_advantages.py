"""Advantages of papers, and of trainers that are not installed: their formulas in float64, sample by sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle_cases import assert_near
from oracle_cases import one_thread as one_thread
from torch import Tensor

import grpo_kernels as gk

BACKENDS = ["cpu", "reference"]
IDS = torch.tensor([4, 9, 4, 4, 1, 9, 4, 9, 1, 9, 9, 3, 8, 8, 8])  # a group of one, and a constant one: 8
G = torch.Generator().manual_seed(0)
R = torch.randn(len(IDS), generator=G).double().round(decimals=3)
R[IDS == 8] = 0.7
R[0], R[2] = 1.0, 1.0  # equal rewards in a group
LENGTHS = torch.randint(1, 300, (len(IDS),), generator=G)
V = torch.randn(len(IDS), generator=G).double()


def groups() -> list[list[int]]:
    return [[j for j in range(len(IDS)) if IDS[j] == i] for i in IDS.unique()]


def by_group(advantage: Any) -> Tensor:
    """advantage(rewards of the group, position in it, sample) for every sample."""
    out = torch.zeros(len(IDS), dtype=torch.float64)
    for members in groups():
        for k, j in enumerate(members):
            out[j] = advantage([float(R[m]) for m in members], k, j)
    return out


def mean(x: list[float]) -> float:
    return math.fsum(x) / len(x)


def std(x: list[float], ddof: int = 1) -> float:
    m = mean(x)
    return math.sqrt(math.fsum((v - m) ** 2 for v in x) / (len(x) - ddof)) if len(x) > ddof else 0.0


def others(x: list[float], k: int) -> list[float]:
    return x[:k] + x[k + 1 :]


def nemo(x: list[float], k: int, _: int) -> float:
    """Mean and std of the others; divided only where the std is above 0; a single valid sample is its own baseline."""
    if len(x) == 1:
        return 0.0
    a, s = x[k] - mean(others(x, k)), std(others(x, k))
    return a / (s + 1e-6) if s > 1e-12 else a


def opo(x: list[float], k: int, j: int) -> float:
    weights = [float(LENGTHS[m]) for m in range(len(IDS)) if IDS[m] == IDS[j]]
    return x[k] - math.fsum(w * v for w, v in zip(weights, x, strict=True)) / math.fsum(weights)


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "nemo_leave_one_out": (nemo, {"baseline": "leave_one_out", "scale": "leave_one_out", "eps": 1e-6}),
    "nemo_mean": (
        lambda x, k, _: (x[k] - mean(x)) / (std(x) + 1e-6) if std(x) > 1e-12 else 0.0, {"eps": 1e-6},
    ),
    "openrlhf_group_norm": (lambda x, k, _: (x[k] - mean(x)) / (std(x) + 1e-9), {"eps": 1e-9}),
    "openrlhf_rloo": (
        lambda x, k, _: x[k] - (sum(x) - x[k]) / (len(x) - 1) if len(x) > 1 else 0.0,
        {"baseline": "leave_one_out", "scale": "none"},
    ),
    "openrlhf_dr_grpo": (lambda x, k, _: x[k] - mean(x), {"scale": "none"}),
    "slime_grpo": (lambda x, k, _: (x[k] - mean(x)) / (std(x) + 1e-6), {"eps": 1e-6}),
    "trl_async": (lambda x, k, _: (x[k] - mean(x)) / (std(x, 0) + 1e-8), {"eps": 1e-8, "ddof": 0}),
    "prime_grpo": (lambda x, k, _: x[k] - mean(x), {"scale": "none"}),
    "prime_max_rl": (
        lambda x, k, _: (x[k] - mean(x)) / mean(x) if mean(x) > 0 else 0.0, {"scale": "mean"},
    ),
    "opo": (opo, {"baseline": "length_weighted", "scale": "none", "lengths": LENGTHS}),
    "opo_scaled": (
        lambda x, k, j: opo(x, k, j) / (std(x) + 1e-4) if len(x) > 1 else 0.0,
        {"baseline": "length_weighted", "lengths": LENGTHS},
    ),
    "raw_rewards": (lambda x, k, _: x[k], {"baseline": "none", "scale": "none", "single": "raw"}),
    "nemo_clip": (
        lambda x, k, _: min(max((x[k] - mean(x)) / (std(x) + 1e-4), -0.3), 0.8), {"clip": (-0.3, 0.8)},
    ),
    "nemo_clip_low": (lambda x, k, _: max(x[k] - mean(x), -0.3), {"clip": (-0.3, None), "scale": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMS)
def test_group_advantages(name: str, backend: str, dtype: torch.dtype) -> None:
    formula, options = FORMS[name]
    got = gk.group_advantages(R.to(dtype), group_ids=IDS, backend=backend, **options)
    exact = by_group(formula)
    exact[exact.abs() < 1e-6] = 0
    assert_near(got.advantages, exact, 1e-5 if dtype == torch.float32 else 1e-9, name)
    assert torch.equal(got.informative, torch.tensor([int(i) in (4, 9, 1) for i in IDS]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", [0.25, 1.0])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_critic(scale: str, weight: float, backend: str) -> None:
    """Baseline (1 - w) mean + w V; a scale of 0 does not divide; NaN rewards are ignored."""
    values = V.clone()
    values[1] = math.nan
    batch = std(R.tolist())

    def formula(x: list[float], k: int, j: int) -> float:
        own = 0.0 if math.isnan(values[j]) else weight
        a = x[k] - ((1 - own) * mean(x) + own * (float(values[j]) if own else 0.0))
        s = {"none": 0.0, "group": std(x) if len(set(x)) > 1 else 0.0, "batch": batch}[scale]
        return a / (s + 1e-4) if s else a

    got = gk.group_advantages(
        R, group_ids=IDS, scale=scale, critic_values=values, critic_weight=weight, backend=backend
    )
    assert_near(got.advantages, by_group(formula), 1e-9, "advantages")
    assert got.informative.all()  # the constant group and the lone sample too, by their critic
    same = gk.group_advantages(R, group_ids=IDS, scale=scale, critic_values=R, critic_weight=1.0, backend=backend)
    assert not same.advantages.any() and torch.equal(same.informative, torch.isin(IDS, torch.tensor([4, 9, 1])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nemo_gdpo(backend: str) -> None:
    """Each component leave-one-out, the weighted sum, then (A - mean) / std without eps."""
    second = V
    total = torch.zeros(len(IDS), dtype=torch.float64)
    for weight, rewards in ((1.0, R), (0.5, second)):
        for members in groups():
            x = [float(rewards[m]) for m in members]
            for k, j in enumerate(members):
                total[j] += weight * nemo(x, k, j)
    exact = (total - total.mean()) / total.std()
    got = gk.gdpo_advantages(
        torch.stack([R, second], 1), group_ids=IDS, reward_weights=[1.0, 0.5], baseline="leave_one_out",
        scale="leave_one_out", eps=1e-6, batch_eps=0.0, backend=backend,
    )  # fmt: skip
    assert_near(got.advantages, exact, 1e-9, "advantages")
    equal = gk.gdpo_advantages(torch.full((4, 2), 0.1), group_size=2, batch_eps=0.0, backend=backend)
    assert not equal.advantages.any()


# ---- token by token ----

MASK = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1], [0] * 6])
TOKENS = torch.randn(3, 4, 6, generator=G).double()


def rows(tokens: Tensor) -> list[list[float]]:
    """The active tokens of each row."""
    return [[float(v) for v, m in zip(row, mask, strict=True) if m] for row, mask in zip(tokens, MASK, strict=True)]


def spread(active: list[list[float]]) -> Tensor:
    return torch.zeros(MASK.shape, dtype=torch.float64).masked_scatter(
        MASK != 0, torch.tensor([v for row in active for v in row], dtype=torch.float64)
    )


def returns_of(rewards: list[float], gamma: float) -> list[float]:
    return [math.fsum(gamma ** (j - i) * r for j, r in enumerate(rewards) if j >= i) for i in range(len(rewards))]


def whitened(active: list[list[float]], ddof: int, floor: bool) -> Tensor:
    flat = [v for row in active for v in row]
    m, variance = mean(flat), std(flat, ddof) ** 2
    scale = math.sqrt(max(variance, 1e-8) if floor else variance + 1e-8)
    return spread([[(v - m) / scale for v in row] for row in active])


TRAINERS = {"openrlhf": (0, "floor"), "slime": (1, "variance")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_reinforce_plus_plus_with_kl(trainer: str, backend: str) -> None:
    """The reward on the last token, minus kl_coef KL on each; returns; whitening."""
    ddof, eps_mode = TRAINERS[trainer]
    outcome, kl = torch.tensor([1.0, -0.5, 0.25, 9.0]).double(), TOKENS[0]
    shaped = [[-0.1 * v for v in row] for row in rows(kl)]
    for row, r in zip(shaped, outcome.tolist(), strict=True):
        if row:
            row[-1] += r
    returns = [returns_of(row, 0.9) for row in shaped]
    got = gk.reinforce_plus_plus(
        outcome, MASK, gamma=0.9, kl=kl, kl_coef=0.1, ddof=ddof, eps_mode=eps_mode, backend=backend
    )
    assert_near(got.returns, spread(returns), 1e-9, "returns")
    assert_near(got.advantages, whitened(returns, ddof, eps_mode == "floor"), 1e-9, "advantages")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_reinforce_plus_plus_baseline_with_kl(trainer: str, backend: str) -> None:
    """(R - mean) - kl_coef KL at every token; NeMo-RL as OpenRLHF whitens."""
    ddof, eps_mode = TRAINERS[trainer]
    outcome = torch.tensor([1.0, -0.5, 0.25, 9.0]).double()
    shaped = [
        [r - m - 0.1 * v for v in row]
        for row, r, m in zip(rows(TOKENS[0]), outcome.tolist(), [0.25, 0.25, 4.625, 4.625], strict=True)
    ]
    got = gk.reinforce_plus_plus_baseline(
        outcome, MASK, group_size=2, kl=TOKENS[0], kl_coef=0.1, ddof=ddof, eps_mode=eps_mode, backend=backend
    )
    assert_near(got.returns, spread(shaped), 1e-9, "before whitening")
    assert_near(got.advantages, whitened(shaped, ddof, eps_mode == "floor"), 1e-9, "advantages")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_is_the_sum_of_discounted_errors(backend: str) -> None:
    gamma, lam = 0.9, 0.8
    exact = []
    for r, v in zip(rows(TOKENS[0]), rows(TOKENS[1]), strict=True):
        delta = [r[i] + gamma * (v[i + 1] if i + 1 < len(v) else 0.0) - v[i] for i in range(len(r))]
        exact.append(returns_of(delta, gamma * lam))
    got = gk.gae(TOKENS[0], TOKENS[1], MASK, gamma=gamma, lam=lam, backend=backend)
    assert_near(got.advantages, spread(exact), 1e-9, "advantages")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["group", "none"])
def test_process_supervision(scale: str, backend: str, dtype: torch.dtype) -> None:
    """DeepSeekMath: steps standardised over the group, each token takes what ends at it or later."""
    ends = torch.tensor([[1, 3, 4], [0, 0, 0], [2, 5, 5], [5, 0, 0]])
    steps = torch.tensor([[0.5, 1.0, -1.0], [0.25, math.nan, math.nan], [2.0, 0.0, 1.0], [math.nan] * 3])
    ends[steps.isnan()] = 77  # not read
    exact = torch.zeros(MASK.shape, dtype=torch.float64)
    for members in ([0, 1], [2, 3]):
        r = [float(v) for m in members for v in steps[m] if v == v]
        s = std(r) + 1e-4 if scale == "group" else 1.0
        for m in members:
            for t in range(MASK.shape[1]):
                later = [(float(v) - mean(r)) / s for v, e in zip(steps[m], ends[m], strict=True) if v == v and e >= t]
                exact[m, t] = math.fsum(later) * int(MASK[m, t])
    for choice in ({"group_size": 2}, {"group_ids": torch.tensor([5, 5, -1, -1])}):
        got = gk.process_advantages(steps.to(dtype), ends, MASK, scale=scale, backend=backend, **choice)
        assert got.dtype == dtype
        assert_near(got, exact, 1e-6 if dtype == torch.float32 else 1e-9, "advantages")
    invalid = gk.process_advantages(
        steps.nan_to_num(3.0), ends, MASK, group_size=2, scale=scale, valid=~steps.isnan(), backend=backend
    )
    assert_near(invalid, exact, 1e-6, "valid instead of NaN")


def test_whitening_of_the_trainers() -> None:
    flat = rows(TOKENS[0])
    for ddof, eps_mode in TRAINERS.values():
        got = gk.whiten(TOKENS[0], MASK, ddof=ddof, eps_mode=eps_mode)
        assert_near(got, whitened(flat, ddof, eps_mode == "floor"), 1e-9, eps_mode)
    m = mean([v for row in flat for v in row])
    no_std = gk.whiten(TOKENS[0], MASK, divide=False)  # OpenRLHF's no_std_norm
    assert_near(no_std, spread([[v - m for v in row] for row in flat]), 1e-9, "mean only")
