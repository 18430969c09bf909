"""What a trainer author writes in plain PyTorch, written well: float32 log-softmax, everything else per token.

It is the baseline, not a specification: the formulas' homes are named in CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import ADVANTAGE_EPS, EPS_HIGH, EPS_LOW, GAMMA, LAM, PATHS, Provider, Run, Task, run_of
from .batch import Batch, Tokens

IGNORED = -100
WRITTEN = ("dapo", "bnpo", "grpo", "gspo")  # the clipped losses; the trainers' own functions time the others


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[..., None])[..., 0]


def token_logps_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logps = torch.log_softmax(logits, -1, dtype=torch.float32)
    return logps.gather(-1, targets[..., None])[..., 0], -(logps.exp() * logps).sum(-1)


def token_loss(logps: Tensor, entropy: Tensor | None, tokens: Tokens, task: Task, eps_high: float = EPS_HIGH) -> Tensor:
    mask = tokens.mask.to(torch.float32)
    lengths = mask.sum(-1, keepdim=True)
    log_ratio = logps - tokens.old_logps
    if task.loss == "gspo":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / lengths
    ratio, advantages = log_ratio.exp(), tokens.advantages[:, None]
    terms = -torch.min(ratio * advantages, ratio.clamp(1 - EPS_LOW, 1 + eps_high) * advantages)
    if task.kl_coef:
        u = tokens.ref_logps - logps
        terms = terms + task.kl_coef * (u.exp() - u - 1)
    by_sequence = task.loss in ("grpo", "gspo")
    loss = (terms * mask / lengths).sum(-1).mean() if by_sequence else (terms * mask).sum() / mask.sum()
    if entropy is not None:
        loss = loss - task.entropy_coef * (entropy * mask).sum() / mask.sum()
    return loss


def loss_from_logits(logits: Tensor, tokens: Tokens, task: Task) -> Tensor:
    if task.entropy_coef:
        return token_loss(*token_logps_and_entropy(logits, tokens.targets), tokens, task)
    return token_loss(token_logps(logits, tokens.targets), None, tokens, task)


def loss_from_hidden(hidden: Tensor, weight: Tensor, tokens: Tokens, task: Task) -> Tensor:
    return loss_from_logits(hidden @ weight.t(), tokens, task)


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    groups = rewards.view(-1, group_size)
    return ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + ADVANTAGE_EPS)).view(-1)


def whitened_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over time, vectorised over the batch."""
    next_value = running = torch.zeros_like(rewards[:, 0])
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        on = mask[:, t]
        running = torch.where(on, rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * running, running)
        next_value = torch.where(on, values[:, t], next_value)
        advantages.append(running)
    stacked = torch.stack(advantages[::-1], 1)
    active = stacked[mask]
    white = (stacked - active.mean()) * torch.rsqrt(active.var() + 1e-8)
    return white * mask, (stacked + values) * mask


class Eager(Provider):
    name = "eager"
    title = "plain PyTorch, float32 log-softmax, autograd"
    paths = frozenset(PATHS)
    module = distribution = "torch"

    def unsupported(self, task: Task) -> str | None:
        if task.path in ("logits", "linear", "tokens") and task.loss not in WRITTEN:
            return f"no plain version of {task.loss} here; TRL's and verl's own are timed"
        return super().unsupported(task)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def build(self, task: Task, batch: Batch) -> Run:
        tokens, with_entropy = batch.tokens, bool(task.entropy_coef)
        function = self.compiled(FUNCTIONS[task.path] if not with_entropy else ENTROPY_FUNCTIONS[task.path])
        others: dict[str, tuple[Any, ...]] = {  # arguments after those that are differentiated
            "linear": (tokens, task), "logits": (tokens, task), "logps": (tokens.targets,),
            "tokens": (None, tokens, task), "advantages": (batch.rewards, batch.group_size),
            "gae": (batch.rewards, batch.values, tokens.mask),
        }  # fmt: skip

        def call(*inputs: Tensor) -> Any:
            found = function(*inputs, *others[task.path])
            if task.path == "logps":
                return tuple(x * tokens.mask for x in (found if with_entropy else (found,)))
            return found

        return run_of(call, *batch.sources(task.path))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "linear": loss_from_hidden, "logits": loss_from_logits, "logps": token_logps, "tokens": token_loss,
    "advantages": group_advantages, "gae": whitened_gae,
}  # fmt: skip
ENTROPY_FUNCTIONS = {**FUNCTIONS, "logps": token_logps_and_entropy}


@dataclass(frozen=True)
class Compiled(Eager):
    """`dynamic`: as torch.compile's; False is the fastest where lengths do not change."""

    dynamic: bool | None = False

    name = "compile"
    title = "torch.compile of the eager function"
    paths = frozenset(PATHS) - {"gae"}  # a loop of thousands of steps would compile for minutes
    compiles = True

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=self.dynamic)


class CrossEntropy(Provider):
    """Who computes log-probs alone, as a cross-entropy; the plain loss follows."""

    def unsupported(self, task: Task) -> str | None:
        if task.entropy_coef:
            return "has no entropy"
        if task.path in self.paths - {"logps"} and task.loss not in WRITTEN:
            return "gives log-probs only"
        return super().unsupported(task)


def labels_of(batch: Batch) -> Tensor:
    """Rows of IGNORED are skipped."""
    return batch.tokens.targets.masked_fill(~batch.tokens.mask, IGNORED)
