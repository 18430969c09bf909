"""Inputs of a realistic update: a policy that has moved a little from the one that sampled, never zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # rows
LOGITS_DEVIATION = 3.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Tokens:
    """Everything per token but the logits."""

    targets: Tensor  # [B, T] int64
    advantages: Tensor  # [B]
    mask: Tensor  # [B, T] bool, right-padded
    logps: Tensor  # [B, T] float32, of the current policy
    old_logps: Tensor  # [B, T]
    ref_logps: Tensor  # [B, T]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.targets, self.advantages, self.mask

    def filled(self, fill: float) -> Tokens:
        """Right-padded sequences of different lengths, `fill` of the tokens active in all."""
        (sequences, tokens), device = self.targets.shape, self.targets.device
        spread = torch.linspace(-0.9, 0.9, sequences) if sequences > 1 else torch.zeros(1)
        width = min(fill, 1 - fill)  # of the lengths' distribution: the mean stays `fill`
        lengths = ((fill + width * spread) * tokens).round().clamp(1, tokens).to(device)
        return replace(self, mask=torch.arange(tokens, device=device) < lengths[:, None])

    def without_signal(self, share: float) -> Tokens:
        """The advantage of every sequence in the first `share` of the batch is 0: groups all wrong or all right."""
        silent = torch.arange(len(self.advantages), device=self.advantages.device) < share * len(self.advantages)
        return replace(self, advantages=self.advantages.masked_fill(silent, 0.0))


@dataclass(frozen=True)
class Batch:
    """What a provider reads and must not write; an in-place one makes a copy of its own. By path, the others None."""

    tokens: Tokens
    logits: Tensor | None = None  # [B, T, V]
    hidden: Tensor | None = None  # [B, T, H]
    weight: Tensor | None = None  # [V, H]
    rewards: Tensor | None = None  # [B] of whole groups, or [B, T]
    values: Tensor | None = None  # [B, T] of a critic
    group_size: int = 1

    def sources(self, path: str) -> tuple[Tensor | None, ...]:
        """What the path's output is differentiated by."""
        by_path = {"linear": (self.hidden, self.weight), "tokens": (self.tokens.logps,)}
        return () if path in ("advantages", "gae") else by_path.get(path, (self.logits,))

    @property
    def source(self) -> Tensor:
        """What the path starts from: its device is the batch's, its bytes are what a copy moves."""
        known = (x for x in (self.logits, self.hidden, self.rewards, self.tokens.logps) if x is not None)
        return next(known)


def random_logits(
    shape: tuple[int, int, int], dtype: torch.dtype, *, peaked: bool, seed: int, device: str = "cpu"
) -> Tensor:
    """Normal of deviation 3; peaked: most rows nearly certain of one token, as a trained policy's are."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(shape, dtype=dtype, device=device)
    for rows in logits.view(-1, shape[-1]).split(CHUNK):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=device).mul_(LOGITS_DEVIATION))
    if peaked:
        favourite = torch.randint(shape[-1], shape[:2], generator=generator, device=device)[..., None]
        height = 12 + 10 * torch.rand(favourite.shape, generator=generator, device=device)
        logits.scatter_add_(-1, favourite, height.to(dtype))
    return logits


def sampled_tokens(logits_of: Callable[[slice], Tensor], grid: tuple[int, int], *, seed: int) -> Tokens:
    """Targets drawn from the policy; the one that sampled and the reference lie some noise away from it.

    `logits_of` gives [rows, V] for a slice of the B * T rows, so that the linear path need not hold them all either.
    """
    chosen, logps = [], []
    device = logits_of(slice(0, 1)).device
    generator = torch.Generator(device).manual_seed(seed)
    for begin in range(0, grid[0] * grid[1], CHUNK):
        rows = logits_of(slice(begin, begin + CHUNK)).float().log_softmax(-1)
        chosen.append(torch.multinomial(rows.exp(), 1, generator=generator))
        logps.append(rows.gather(-1, chosen[-1]))
    return moved_tokens(torch.cat(chosen).view(grid), torch.cat(logps).view(grid), generator)


def moved_tokens(targets: Tensor, logps: Tensor, generator: torch.Generator) -> Tokens:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=logps.device)

    grid = logps.shape
    old, ref = logps + 0.15 * normal(*grid), logps + 0.3 * normal(*grid)
    return Tokens(targets, normal(grid[0]), torch.ones_like(targets, dtype=torch.bool), logps, old, ref)


def logits_batch(
    grid: tuple[int, int], vocab: int, dtype: torch.dtype, *, peaked: bool = False, seed: int = 0, device: str = "cpu"
) -> Batch:
    logits = random_logits((*grid, vocab), dtype, peaked=peaked, seed=seed, device=device)
    rows = logits.view(-1, vocab)
    return Batch(sampled_tokens(lambda part: rows[part], grid, seed=seed + 1), logits=logits)


def linear_batch(
    grid: tuple[int, int], vocab: int, hidden: int, dtype: torch.dtype, *, seed: int = 0, device: str = "cpu"
) -> Batch:
    """Logits of deviation 3 once hidden and weight are multiplied."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    states = normal(*grid, hidden).to(dtype)
    weight = (normal(vocab, hidden) * (LOGITS_DEVIATION * hidden**-0.5)).to(dtype)
    rows = states.view(-1, hidden)
    tokens = sampled_tokens(lambda part: rows[part] @ weight.t(), grid, seed=seed + 1)
    return Batch(tokens, hidden=states, weight=weight)


def tokens_batch(grid: tuple[int, int], *, seed: int = 0, device: str = "cpu") -> Batch:
    """Log-probs only, for what runs behind the logits."""
    generator = torch.Generator(device).manual_seed(seed)
    logps = -torch.rand(grid, generator=generator, device=device).mul_(4)
    return Batch(moved_tokens(torch.zeros(grid, dtype=torch.int64, device=device), logps, generator))


def rewards_batch(samples: int, group_size: int, *, seed: int = 0, device: str = "cpu") -> Batch:
    """A reward a sample, the groups one after another."""
    generator = torch.Generator(device).manual_seed(seed)
    rewards = torch.randn(samples, generator=generator, device=device)
    return replace(tokens_batch((1, 1), device=device), rewards=rewards, group_size=group_size)


def values_batch(grid: tuple[int, int], *, seed: int = 0, device: str = "cpu") -> Batch:
    """Rewards and a critic's values by token, sequences of every length."""
    generator = torch.Generator(device).manual_seed(seed)
    rewards, values = (torch.randn(grid, generator=generator, device=device) for _ in range(2))
    batch = replace(tokens_batch(grid, seed=seed, device=device), rewards=rewards, values=values)
    return replace(batch, tokens=batch.tokens.filled(0.5))


class _Produced(torch.autograd.Function):
    """Logits as a model hands them over: part of a graph, and in memory that may be overwritten."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def produced(logits: Tensor) -> Tensor:
    """`logits` as a non-leaf that shares their memory: what `inplace` needs, without a copy."""
    return _Produced.apply(torch.zeros((), requires_grad=True), logits)
