"""QuACK: cross-entropy kernels in the CuTe DSL (Hopper and later), and plain PyTorch's loss behind them."""

from __future__ import annotations

from torch import Tensor

from .base import Run, Task, run_in_place, run_of
from .batch import Batch
from .plain import IGNORED, CrossEntropy, labels_of, token_loss


class Quack(CrossEntropy):
    name = "quack"
    title = "quack: cross_entropy in place or linear_cross_entropy, plain loss behind it"
    paths = frozenset({"logits", "linear", "logps"})
    module, distribution = "quack", "quack-kernels"
    needs_gpu = True

    def build(self, task: Task, batch: Batch) -> Run:
        from quack.cross_entropy import cross_entropy
        from quack.linear_cross_entropy import linear_cross_entropy_func

        tokens, labels = batch.tokens, labels_of(batch).flatten()
        options = {"ignore_index": IGNORED, "reduction": "none", "inplace_backward": True}

        def linear(hidden: Tensor, weight: Tensor) -> Tensor:
            logps = -linear_cross_entropy_func(hidden.flatten(0, 1), weight, None, labels, **options)
            return token_loss(logps.view_as(tokens.mask), None, tokens, task)

        def from_logits(logits: Tensor) -> Tensor:
            logps = -cross_entropy(logits.flatten(0, 1), labels, **options).view_as(tokens.mask)
            return logps if task.path == "logps" else token_loss(logps, None, tokens, task)

        if task.path == "linear":
            return run_of(linear, *batch.sources("linear"))
        return run_in_place(from_logits, batch.logits)
