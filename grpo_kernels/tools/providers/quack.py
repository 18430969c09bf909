"""QuACK: cross-entropy kernels in the CuTe DSL (Hopper and later), and plain PyTorch's loss behind them."""

from __future__ import annotations

from .base import Result, Run, Task, given, leaf
from .batch import Batch, produced
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
        if task.path == "linear":

            def linear() -> Result:
                inputs = leaf(batch.hidden), leaf(batch.weight)
                rows = inputs[0].flatten(0, 1)
                logps = -linear_cross_entropy_func(
                    rows, inputs[1], None, labels, ignore_index=IGNORED, reduction="none", inplace_backward=True
                )
                return Result((token_loss(logps.view_as(tokens.mask), None, tokens, task),), inputs)

            return Run(linear)
        original = given(batch.logits)
        source = original.clone()

        def forward() -> Result:
            logits = produced(source)
            logps = -cross_entropy(
                logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="none", inplace_backward=True
            ).view_as(tokens.mask)
            if task.path == "logps":
                return Result((logps,), (logits,))
            return Result((token_loss(logps, None, tokens, task),), (logits,))

        return Run(forward, lambda: source.copy_(original))
