"""Inputs for tests and benchmarks: ragged masks, ratios away from 1, every optional tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One padded batch, all float64 but targets and mask; `to` casts it."""

    logits: Tensor  # [B, T, V]
    targets: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool, every row a different length, the last row empty
    advantages: Tensor  # [B], one of them 0
    old_logps: Tensor  # [B, T], of a policy near that of the logits
    ref_logps: Tensor
    rollout_logps: Tensor
    token_weights: Tensor
    entropy_mask: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        cast = {name: x.to(dtype) for name, x in self._asdict().items() if x.is_floating_point()}
        return self._replace(**cast)

    def keywords(self) -> dict[str, Tensor]:
        """The per-token keywords of the losses."""
        return {name: getattr(self, name) for name in Batch._fields[4:]}


def make_batch(sequences: int = 5, tokens: int = 7, vocab: int = 133, *, seed: int = 0, spread: float = 2.0) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logits = (normal(sequences, tokens, vocab) * spread).float().double()  # exact in float32
    targets = torch.randint(vocab, (sequences, tokens), generator=g)
    logps = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    lengths = torch.arange(sequences - 1, -1, -1) * tokens // max(sequences - 1, 1)
    mask = torch.arange(tokens) < lengths[:, None]
    if tokens > 2:
        mask[:, 1] &= torch.arange(sequences) % 2 == 0  # holes, as tool calls leave
    advantages = normal(sequences)
    advantages[sequences // 2] = 0
    old, ref, rollout = ((logps + 0.3 * normal(sequences, tokens)).float().double() for _ in range(3))
    weights = torch.rand(sequences, tokens, generator=g, dtype=torch.float64)
    entropy_mask = (torch.rand(sequences, tokens, generator=g) < 0.6).double()
    return Batch(logits, targets, mask, advantages, old, ref, rollout, 2 * weights, entropy_mask)
