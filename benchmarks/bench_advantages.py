"""Group-normalised advantages of 16,384 rewards in groups of 16; GAE over 512 sequences of 4096 tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels as gk

from . import eager
from .harness import Case, Harness

GROUP, REWARDS, SMOKE_REWARDS = 16, 16384, 64
EPS = 1e-6
VARIANTS = ("group_size", "group_ids")


def build(harness: Harness) -> Case:
    rewards = torch.randn(REWARDS if harness.full else SMOKE_REWARDS, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(len(rewards)) // GROUP
    labels = [f"prompt {i}" for i in ids.tolist()]  # verl's ids are strings

    def ours(**groups: Any) -> tuple[Tensor]:
        return (gk.group_advantages(rewards, eps=EPS, backend="cpu", **groups).advantages,)

    return Case(
        name=f"advantages {len(rewards)}",
        ours={"group_size": lambda: ours(group_size=GROUP), "group_ids": lambda: ours(group_ids=ids)},
        eager=lambda: (eager.advantages_by_loop(rewards, labels, EPS),),
        unit=("vectorised", lambda: eager.advantages_vectorised(rewards, GROUP, EPS)),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def bench_advantages(benchmark: Any, harness: Harness, variant: str) -> None:
    harness.run(benchmark, "advantages", variant, lambda: build(harness))


SEQUENCES, TOKENS, SMOKE_TOKENS = 512, 4096, 16
GAMMA, LAM = 0.99, 0.95


def build_gae(harness: Harness) -> Case:
    shape = (SEQUENCES, TOKENS) if harness.full else (8, SMOKE_TOKENS)
    g = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(shape, generator=g) for _ in range(2))
    mask = torch.arange(shape[1]) < torch.randint(1, shape[1] + 1, (shape[0], 1), generator=g)
    return Case(
        name=f"gae {list(shape)}",
        ours={"cpu": lambda: tuple(gk.gae(rewards, values, mask, gamma=GAMMA, lam=LAM, backend="cpu"))},
        eager=lambda: eager.gae_by_loop(rewards, values, mask, GAMMA, LAM),
        unit=("copy", rewards.clone),
        tolerance=1e-4,
        rounds={"eager": 3, "ours": 15},
    )


def bench_gae(benchmark: Any, harness: Harness) -> None:
    harness.run(benchmark, "gae", "cpu", lambda: build_gae(harness))
