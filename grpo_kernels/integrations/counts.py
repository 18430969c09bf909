"""How many steps a trainer has taken on which path."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StepCounts:
    """Losses computed since the trainer was made (or the patch applied), by path; print it, or read its fields.

    Attributes:
        single_pass: loss and gradient in one launch of our kernels.
        two_sweeps: log-probs from our kernels, with their gradient in the backward; the loss by us or by the trainer.
        native: nothing of ours: the trainer's own formula on the trainer's own log-probs.
    """

    single_pass: int = 0
    two_sweeps: int = 0
    native: int = 0

    def __str__(self) -> str:
        return f"{self.single_pass} in a single pass, {self.two_sweeps} in two sweeps, {self.native} by the trainer"
