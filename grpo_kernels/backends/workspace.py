"""What the GPU kernels need in addition to the CPU's arguments: memory through which the blocks of a launch exchange
partial results, and samples sorted by group. torch allocates all of it on the current stream; no host sync."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs.grouping import sorted_by_group


class Workspace(NamedTuple):
    """gk::Workspace; must stay alive until the launch."""

    counters: Tensor | None = None  # int32 zeros
    partials: Tensor | None = None  # float32

    @property
    def addresses(self) -> tuple[int, int]:
        if self.counters is None or self.partials is None:
            return 0, 0
        return self.counters.data_ptr(), self.partials.data_ptr()


class NoWorkspace:
    """The CPU kernels need no workspace, and group the samples themselves."""

    def tokens(self, logps: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Workspace:
        return Workspace()

    def gae(self, rewards: Tensor, cu_seqlens: Tensor | None) -> Workspace:
        return Workspace()

    def value_loss(self, values: Tensor) -> Workspace:
        return Workspace()

    def moments(self, values: Tensor) -> Workspace:
        return Workspace()

    def advantages(self, rewards: Tensor, group_ids: Tensor | None) -> list[Tensor | None]:
        """Samples by group, where each one's group ends there, the batch's deviation."""
        return [None] * 3

    def diversity(
        self, token_ids: Tensor, samples: int, group_ids: Tensor | None
    ) -> tuple[list[Tensor | None], Workspace]:
        """Samples by group, where each one's group begins there, hashes, tables."""
        return [None] * 4, Workspace()


class CudaWorkspace(NoWorkspace):
    """The sizes that csrc/cuda expects; `module` has the constants of kernels.h."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def tokens(self, logps: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Workspace:
        tiles = self._sequence_tiles(logps, cu_seqlens)
        return _workspace(logps, 2 + 5 * sequences, tiles * self._module.TOKEN_SUMS)

    def gae(self, rewards: Tensor, cu_seqlens: Tensor | None) -> Workspace:
        tiles = self._sequence_tiles(rewards, cu_seqlens)
        return _workspace(rewards, 1 + tiles, tiles * self._module.GAE_SUMS)

    def value_loss(self, values: Tensor) -> Workspace:
        return _workspace(values, 1, self._flat_tiles(values.numel()) * self._module.VALUE_SUMS)

    def moments(self, values: Tensor) -> Workspace:
        return _workspace(values, 1, self._flat_tiles(values.numel()) * self._module.MOMENT_SUMS)

    def advantages(self, rewards: Tensor, group_ids: Tensor | None) -> list[Tensor | None]:
        order, ends = (None, None) if group_ids is None else sorted_by_group(group_ids, ends=True)
        return [order, ends, torch.empty(1, dtype=torch.float32, device=rewards.device)]

    def diversity(
        self, token_ids: Tensor, samples: int, group_ids: Tensor | None
    ) -> tuple[list[Tensor | None], Workspace]:
        order, begins = (None, None) if group_ids is None else sorted_by_group(group_ids, ends=False)
        small = token_ids.shape[1] <= self._module.TOKENS_IN_TABLE  # every sample's table fits in shared memory

        def integers(make: Callable[..., Tensor], per_token: int) -> Tensor:
            return make(per_token * token_ids.numel(), dtype=torch.int64, device=token_ids.device)

        sets = [integers(torch.empty, 1), None if small else integers(torch.zeros, 2)]
        return [order, begins, *sets], _workspace(token_ids, 1 + 2 * samples, 4 * samples)

    def _sequence_tiles(self, tokens_bt: Tensor, cu_seqlens: Tensor | None) -> int:
        """gk::sequence_tile_count."""
        batch, tokens = tokens_bt.shape
        if cu_seqlens is not None:
            return len(cu_seqlens) + tokens // int(self._module.TOKENS_PER_TILE)
        return max(batch * self._flat_tiles(tokens), 1)

    def _flat_tiles(self, tokens: int) -> int:
        """gk::flat_tile_count."""
        return max(-(-tokens // int(self._module.TOKENS_PER_TILE)), 1)


def _workspace(like: Tensor, counters: int, floats: int) -> Workspace:
    return Workspace(
        torch.zeros(counters, dtype=torch.int32, device=like.device),
        torch.empty(floats, dtype=torch.float32, device=like.device),
    )
