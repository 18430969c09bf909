"""QuACK: cross-entropy kernels in the CuTe DSL (Hopper and later), and plain PyTorch's loss behind them."""

from __future__ import annotations

from .base import Provider, Result, Run, Task, leaf
from .batch import Batch, produced
from .plain import WRITTEN, token_loss

IGNORED = -100


class Quack(Provider):
    name = "quack"
    title = "quack: cross_entropy in place or linear_cross_entropy, plain loss behind it"
    paths = frozenset({"logits", "linear", "logps"})
    module, distribution = "quack", "quack-kernels"
    needs_gpu = True

    def unsupported(self, task: Task) -> str | None:
        if task.entropy_coef:
            return "has no entropy"
        if task.path != "logps" and task.path in self.paths and task.loss not in WRITTEN:
            return "gives log-probs only"
        return super().unsupported(task)

    def build(self, task: Task, batch: Batch) -> Run:
        from quack.cross_entropy import cross_entropy
        from quack.linear_cross_entropy import linear_cross_entropy_func

        tokens = batch.tokens
        labels = tokens.targets.masked_fill(~tokens.mask, IGNORED).flatten()
        if task.path == "linear":

            def linear() -> Result:
                inputs = leaf(batch.hidden), leaf(batch.weight)
                rows = inputs[0].flatten(0, 1)
                logps = -linear_cross_entropy_func(
                    rows, inputs[1], None, labels, ignore_index=IGNORED, reduction="none", inplace_backward=True
                )
                return Result((token_loss(logps.view_as(tokens.mask), None, tokens, task),), inputs)

            return Run(linear)
        original = batch.logits
        assert original is not None, "the batch was made for another path"
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
