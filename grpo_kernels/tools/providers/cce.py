"""Cut cross-entropy (Apple): log-probs from hidden states, and plain PyTorch's loss behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .base import Run, Task, run_of
from .batch import Batch
from .plain import IGNORED, CrossEntropy, labels_of, token_loss


@dataclass(frozen=True)
class CutCrossEntropy(CrossEntropy):
    """On a GPU its Triton kernels, with the gradient filter by default and without it as `cce-exact`; on a CPU its
    torch.compile implementation, which holds the logits."""

    exact: bool = False

    paths = frozenset({"linear"})
    module, distribution = "cut_cross_entropy", "cut-cross-entropy"
    compiles = True

    @property
    def approximates(self) -> float:  # type: ignore[override]
        """The filter leaves out whole tiles whose gradients are small."""
        return 0.0 if self.exact else 0.2

    @property
    def name(self) -> str:  # type: ignore[override]
        return "cce-exact" if self.exact else "cce"

    @property
    def title(self) -> str:  # type: ignore[override]
        filtering = "without gradient filter" if self.exact else "as it is by default"
        return f"cut-cross-entropy {filtering} (on a CPU: its torch_compile), plain loss behind it"

    def missing(self, device: str) -> str | None:
        return super().missing(device) or ("needs a GPU" if self.exact and device == "cpu" else None)

    def build(self, task: Task, batch: Batch) -> Run:
        from cut_cross_entropy import linear_cross_entropy

        tokens, labels = batch.tokens, labels_of(batch)
        options: dict[str, Any] = {"filter_eps": None} if self.exact else {}
        if batch.source.device.type == "cpu":
            options = {"impl": "torch_compile"}

        def linear(hidden: Tensor, weight: Tensor) -> Tensor:
            logps = -linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, reduction="none", **options)
            return token_loss(logps, None, tokens, task)

        return run_of(linear, *batch.sources("linear"))
