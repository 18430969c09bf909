"""Groups of samples: the checks of their arguments, and vectorised reductions over them that wait for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .check import check_tensor

BASELINES = ("mean", "leave_one_out", "length_weighted", "none")
SCALES = ("group", "batch", "leave_one_out", "mean", "none")
SINGLES = ("zero", "raw")
VALUE_METRICS = ("tokens", "clip_fraction", "value_mean", "return_mean")  # in the order of gk::ValueMetric


class Samples(NamedTuple):
    """What group advantages read of each sample."""

    rewards: Tensor  # acc dtype [S, K]; NaN: left out
    reward_weights: Tensor | None  # float64 [K]
    valid: Tensor | None  # bool [S]
    group_ids: Tensor | None  # int64 [S]; None: consecutive runs of AdvantageForm.group_size
    lengths: Tensor | None  # float64 [S]
    critic_values: Tensor | None  # float64 [S]; NaN: none for this sample


class AdvantageForm(NamedTuple):
    group_size: int
    baseline: str
    scale: str
    ddof: int
    eps: float
    critic_weight: float
    clip_low: float  # infinities for no clip
    clip_high: float
    single_raw: bool


def check_ddof_eps(ddof: int, eps: float) -> None:
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1; got {ddof!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number of at least 0; got {eps!r}")


def check_groups(
    samples: int, group_size: int | None, group_ids: Tensor | None, device: torch.device | None = None
) -> None:
    if (group_size is None) == (group_ids is None):
        raise ValueError(f"give exactly one of group_size and group_ids; got {group_size!r} and {group_ids!r}")
    if group_size is not None and (group_size < 1 or samples % group_size):
        raise ValueError(f"group_size must be at least 1 and divide the {samples} samples; got {group_size!r}")
    if group_ids is not None:
        check_tensor("group_ids", group_ids, device=device, kind="integer", shape=(samples,))


def per_sample(
    values: Tensor | None, name: str, rewards: Tensor, dtype: torch.dtype, kind: str = "number"
) -> Tensor | None:
    """A [S] tensor where the rewards are, detached; as bool: what is not 0."""
    if values is None:
        return None
    check_tensor(name, values, device=rewards.device, kind=kind, shape=rewards.shape[:1])
    return values.detach().to(dtype)


def acc_rewards(rewards: Tensor) -> Tensor:
    """Detached, float64 as it is and everything else as float32."""
    return rewards.detach().to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def reward_weights_of(weights: Tensor | Sequence[float] | None, rewards: Tensor) -> Tensor:
    """float64 [K] for rewards [S, K], 1 each for None. Numbers are filled in where the rewards are: a tensor made of
    them on the CPU would be copied there, which synchronises."""
    if isinstance(weights, Tensor):
        check_tensor("reward_weights", weights)
        return weights.detach().to(rewards.device, torch.float64)
    if weights is None or not len(weights):
        return rewards.new_ones(rewards.shape[1:] if weights is None else (0,), dtype=torch.float64)
    return torch.stack([torch.full((), float(w), dtype=torch.float64, device=rewards.device) for w in weights])


def sorted_by_group(group_ids: Tensor, *, ends: bool) -> tuple[Tensor, Tensor]:
    """The samples group after group, in their order within it, and where the group of each position there ends, or
    begins. No host sync."""
    ids, order = group_ids.sort(stable=True)
    return order, torch.searchsorted(ids, ids, right=ends)


class Groups(NamedTuple):
    """Reductions over the groups of [S, ...] tensors, each given back to every sample."""

    size: int  # of consecutive groups
    membership: Tensor | None  # int64 [S], in [0, S): each sample's group; None: consecutive

    def sums(self, x: Tensor) -> Tensor:
        if self.membership is None:
            return x.unflatten(0, (-1, self.size)).sum(1).repeat_interleave(self.size, 0) if x.numel() else x
        return torch.zeros_like(x).index_add(0, self.membership, x)[self.membership]

    def maxima(self, x: Tensor) -> Tensor:
        """Of [S]."""
        if self.membership is None:
            return x.view(-1, self.size).amax(1).repeat_interleave(self.size) if x.numel() else x
        return torch.full_like(x, float("-inf")).scatter_reduce(0, self.membership, x, "amax")[self.membership]

    def best_two(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of float [S]: whether a sample is its group's only best, the best and the best of the others."""
        best = self.maxima(x)
        alone = (x == best) & (self.sums((x == best).to(torch.float64)) == 1)
        second = self.maxima(torch.where(alone, float("-inf"), x))
        return alone, best, second


def groups_of(
    samples: int, group_size: int | None, group_ids: Tensor | None, device: torch.device | None = None
) -> Groups:
    """Ids are ranked by a sort: unlike `unique` it has a known shape, so there is no host sync."""
    check_groups(samples, group_size, group_ids, device)
    if group_ids is None:
        return Groups(group_size or 1, None)
    ordered, order = group_ids.to(torch.int64).sort()
    rank = torch.nn.functional.pad((ordered[1:] != ordered[:-1]).cumsum(0), (min(samples, 1), 0))
    return Groups(1, torch.empty_like(order).scatter(0, order, rank))
