"""A loss's metrics: one tensor with names, and how those of several micro-batches and ranks become one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import METRICS
from ..inputs.check import check_choice

# How the metrics of parts of a batch combine: weighted by their tokens unless they are here.
SUMS = ("policy_loss", "kl_loss", "entropy_loss", "tokens")  # the first of METRICS
MINIMA = ("ratio_min", "clip_low_min", "weight_min")
MAXIMA = ("ratio_max", "clip_high_max", "weight_max")
LOSSES = SUMS[:3]
ONE_WITHOUT_TOKENS = (
    "ratio_mean", "ratio_min", "ratio_max", "gradient_weight", "weight_mean", "weight_min", "weight_max", "weight_ess",
)  # fmt: skip
_INDEX = {name: i for i, name in enumerate(METRICS)}


class Metrics(Mapping[str, Tensor]):
    """A loss's metrics by name, 0-d tensors on the device of the loss; ``LossOutput`` says what each is.

    Attributes:
        stacked: all of them, ``[26]`` in the order of the names; what is read by name is a view of it.
    """

    def __init__(self, stacked: Tensor) -> None:
        self.stacked = stacked

    def __getitem__(self, name: str) -> Tensor:
        return self.stacked[_INDEX[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(METRICS)

    def __len__(self) -> int:
        return len(METRICS)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(METRICS)}; on {self.stacked.device})"

    def floats(self) -> dict[str, float]:
        """All of them as numbers, which waits for the device once and not once for each."""
        return dict(zip(METRICS, self.stacked.tolist(), strict=True))


def combine_metrics(metrics: Metrics | Iterable[Metrics], group: Any = None, *, losses: str = "sum") -> Metrics:
    """The metrics of a batch from those of its parts: micro-batches, the ranks of a process group, or both.

    By name: ``tokens`` adds up; ``ratio_min``, ``clip_low_min``, ``weight_min`` and ``ratio_max``, ``clip_high_max``,
    ``weight_max`` are the extremes over parts that have tokens; ``weight_ess`` is that of all tokens together; every
    other is the mean over tokens, each part weighted by its ``tokens``. Without any token they are those of a loss
    without tokens. What a part without tokens reports is not looked at.

    Args:
        metrics: a loss's, or one for each micro-batch.
        group: of ``torch.distributed``; None: this process alone. All its ranks must call, those without tokens too.
        losses: ``policy_loss``, ``kl_loss`` and ``entropy_loss``: ``"sum"`` where every part was divided by the whole
            batch's ``denominator``, as gradients that are summed are; ``"mean"`` over ranks, each the sum of its
            micro-batches, where DDP and FSDP average the gradients.

    Returns:
        Metrics, on the device of the first.

    Raises:
        ValueError: for no metrics at all.
    """
    check_choice("losses", losses, ("sum", "mean"))
    parts = [metrics.stacked] if isinstance(metrics, Metrics) else [m.stacked for m in metrics]
    if not parts:
        raise ValueError("combine_metrics needs at least one loss's metrics; got none")
    wide = torch.float32 if parts[0].device.type == "mps" else torch.float64
    rows = torch.stack([p.to(wide) for p in parts])
    sums, extremes = _sums(rows), _extremes(rows)
    ranks = 1
    if group is not None:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        ranks = dist.get_world_size(group)
    combined = _finished(sums, extremes)
    if losses == "mean":
        combined[: len(LOSSES)] /= ranks
    return Metrics(combined.to(parts[0].dtype))


# Columns are picked by numbers and slices: a list of them would be copied to the device, which the host waits for.


def _sums(rows: Tensor) -> Tensor:
    """Over parts, [27]: each metric times the part's tokens, or itself where it adds up; the squares of the weights."""
    n, ess = rows[:, _INDEX["tokens"]], rows[:, _INDEX["weight_ess"]]
    added = torch.where((n > 0)[:, None], rows * n[:, None], 0.0)
    added[:, : len(SUMS)] = rows[:, : len(SUMS)]
    weights = n * rows[:, _INDEX["weight_mean"]]
    squares = torch.where((n > 0) & (ess != 0), weights.square() / (n * ess), 0.0)
    return torch.cat([added.sum(0), squares.sum()[None]])


def _extremes(rows: Tensor) -> Tensor:
    """The negative minima and the maxima over the parts that have tokens, [6]."""
    signed = [-rows[:, _INDEX[name]] for name in MINIMA] + [rows[:, _INDEX[name]] for name in MAXIMA]
    return torch.where(rows[:, _INDEX["tokens"]] > 0, torch.stack(signed), -torch.inf).amax(1)


def _finished(sums: Tensor, extremes: Tensor) -> Tensor:
    added, squares = sums[:-1], sums[-1]
    n = added[_INDEX["tokens"]]
    out, empty = added / n.clamp(min=1), torch.zeros_like(added)
    for i, name in enumerate(MINIMA + MAXIMA):
        out[_INDEX[name]] = -extremes[i] if name in MINIMA else extremes[i]
    out[_INDEX["weight_ess"]] = torch.where(squares == 0, 0.0, added[_INDEX["weight_mean"]].square() / (n * squares))
    for name in ONE_WITHOUT_TOKENS:
        empty[_INDEX[name]].fill_(1.0)
    out[: len(SUMS)] = empty[: len(SUMS)] = added[: len(SUMS)]
    return torch.where(n > 0, out, empty)
