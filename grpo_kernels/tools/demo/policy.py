"""What the training loop asks of a policy, whatever model is behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .tasks import Completion, Problem


@dataclass(frozen=True)
class Batch:
    """R sampled sequences of T completion tokens; the sequences of one problem are neighbours."""

    problems: list[Problem]  # R, one per sequence
    completions: list[Completion]  # R
    targets: Tensor  # [R, T] token ids
    mask: Tensor  # [R, T] bool, see completion_mask
    inputs: dict[str, Any]  # whatever the policy needs to run its model over the batch again; tensors are [R, ...]

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(
            problems=self.problems[rows],
            completions=self.completions[rows],
            targets=self.targets[rows],
            mask=self.mask[rows],
            inputs={name: x[rows] if isinstance(x, Tensor) else x for name, x in self.inputs.items()},
        )


class Policy(Protocol):
    name: str

    def parameters(self) -> Iterable[torch.nn.Parameter]: ...

    def sample(self, problems: Sequence[Problem], copies: int, max_new_tokens: int) -> Batch:
        """`copies` completions of every problem at temperature 1, so that the sampler is the policy itself."""
        ...

    def hidden_and_weight(self, batch: Batch, *, reference: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states [R, T, H] that predict `batch.targets` and the head's weight [V, H].

        `reference=True`: of the frozen policy training started from, without gradient.
        """
        ...


def completion_mask(tokens: Tensor, eos: int) -> Tensor:
    """[R, T] bool: true up to and including the first end token, which the policy chose; false for what follows."""
    ended = (tokens == eos).cumsum(-1)
    return (ended - (tokens == eos).long()) == 0
