"""Near-duplicates among 4096 completions of 4096 tokens: in groups of 16, and in one group.

The baseline for groups of 16 is a double loop over Python sets. For one group, whose eight million pairs would take it
a quarter of an hour, it is the product of membership matrices, [completions, vocabulary]. Peak memory is that of
tensors: the kernel's own, about twice that of the token ids as int64, is not in it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels as gk

from . import eager
from .harness import Harness

VOCAB, THRESHOLD = 150_000, 0.9
COMPLETIONS = TOKENS = 4096
SMOKE_COMPLETIONS, SMOKE_TOKENS = 32, 24
GROUP = 16
CONFIGS = [(GROUP, 1), (GROUP, 3), (0, 1)]  # group size (0: all), ngram


def completions(data: str, count: int, tokens: int) -> Tensor:
    """random: tokens drawn evenly. zipf: as words are, so that all pairs share many. near: 1/8 of the completions are
    new, the others differ from one of them by a few percent of their tokens, on both sides of the threshold."""
    g = torch.Generator().manual_seed(0)
    if data == "zipf":
        cumulative = (1 / torch.arange(1, VOCAB + 1).double()).cumsum(0)
        draws = torch.rand(count, tokens, dtype=torch.float64, generator=g) * cumulative[-1]
        return torch.searchsorted(cumulative, draws).clamp(max=VOCAB - 1)
    ids = torch.randint(0, VOCAB, (count, tokens), generator=g)
    if data == "near":
        originals = ids[torch.arange(count) // 8 * 8]
        rate = torch.tensor([0.02, 0.04, 0.06, 0.08]).repeat(count // 4)[:, None]
        ids = torch.where(torch.rand(count, tokens, generator=g) < rate, ids, originals)
    return ids


@pytest.mark.parametrize("data", ["random", "zipf", "near"])
@pytest.mark.parametrize("group, ngram", CONFIGS)
def bench_diversity(benchmark: Any, harness: Harness, data: str, group: int, ngram: int) -> None:
    shape = (COMPLETIONS, TOKENS) if harness.full else (SMOKE_COMPLETIONS, SMOKE_TOKENS)
    ids = completions(data, *shape)
    size = group or len(ids)

    def baseline() -> tuple[Tensor, ...]:
        if group:
            return eager.diversity_by_sets(ids, size, ngram, THRESHOLD)
        return eager.diversity_by_matrices(ids, VOCAB, THRESHOLD)

    def ours() -> tuple[Tensor, ...]:
        return tuple(gk.group_diversity(ids, group_size=size, ngram=ngram, threshold=THRESHOLD))

    name = f"diversity {list(shape)} {data}, groups of {size}, ngram {ngram}"
    harness.run_calls(benchmark, name, ours, baseline, lambda: (ids.clone(),), 1e-6)
