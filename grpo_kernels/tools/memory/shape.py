"""The sizes of a loss step, and what is alive at a moment of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class LossShape:
    """A batch, a vocabulary, a hidden size; `fill`: the share of tokens that the mask keeps."""

    sequences: int
    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype = torch.bfloat16
    fill: float = 1.0
    chunk_rows: int | None = None  # of our linear path; None: its own choice
    device: str = "cpu"  # where operators differ

    def __post_init__(self) -> None:
        for name in ("sequences", "tokens", "vocab", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"predictions are for bfloat16 and float32; got {self.dtype}")
        if not 0 < self.fill <= 1:
            raise ValueError(f"fill must be above 0 and at most 1; got {self.fill}")

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens

    @property
    def active_rows(self) -> int:
        return max(1, round(self.fill * self.rows))

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    @property
    def half(self) -> bool:
        return self.dtype.itemsize == 2

    @property
    def logits(self) -> int:
        """Bytes of all logits in the model's dtype; `logits32`: in float32."""
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def logits32(self) -> int:
        return self.rows * self.vocab * 4

    @property
    def head(self) -> int:
        """Bytes of lm_head, so of its gradient; `head32`: in float32."""
        return self.vocab * self.hidden * self.dtype.itemsize

    @property
    def head32(self) -> int:
        return self.vocab * self.hidden * 4

    @property
    def hidden_states(self) -> int:
        return self.rows * self.hidden * self.dtype.itemsize

    @property
    def hidden32(self) -> int:
        return self.rows * self.hidden * 4

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": self.rows, "V": self.vocab, "H": self.hidden}


class Moment(NamedTuple):
    """What is alive at one moment of the step."""

    name: str
    holds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.holds.values())
