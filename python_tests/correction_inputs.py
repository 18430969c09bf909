"""For the correction's tests: configs of every kind, and a random batch, padded or packed."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.correction.config import REDUCTIONS, STATISTICS

METRICS = [
    "weight_mean", "weight_min", "weight_max", "weight_std", "effective_sample_size", "ratio_low", "ratio_high",
    "rejected_tokens", "rejected_rows", "missing_tokens", "k1", "k3", "ppl_ratio", "chi2_token", "chi2_sequence",
    "logp_difference_mean", "logp_difference_max", "mult_prob_error",
]  # fmt: skip
WEIGHTS = [
    {}, {"weight": "ratio"}, {"weight": "truncate", "high": 1.2}, {"weight": "clip", "low": 0.8, "high": 1.2},
    {"weight": "mask", "low": 0.8, "high": 1.2}, {"weight": "mask", "low": 0.9},
]  # fmt: skip
FILTERS = [gk.RejectionFilter(s, r, high=1.3 if s in ("ratio", "mult_prob_error") else 0.05)
           for s, r in itertools.product(STATISTICS, REDUCTIONS) if (s, r) != ("mult_prob_error", "sum")]  # fmt: skip
FULL = gk.CorrectionConfig(
    weight="clip", level="sequence_mean", low=0.9, high=1.1, veto=0.5, opsm_delta=0.02, batch_normalise=True,
    filters=(gk.RejectionFilter("k3", "mean", high=0.06), gk.RejectionFilter("ratio", "max", high=1.9)),
)  # fmt: skip


def batch_of(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Keywords of rollout_correction, with ragged rows, masked tokens in the middle and sometimes rows without a
    token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shape[1] + 1, (shape[0], 1), generator=g)
    mask = (torch.arange(shape[1]) < lengths) & (torch.rand(shape, generator=g) < 0.9)
    old = -torch.rand(shape, generator=g) * 3
    others = [old + 0.2 * torch.randn(shape, generator=g) for _ in range(2)]
    names = ("old_logps", "rollout_logps", "logps", "advantages")
    tensors = dict(zip(names, (old, *others, torch.randn(shape[0], generator=g)), strict=True))
    return {name: x.to(dtype) for name, x in tensors.items()} | {"mask": mask}


def packed(b: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """Packs the `kept` tokens of the rows; advantages are per token, since [R] would be ambiguous where N = R."""
    flat = {name: (x[:, None].expand_as(kept) if x.dim() == 1 else x)[kept] for name, x in b.items()}
    return flat | {"cu_seqlens": torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))}
