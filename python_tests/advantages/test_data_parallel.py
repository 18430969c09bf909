"""Two processes that each hold part of a batch compute together what one process computes from all of it."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import grpo_kernels as gk
from grpo_kernels.inputs.grouping import BASELINES, SCALES

RANKS = 2
SPLIT = 7  # samples on the first rank, of 19: groups straddle the ranks
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def batch() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(19, 2, generator=g, dtype=torch.float64)
    rewards[4, 0] = rewards[11] = float("nan")
    return {
        "rewards": rewards, "ids": torch.randint(-2, 3, (19,), generator=g) * 2**50,
        "valid": torch.rand(19, generator=g) > 0.2, "lengths": torch.randint(1, 9, (19,), generator=g),
        "critic": torch.randn(19, generator=g), "mask": torch.rand(19, 5, generator=g) > 0.3,
        "values": torch.randn(19, 5, generator=g, dtype=torch.float64),
    }  # fmt: skip


def everything(part: slice, group: Any) -> list[torch.Tensor]:
    b = {name: x[part] for name, x in batch().items()}
    one, ids = b["rewards"][:, 1], b["ids"]
    results = []
    for baseline in BASELINES:
        for scale in SCALES:
            lengths = b["lengths"] if baseline == "length_weighted" else None
            results += gk.group_advantages(
                b["rewards"], group_ids=ids, baseline=baseline, scale=scale, lengths=lengths, valid=b["valid"],
                critic_values=b["critic"], critic_weight=0.4, reward_weights=[1.0, 0.5], dp_group=group,
            )  # fmt: skip
    results += gk.pass_at_k_advantages(one, group_ids=ids, valid=b["valid"], dp_group=group)
    results += gk.gpg_advantages(one, group_ids=ids, dp_group=group)
    results += gk.gdpo_advantages(b["rewards"], group_ids=ids, lengths=b["lengths"], dp_group=group)
    results += gk.reinforce_plus_plus(b["values"], b["mask"], dp_group=group)
    results += gk.reinforce_plus_plus_baseline(one.nan_to_num(0.0), b["mask"], group_ids=ids, dp_group=group)
    results.append(gk.whiten(b["values"], b["mask"], dp_group=group))
    constant = torch.full_like(b["values"], 0.1)
    assert not gk.whiten(constant, b["mask"], dp_group=group).any()
    return results


def consecutive(part: slice, group: Any) -> list[torch.Tensor]:
    """18 samples in groups of 6, 7 of the samples on the first rank: consecutive groups straddle the ranks too."""
    rewards = batch()["values"][:18, 0][part]
    return [*gk.group_advantages(rewards, group_size=6, scale="batch", dp_group=group)]


def worker(rank: int, store: str, folder: str) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
        part = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
        result: Any = [everything(part, dist.group.WORLD), consecutive(part, dist.group.WORLD)]
        with pytest.raises(ValueError, match="divide the 19"):
            gk.group_advantages(batch()["values"][:, 0][part], group_size=7, dp_group=dist.group.WORLD)
        dist.destroy_process_group()
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, (str(folder / "store"), str(folder)), nprocs=RANKS, start_method="spawn")
    results = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    for result in results:
        assert not isinstance(result, str), result
    return results


@pytest.mark.parametrize("which", [0, 1], ids=["ids", "size"])
def test_ranks_together_are_one(by_rank: list[Any], which: int) -> None:
    alone = (everything, consecutive)[which](slice(None), None)
    for parts, expected in zip(zip(*(result[which] for result in by_rank), strict=True), alone, strict=True):
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.cat([result[0][0] for result in by_rank]), everything(slice(None), None)[0])
