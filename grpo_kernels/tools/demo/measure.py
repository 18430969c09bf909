"""The fused loss compared with the one a trainer author would write by hand: values, time and memory on one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import grpo_kernels as gk

from ..bench.measure import peak_bytes
from ..bench.timing import measure_interleaved, medians
from ..providers import Task, plain
from ..providers.batch import Tokens
from .policy import Policy
from .train import LossInputs

ROUNDS = 7
LARGER = 8  # the demo's batch is small enough for a laptop; this many of it are a small batch elsewhere
LossAndGradients = tuple[Tensor, ...]  # loss, d loss / d hidden, d loss / d weight


@dataclass(frozen=True)
class Cost:
    seconds: float  # median of the rounds, forward and backward
    peak_bytes: int  # of all tensors alive at one moment, above what was alive before
    larger_peak_bytes: int  # the same for a batch `LARGER` times as large


@dataclass(frozen=True)
class Comparison:
    rows: int
    active_rows: int
    vocabulary: int
    rounds: int
    fused_loss: float
    eager_loss: float
    hidden_gradient_error: float | None  # max |difference| / max |eager|; None: no group carried a signal
    weight_gradient_error: float | None
    fused: Cost
    eager: Cost

    @property
    def loss_difference(self) -> float:
        return abs(self.fused_loss - self.eager_loss)


class _Case:
    """The two losses on the same tensors."""

    def __init__(self, hidden: Tensor, weight: Tensor, inputs: LossInputs, config: gk.LossConfig, copies: int = 1):
        def repeated(x: Tensor) -> Tensor:
            return x.repeat(copies, *[1] * (x.dim() - 1))

        self.hidden = repeated(hidden).requires_grad_()
        self.weight = weight.detach().clone().requires_grad_()
        self.targets, self.mask = repeated(inputs.batch.targets), repeated(inputs.batch.mask)
        self.advantages = repeated(inputs.advantages)
        self.old_logps, self.ref_logps = repeated(inputs.old_logps), repeated(inputs.ref_logps)
        self.config = config

    def fused(self) -> LossAndGradients:
        loss = gk.linear_grpo_loss(
            self.hidden, self.weight, self.targets, self.advantages, self.mask,
            old_logps=self.old_logps, ref_logps=self.ref_logps, config=self.config,
        ).loss  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight))

    def eager(self) -> LossAndGradients:
        tokens = Tokens(self.targets, self.advantages, self.mask, self.old_logps, self.old_logps, self.ref_logps)
        logps = plain.token_logps(self.hidden @ self.weight.t(), self.targets)
        task = Task("linear", kl_coef=float(self.config.kl_coef))
        loss = plain.token_loss(logps, None, tokens, task, eps_high=self.config.eps_low)
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight))


def compare(policy: Policy, inputs: LossInputs, config: gk.LossConfig) -> Comparison:
    """Both losses with the policy as it is now, so after the update: ratios differ from 1 and the KL from 0."""
    with torch.no_grad():
        hidden, weight = policy.hidden_and_weight(inputs.batch)
    case = _Case(hidden, weight, inputs, config)
    (fused_loss, *fused_gradients), (eager_loss, *eager_gradients) = case.fused(), case.eager()
    hidden_error: float | None = None
    weight_error: float | None = None
    if inputs.advantages.any():  # else the gradient is rounding noise on both sides, which nothing can be relative to
        hidden_error, weight_error = map(_relative_error, fused_gradients, eager_gradients)
    del fused_gradients, eager_gradients
    seconds = measure_interleaved({"fused": case.fused, "eager": case.eager}, ROUNDS)
    fused_seconds, eager_seconds = medians(seconds).values()
    larger = _Case(hidden, weight, inputs, config, copies=LARGER)
    return Comparison(
        rows=case.targets.numel(),
        active_rows=int(case.mask.sum()),
        vocabulary=weight.shape[0],
        rounds=ROUNDS,
        fused_loss=fused_loss.item(),
        eager_loss=eager_loss.item(),
        hidden_gradient_error=hidden_error,
        weight_gradient_error=weight_error,
        fused=Cost(fused_seconds, peak_bytes(case.fused), peak_bytes(larger.fused)),
        eager=Cost(eager_seconds, peak_bytes(case.eager), peak_bytes(larger.eager)),
    )


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=torch.finfo(theirs.dtype).tiny)).item()
