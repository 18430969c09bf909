"""What a trainer author writes in plain PyTorch, written well: float32 log-softmax, everything else per token.

It is the baseline, not a specification: the formulas' homes are named in CONTRIBUTING.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Batch, Tokens
from .base import EPS_HIGH, EPS_LOW, PATHS, Provider, Result, Run, Task, leaf

WRITTEN = ("dapo", "bnpo", "grpo", "gspo")  # the clipped losses; the trainers' own functions time the others


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[..., None])[..., 0]


def token_logps_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logps = torch.log_softmax(logits, -1, dtype=torch.float32)
    return logps.gather(-1, targets[..., None])[..., 0], -(logps.exp() * logps).sum(-1)


def token_loss(logps: Tensor, entropy: Tensor | None, tokens: Tokens, task: Task) -> Tensor:
    mask = tokens.mask.to(torch.float32)
    lengths = mask.sum(-1, keepdim=True)
    log_ratio = logps - tokens.old_logps
    if task.loss == "gspo":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / lengths
    ratio, advantages = log_ratio.exp(), tokens.advantages[:, None]
    terms = -torch.min(ratio * advantages, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * advantages)
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


class Eager(Provider):
    name = "eager"
    title = "plain PyTorch, float32 log-softmax, autograd"
    paths = frozenset(PATHS)
    module = distribution = "torch"

    def unsupported(self, task: Task) -> str | None:
        if task.path != "logps" and task.loss not in WRITTEN:
            return f"no plain version of {task.loss} here; TRL's and verl's own are timed"
        return super().unsupported(task)

    def compiled(self, function):  # type: ignore[no-untyped-def]
        return function

    def build(self, task: Task, batch: Batch) -> Run:
        tokens = batch.tokens
        if task.path == "linear":
            from_hidden = self.compiled(loss_from_hidden)

            def linear() -> Result:
                inputs = leaf(batch.hidden), leaf(batch.weight)
                return Result((from_hidden(*inputs, tokens, task),), inputs)

            return Run(linear)
        if task.path == "tokens":
            from_logps = self.compiled(token_loss)

            def from_tokens() -> Result:
                logps = leaf(tokens.logps)
                return Result((from_logps(logps, None, tokens, task),), (logps,))

            return Run(from_tokens)
        if task.path == "logps":
            function = self.compiled(token_logps_and_entropy if task.entropy_coef else token_logps)

            def logps() -> Result:
                logits = leaf(batch.logits)
                found = function(logits, tokens.targets)
                found = found if task.entropy_coef else (found,)
                return Result(tuple(x * tokens.mask for x in found), (logits,))

            return Run(logps)
        from_logits = self.compiled(loss_from_logits)

        def loss() -> Result:
            logits = leaf(batch.logits)
            return Result((from_logits(logits, tokens, task),), (logits,))

        return Run(loss)


class Compiled(Eager):
    name = "compile"
    title = "torch.compile of the eager function"
    compiles = True

    def compiled(self, function):  # type: ignore[no-untyped-def]
        torch.compiler.reset()  # the graphs of earlier cases go, or dynamo would stop at its limit of recompilations
        return torch.compile(function, dynamic=False)
