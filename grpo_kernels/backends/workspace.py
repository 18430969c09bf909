"""What a GPU's kernels are given beside the CPU's: memory that their blocks leave things in for each other, and samples
sorted by group. All of it is torch's, on the current stream, and nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs.grouping import sorted_by_group


class Scratch(NamedTuple):
    """gk::Scratch; to be kept until the launch."""

    counters: Tensor | None = None  # int32 zeros
    partial: Tensor | None = None  # float32

    @property
    def addresses(self) -> tuple[int, int]:
        if self.counters is None or self.partial is None:
            return 0, 0
        return self.counters.data_ptr(), self.partial.data_ptr()


class NoMemory:
    """The CPU's kernels need none, and group the samples themselves."""

    def tokens(self, grid: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Scratch:
        return Scratch()

    def gae(self, grid: Tensor, cu_seqlens: Tensor | None) -> Scratch:
        return Scratch()

    def value_loss(self, grid: Tensor) -> Scratch:
        return Scratch()

    def moments(self, grid: Tensor) -> Scratch:
        return Scratch()

    def advantages(self, rewards: Tensor, group_ids: Tensor | None) -> list[Tensor | None]:
        """Samples by group, where each one's group ends there, the batch's deviation."""
        return [None] * 3

    def diversity(
        self, token_ids: Tensor, samples: int, group_ids: Tensor | None
    ) -> tuple[list[Tensor | None], Scratch]:
        """Samples by group, where each one's group begins there, hashes, tables."""
        return [None] * 4, Scratch()


class GpuMemory(NoMemory):
    """Its sizes are csrc/cuda's; `module` has the constants of kernels.h."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def tokens(self, grid: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Scratch:
        tiles = self._sequence_tiles(grid, cu_seqlens)
        return _scratch(grid, 2 + 5 * sequences, tiles * self._module.TOKEN_SUMS)

    def gae(self, grid: Tensor, cu_seqlens: Tensor | None) -> Scratch:
        tiles = self._sequence_tiles(grid, cu_seqlens)
        return _scratch(grid, 1 + tiles, tiles * self._module.GAE_SUMS)

    def value_loss(self, grid: Tensor) -> Scratch:
        return _scratch(grid, 1, self._flat_tiles(grid.numel()) * self._module.VALUE_SUMS)

    def moments(self, grid: Tensor) -> Scratch:
        return _scratch(grid, 1, self._flat_tiles(grid.numel()) * self._module.MOMENT_SUMS)

    def advantages(self, rewards: Tensor, group_ids: Tensor | None) -> list[Tensor | None]:
        order, ends = (None, None) if group_ids is None else sorted_by_group(group_ids, ends=True)
        return [order, ends, torch.empty(1, dtype=torch.float32, device=rewards.device)]

    def diversity(
        self, token_ids: Tensor, samples: int, group_ids: Tensor | None
    ) -> tuple[list[Tensor | None], Scratch]:
        order, begins = (None, None) if group_ids is None else sorted_by_group(group_ids, ends=False)
        small = token_ids.shape[1] <= self._module.TOKENS_IN_TABLE  # every sample's table fits a block's own memory

        def integers(make: Callable[..., Tensor], a_token: int) -> Tensor:
            return make(a_token * token_ids.numel(), dtype=torch.int64, device=token_ids.device)

        sets = [integers(torch.empty, 1), None if small else integers(torch.zeros, 2)]
        return [order, begins, *sets], _scratch(token_ids, 1 + 2 * samples, 4 * samples)

    def _sequence_tiles(self, grid: Tensor, cu_seqlens: Tensor | None) -> int:
        """gk::sequence_tile_count."""
        batch, tokens = grid.shape
        if cu_seqlens is not None:
            return len(cu_seqlens) + tokens // int(self._module.TOKENS_PER_TILE)
        return max(batch * self._flat_tiles(tokens), 1)

    def _flat_tiles(self, tokens: int) -> int:
        return max(-(-tokens // int(self._module.TOKENS_PER_TILE)), 1)


def _scratch(like: Tensor, counters: int, floats: int) -> Scratch:
    return Scratch(
        torch.zeros(counters, dtype=torch.int32, device=like.device),
        torch.empty(floats, dtype=torch.float32, device=like.device),
    )
