"""Samples spread over the ranks of a torch.distributed group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """Gathers what belongs to each sample, [S, ...], in the order of the ranks; S may differ from rank to rank.

    Without a group there is one rank. Reading the sizes synchronises, once.
    """

    def __init__(self, group: Any, samples: int, device: torch.device) -> None:
        self.group = group
        self.sizes = [samples] if group is None else self._all_sizes(samples, device)
        rank = 0 if group is None else dist.get_rank(group)
        self.begin = sum(self.sizes[:rank])
        self.end = self.begin + samples

    def _all_sizes(self, samples: int, device: torch.device) -> list[int]:
        sizes = torch.empty(dist.get_world_size(self.group), dtype=torch.int64, device=device)
        own = torch.full((1,), samples, dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(sizes, own, group=self.group)
        return sizes.tolist()

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    def gather(self, x: Tensor | None) -> Tensor | None:
        if x is None or self.group is None:
            return x
        raw = x.to(torch.uint8) if x.dtype == torch.bool else x
        longest = max(self.sizes)
        padded = raw.new_zeros((longest, *x.shape[1:]))
        padded[: len(x)] = raw
        everyone = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(everyone, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(everyone, self.sizes, strict=True)]).to(x.dtype)

    def own(self, x: Tensor) -> Tensor:
        return x if self.group is None else x[self.begin : self.end]


def reduced(x: Tensor, group: Any, op: str = "sum") -> Tensor:
    """The sum (or "max") over the ranks; `x` itself without a group."""
    if group is None:
        return x
    x = x.clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group)
    return x


def device_of(group: Any) -> torch.device:
    """Where the group's collectives take their tensors from, for a rank that has none of its own."""
    nccl = group is not None and "nccl" in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
