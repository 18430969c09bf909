"""Near-duplicates in torch alone, from membership matrices: the specification of csrc/cpu/diversity.cpp."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import pad


def group_diversity(
    token_ids: Tensor, active: Tensor | None, cu_seqlens: Tensor | None, group_ids: Tensor | None, group_size: int,
    ngram: int, threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Per sample: kept, highest similarity to an earlier kept one of its group, 1 / the size of its cluster."""
    samples = _samples(token_ids, active, cu_seqlens)
    positions = torch.arange(len(samples), device=token_ids.device)
    ids = positions // group_size if group_ids is None else group_ids
    keep = torch.zeros_like(positions, dtype=torch.bool)
    similarity, weights = (torch.zeros_like(positions, dtype=torch.float32) for _ in range(2))
    for group in ids.unique():
        members = positions[ids == group]
        jaccard = _jaccard([_ngrams(samples[i], ngram) for i in members.tolist()])
        kept, best, leader = _greedy(jaccard, threshold)
        sizes = torch.zeros_like(leader).index_add(0, leader, torch.ones_like(leader))
        keep[members], similarity[members] = kept, best.to(torch.float32)
        weights[members] = (1 / sizes[leader].to(torch.float64)).to(torch.float32)
    return keep, similarity, weights


def _samples(token_ids: Tensor, active: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    active = torch.ones_like(token_ids, dtype=torch.bool) if active is None else active
    if cu_seqlens is None:
        return [row[chosen] for row, chosen in zip(token_ids, active, strict=True)]
    bounds = cu_seqlens.tolist()
    return [token_ids[0, a:b][active[0, a:b]] for a, b in itertools.pairwise(bounds)]


def _ngrams(tokens: Tensor, n: int) -> Tensor:
    """[number, 1 + n], each with its length in front: a sample shorter than n is one n-gram, an empty one has none."""
    length = min(len(tokens), n)
    grams = tokens.unfold(0, length, 1) if length else tokens.new_empty((0, 0))
    return pad(pad(grams, (0, n - length)), (1, 0), value=length)


def _jaccard(grams: list[Tensor]) -> Tensor:
    """[samples, samples] from each sample's n-grams; two empty sets are equal."""
    everything = torch.cat(grams)
    if not len(everything):  # unique(dim=0) refuses
        return torch.ones(len(grams), len(grams), dtype=torch.float64, device=everything.device)
    distinct, index = everything.unique(dim=0, return_inverse=True)
    lengths = torch.tensor([len(g) for g in grams], device=index.device)
    owner = torch.arange(len(grams), device=index.device).repeat_interleave(lengths)
    member = torch.zeros(len(grams), len(distinct), dtype=torch.float64, device=index.device)
    member[owner, index] = 1
    both, size = member @ member.T, member.sum(1)
    either = size[:, None] + size - both
    return torch.where(either > 0, both / either, 1.0)


def _greedy(jaccard: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """In order: kept, similarity to the most similar kept sample before (0 if none), whose cluster it joins."""
    n = len(jaccard)
    kept = torch.zeros(n, dtype=torch.bool, device=jaccard.device)
    best, leader = jaccard.new_zeros(n), torch.arange(n, device=jaccard.device)
    for i in range(n):
        similarity, first = torch.where(kept, jaccard[i], -1.0).max(0)
        kept[i] = similarity < threshold
        leader[i] = torch.where(kept[i], leader[i], first)
        best[i] = similarity.clamp(min=0)
    return kept, best, leader
