"""Liger: its Triton loss from logits, in place, and its chunked loss from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import CISPO_CAP, EPS_HIGH, EPS_LOW, LOSSES, MAX_LENGTH, Provider, Run, Task, given, run_in_place, run_of
from .batch import Batch


class Liger(Provider):
    name = "liger"
    title = "Liger: triton_grpo_loss in place (GPU) or LigerFusedLinearGRPOLoss"
    paths = frozenset({"logits", "linear"})
    module, distribution = "liger_kernel", "liger-kernel"
    compiles = True  # the loss behind the log-probs, of the chunked loss

    def unsupported(self, task: Task) -> str | None:
        if task.entropy_coef:
            return "has no entropy bonus"
        if task.kl_coef and task.loss == "luspo":
            return "its luspo takes the KL's mean over masked positions too"
        return super().unsupported(task)

    def uncompiled(self) -> Liger:
        other = type(self)()
        other.compiles = False  # type: ignore[misc]
        return other

    def build(self, task: Task, batch: Batch) -> Run:
        return self._chunked(task, batch) if task.path == "linear" else self._triton(task, batch)

    def _chunked(self, task: Task, batch: Batch) -> Run:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss, tokens = LOSSES[task.loss], batch.tokens
        fused = LigerFusedLinearGRPOLoss(
            beta=task.kl_coef, compiled=self.compiles, use_ref_model=bool(task.kl_coef), loss_type=loss.type,
            importance_sampling_level=loss.level, max_completion_length=MAX_LENGTH, epsilon_low=EPS_LOW,
            epsilon_high=CISPO_CAP if loss.type == "cispo" else EPS_HIGH,
        )  # fmt: skip
        mask = tokens.mask.long()

        def linear(hidden: Tensor, weight: Tensor) -> Tensor:
            value, _ = fused(
                hidden, weight, tokens.targets, mask, tokens.advantages, None,
                ref_per_token_logps=tokens.ref_logps if task.kl_coef else None, old_per_token_logps=tokens.old_logps,
            )  # fmt: skip
            return value

        return run_of(linear, *batch.sources("linear"))

    def _triton(self, task: Task, batch: Batch) -> Run:
        """Liger reads [B, T + 1, V]: the last position, which it ignores, is added once and not timed."""
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        loss, tokens, logits = LOSSES[task.loss], batch.tokens, given(batch.logits)
        source = torch.cat([logits, logits[:, :1]], dim=1)
        mask = tokens.mask.to(torch.int32)

        def from_logits(logits: Tensor) -> Tensor:
            value, _ = triton_grpo_loss(
                logits, tokens.old_logps, tokens.ref_logps if task.kl_coef else None, tokens.targets, tokens.advantages,
                mask, temperature=1.0, beta=task.kl_coef, eps_low=EPS_LOW,
                eps_high=CISPO_CAP if loss.type == "cispo" else EPS_HIGH, inplace=True, loss_type=loss.type,
                max_completion_length=MAX_LENGTH, importance_sampling_level=loss.level, reduce=True,
            )  # fmt: skip
            return value

        return run_in_place(from_logits, logits, source)


class LigerOnlyLinear(Liger):
    """Its Triton kernels start on a GPU only; the chunked loss is torch."""

    def unsupported(self, task: Task) -> str | None:
        return "triton_grpo_loss needs a GPU" if task.path == "logits" else super().unsupported(task)
