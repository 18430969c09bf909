"""A case: one computation on one input, which everybody who can do it is measured on."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..providers import Task
from ..providers.batch import DTYPES, Batch, linear_batch, logits_batch, rewards_batch, tokens_batch, values_batch
from ..shapes import shape_named

MODES = {
    "both": "forward and backward",
    "forward": "forward with gradients enabled",
    "backward": "backward alone",
    "no_grad": "forward under no_grad",
}


@dataclass(frozen=True)
class Case:
    """Sizes that the path has no use for stay 0. `mode`: what is timed; for advantages always the forward."""

    task: Task = field(default_factory=Task)
    model: str = ""  # of grpo_kernels.tools.shapes, where vocab and hidden are its own
    sequences: int = 1
    tokens: int = 1
    vocab: int = 0
    hidden: int = 0
    dtype: str = "bf16"
    fill: float = 1.0  # share of the tokens that the mask keeps
    silent: float = 0.0  # share of the sequences whose advantage is 0
    peaked: bool = False
    mode: str = "both"
    upstream: float = 1.0  # gradient of the loss
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        for name in ("sequences", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name, least in (("fill", 1e-6), ("silent", 0.0)):
            if not least <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [{least:g}, 1]; got {getattr(self, name)}")

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits in the model's dtype, whether they are ever held or not."""
        return self.rows * self.vocab * DTYPES[self.dtype].itemsize

    @property
    def sizes(self) -> str:
        if self.task.path == "advantages":
            return f"{self.sequences} rewards, groups of {self.group_size}"
        grid = f"[{self.sequences} x {self.tokens}"
        return grid + (f", {self.vocab}] {self.dtype}" if self.vocab else "]")

    @property
    def name(self) -> str:
        """Unique among the cases of a run, and the same in the next one."""
        task = self.task
        loss = "" if task.path in ("logps", "advantages", "gae") else task.loss
        parts = [task.path, loss, self.model, self.sizes]
        parts += [f"kl {task.kl_coef:g}"] if task.kl_coef else []
        parts += [f"entropy {task.entropy_coef:g}" if loss else "entropy"] if task.entropy_coef else []
        parts += [f"fill {self.fill:g}"] if self.fill != 1 else []
        parts += [f"no signal {self.silent:g}"] if self.silent else []
        parts += ["peaked"] if self.peaked else []
        parts += [self.mode.replace("_", " ")] if self.mode != "both" else []
        parts += [f"upstream {self.upstream:g}"] if self.upstream != 1 else []
        return " ".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def batch(self, device: str = "cpu") -> Batch:
        raw = _raw_batch(
            self.task.path, self.sequences, self.tokens, self.vocab, self.hidden, self.dtype, self.peaked,
            self.group_size, device,
        )  # fmt: skip
        if self.task.path in ("advantages", "gae"):
            return raw
        tokens = raw.tokens.filled(self.fill) if self.fill != 1 else raw.tokens
        return replace(raw, tokens=tokens.without_signal(self.silent) if self.silent else tokens)


def of_model(model: str, task: Task, sequences: int, tokens: int, **options: Any) -> Case:
    """A case with the vocabulary and the hidden size of a model."""
    shape = shape_named(model)
    return Case(task, model.lower(), sequences, tokens, shape.vocab, shape.hidden, **options)


@functools.lru_cache(maxsize=1)
def _raw_batch(
    path: str, sequences: int, tokens: int, vocab: int, hidden: int, dtype: str, peaked: bool, group_size: int,
    device: str,
) -> Batch:  # fmt: skip
    """The last one is kept: consecutive cases often differ in the loss only."""
    grid = (sequences, tokens)
    if path == "advantages":
        return rewards_batch(sequences, group_size, device=device)
    if path == "gae":
        return values_batch(grid, device=device)
    if path == "tokens":
        return tokens_batch(grid, device=device)
    if path == "linear":
        return linear_batch(grid, vocab, hidden, DTYPES[dtype], device=device)
    return logits_batch(grid, vocab, DTYPES[dtype], peaked=peaked, device=device)
