"""What a GPU's kernels are given beside the CPU's: memory that their blocks leave things in for each other, and samples
sorted by group. All of it is torch's, on the current stream, and nothing waits for the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Scratch(NamedTuple):
    """gk::Scratch; to be kept until the launch."""

    counters: Tensor  # int32 zeros
    partial: Tensor  # float32

    @property
    def addresses(self) -> tuple[int, int]:
        return self.counters.data_ptr(), self.partial.data_ptr()


NONE = (0, 0)  # a CPU's


def new_scratch(like: Tensor, counters: int, floats: int) -> Scratch:
    return Scratch(
        torch.zeros(counters, dtype=torch.int32, device=like.device),
        torch.empty(floats, dtype=torch.float32, device=like.device),
    )


def sequence_pieces(module: Any, grid: Tensor, cu_seqlens: Tensor | None) -> int:
    """gk::piece_count: how many blocks take a [B, T] grid, a piece of a sequence each."""
    batch, tokens = grid.shape
    size: int = module.TOKENS_A_PIECE
    return len(cu_seqlens) + tokens // size if cu_seqlens is not None else max(batch * max(-(-tokens // size), 1), 1)


def token_scratch(module: Any, grid: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Scratch:
    pieces = sequence_pieces(module, grid, cu_seqlens)
    return new_scratch(grid, 2 + 5 * sequences, pieces * module.TOKEN_SUMS)


def gae_scratch(module: Any, grid: Tensor, cu_seqlens: Tensor | None) -> Scratch:
    pieces = sequence_pieces(module, grid, cu_seqlens)
    return new_scratch(grid, 1 + pieces, pieces * module.GAE_SUMS)


def span_scratch(module: Any, grid: Tensor, floats: int) -> Scratch:
    """Of a kernel that takes the grid as one run of tokens and leaves `floats` a piece."""
    return new_scratch(grid, 1, max(-(-grid.numel() // module.TOKENS_A_PIECE), 1) * floats)


class SortedGroups(NamedTuple):
    """Samples group after group, [S] each: which one lies where, and where the group of each position lies."""

    order: Tensor
    begins: Tensor
    ends: Tensor


def sorted_groups(group_ids: Tensor) -> SortedGroups:
    """Stable: within a group the samples keep their order."""
    ids, order = group_ids.sort(stable=True)
    return SortedGroups(order, torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True))


class DiversityMemory(NamedTuple):
    """Of the sets of n-grams: 64-bit integers."""

    hashes: Tensor  # one a token
    tables: Tensor | None  # two a token, zeros; None where every sample's table fits a block's own memory
    scratch: Scratch


def diversity_memory(module: Any, token_ids: Tensor, samples: int) -> DiversityMemory:
    def integers(make: Any, count: int) -> Tensor:
        return make(count, dtype=torch.int64, device=token_ids.device)

    small = token_ids.shape[1] <= module.TOKENS_IN_TABLE
    return DiversityMemory(
        integers(torch.empty, token_ids.numel()),
        None if small else integers(torch.zeros, 2 * token_ids.numel()),
        new_scratch(token_ids, 1 + 2 * samples, 2 * samples),
    )
