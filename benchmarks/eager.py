"""Near-duplicates in plain Python and PyTorch, as baselines. The losses' baselines are providers of the library."""

from __future__ import annotations

import torch
from torch import Tensor


def diversity_by_sets(ids: Tensor, group_size: int, ngram: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Near-duplicates group by group: compares every completion's set of n-grams with those kept before it."""
    keep, similarity, leaders = [], [], []
    kept: list[tuple[int, set]] = []
    for i, tokens in enumerate(ids.tolist()):
        if i % group_size == 0:
            kept = []
        mine = set(zip(*(tokens[k:] for k in range(ngram)), strict=False))
        best, leader = max(((_jaccard(mine, other), -j) for j, other in kept), default=(0.0, -i))
        keep.append(not kept or best < threshold)
        similarity.append(best)
        if keep[-1]:
            kept.append((i, mine))
        leaders.append(i if keep[-1] else -leader)
    return torch.tensor(keep), torch.tensor(similarity), _cluster_weights(torch.tensor(leaders))


def _jaccard(a: set, b: set) -> float:
    both = len(a & b)
    return both / (len(a) + len(b) - both)


def _cluster_weights(leaders: Tensor) -> Tensor:
    return 1 / torch.bincount(leaders, minlength=len(leaders))[leaders].to(torch.float32)


def diversity_by_matrices(ids: Tensor, vocab: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Near-duplicates of one group, by token sets: all similarities at once in float32, then one completion at a
    time."""
    member = torch.zeros(len(ids), vocab).scatter_(1, ids, 1.0)
    both, size = member @ member.T, member.sum(1)
    jaccard = both.double() / (size[:, None] + size - both).double()
    keep, leaders = torch.zeros(len(ids), dtype=torch.bool), torch.arange(len(ids))
    similarity = torch.zeros(len(ids))
    for i in range(len(ids)):
        best, leader = torch.where(keep, jaccard[i], -1.0).max(0)
        keep[i] = best < threshold
        leaders[i] = i if keep[i] else leader
        similarity[i] = best.clamp(min=0)
    return keep, similarity, _cluster_weights(leaders)
