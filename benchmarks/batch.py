"""Inputs of a realistic update: a policy that has moved a little from the one that sampled, never zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK = 64  # rows


@dataclass(frozen=True)
class Tokens:
    """Everything per token beside the logits."""

    targets: Tensor  # [B, T]
    advantages: Tensor  # [B]
    mask: Tensor  # [B, T] bool, right-padded
    old_logps: Tensor  # [B, T]
    ref_logps: Tensor  # [B, T]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.targets, self.advantages, self.mask

    def filled(self, fill: float) -> Tokens:
        """Right-padded sequences of different lengths, `fill` of the tokens active in all."""
        sequences, tokens = self.targets.shape
        spread = torch.linspace(-0.9, 0.9, sequences) if sequences > 1 else torch.zeros(1)
        lengths = ((fill + (1 - fill) * spread) * tokens).round().clamp(1, tokens)
        return replace(self, mask=torch.arange(tokens) < lengths[:, None])


@dataclass(frozen=True)
class Batch:
    logits: Tensor  # [B, T, V], never written
    buffer: Tensor  # the same numbers, which an in-place run overwrites
    out: Tensor  # mapped memory for the copy
    tokens: Tokens

    def restore(self) -> None:
        self.buffer.copy_(self.logits)

    def filled(self, fill: float) -> Batch:
        return replace(self, tokens=self.tokens.filled(fill))


def random_logits(shape: tuple[int, int, int], dtype: torch.dtype, *, peaked: bool, seed: int) -> Tensor:
    """Normal of deviation 3; peaked: most rows nearly certain of one token, as a trained policy's are."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.empty(shape, dtype=dtype)
    for rows in logits.view(-1, shape[-1]).split(CHUNK):
        rows.copy_(torch.randn(rows.shape, generator=generator).mul_(3))
    if peaked:
        favourite = torch.randint(shape[-1], shape[:2], generator=generator)[..., None]
        height = 12 + 10 * torch.rand(favourite.shape, generator=generator)
        logits.scatter_add_(-1, favourite, height.to(dtype))
    return logits


def sampled_tokens(logits_of: Callable[[slice], Tensor], grid: tuple[int, int], *, seed: int) -> Tokens:
    """Targets drawn from the policy; the one that sampled and the reference lie some noise away from it.

    `logits_of` gives [rows, V] for a slice of the B * T rows, so that the linear path need not hold them all either.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen, logps = [], []
    for begin in range(0, grid[0] * grid[1], CHUNK):
        rows = logits_of(slice(begin, begin + CHUNK)).float().log_softmax(-1)
        chosen.append(torch.multinomial(rows.exp(), 1, generator=generator))
        logps.append(rows.gather(-1, chosen[-1]))
    now = torch.cat(logps).view(grid)
    old = now + 0.15 * torch.randn(grid, generator=generator)
    ref = now + 0.3 * torch.randn(grid, generator=generator)
    advantages = torch.randn(grid[0], generator=generator)
    return Tokens(torch.cat(chosen).view(grid), advantages, torch.ones(grid, dtype=torch.bool), old, ref)


def make_batch(grid: tuple[int, int], vocab: int, dtype: torch.dtype, *, peaked: bool = False, seed: int = 0) -> Batch:
    logits = random_logits((*grid, vocab), dtype, peaked=peaked, seed=seed)
    rows = logits.view(-1, vocab)
    tokens = sampled_tokens(lambda part: rows[part], grid, seed=seed + 1)
    return Batch(logits, logits.clone(), torch.zeros_like(logits), tokens)
