"""What is computed, and the one interface of everybody who computes it."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ...config import LossConfig
from ..environment import installed
from .batch import Batch, produced

PATHS = {
    "logits": "loss from logits",
    "linear": "loss from hidden states and lm_head",
    "logps": "log-probs of the targets from logits",
    "tokens": "loss from log-probs",
    "advantages": "group-normalised advantages",
    "gae": "GAE, whitened",
}
ADVANTAGE_EPS, GAMMA, LAM = 1e-6, 0.99, 0.95
EPS_LOW, EPS_HIGH, CISPO_CAP, MAX_LENGTH = 0.2, 0.28, 5.0, 512
NO_DUAL_CLIP = 1e6  # verl always has one; no ratio reaches this


class Loss(NamedTuple):
    """One of the trainers' losses under the name that TRL and Liger give it."""

    preset: str
    options: dict[str, Any]  # of ours, in addition to the preset
    type: str  # loss_type of TRL and Liger
    level: str = "token"
    verl: tuple[str, str] | None = None  # its loss_mode and loss_agg_mode, where it computes the same


_CLIP = {"eps_low": EPS_LOW, "eps_high": EPS_HIGH}
LOSSES = {
    "dapo": Loss("trl_dapo", _CLIP, "dapo", verl=("vanilla", "token-mean")),
    "grpo": Loss("trl_grpo", _CLIP, "grpo", verl=("vanilla", "seq-mean-token-mean")),
    "bnpo": Loss("trl_bnpo", _CLIP, "bnpo", verl=("vanilla", "token-mean")),
    "dr_grpo": Loss("trl_dr_grpo", {**_CLIP, "max_length": MAX_LENGTH}, "dr_grpo"),
    "gspo": Loss("trl_gspo", _CLIP, "grpo", "sequence", ("gspo", "seq-mean-token-mean")),
    "luspo": Loss("trl_luspo", _CLIP, "luspo", "sequence"),
    "cispo": Loss("trl_cispo", {"cispo_high": CISPO_CAP}, "cispo", verl=("cispo", "token-mean")),
    "sapo": Loss("trl_sapo", {}, "sapo", verl=("sapo", "seq-mean-token-mean")),
    "vespo": Loss("trl_vespo", {}, "vespo"),
}


@dataclass(frozen=True)
class Task:
    """A computation without its sizes. `kl_coef` weighs the plain k3 estimator, differentiated pathwise."""

    path: str = "logits"
    loss: str = "dapo"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0  # on the "logps" path: entropy is returned, not differentiated

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ValueError(f"path must be one of {', '.join(PATHS)}; got {self.path!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {self.loss!r}")

    @property
    def config(self) -> LossConfig:
        loss = LOSSES[self.loss]
        options = {**loss.options, "kl_coef": self.kl_coef, "entropy_coef": self.entropy_coef}
        return LossConfig.preset(loss.preset, **options, kl_gradient="pathwise")


class Result(NamedTuple):
    """`outputs`: a 0-d loss, or log-probs (and entropy) [B, T]; `inputs`: what the first one is differentiated by."""

    outputs: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Run:
    """Ready to be called again and again on one batch."""

    forward: Callable[[], Result]
    restore: Callable[[], object] | None = None  # before each call: what an in-place call overwrote


class Provider(ABC):
    """Who computes it. Nothing foreign is imported before `build`."""

    name: str
    title: str  # one line for a table's legend
    paths: ClassVar[frozenset[str]]
    module: ClassVar[str | None] = None  # to be found for the provider to be there
    distribution: ClassVar[str | None] = None  # on PyPI
    needs_gpu: ClassVar[bool] = False
    rounded_logps: ClassVar[bool] = False  # computes log-probs in the logits' own dtype: compared at its precision
    approximates: ClassVar[float] = 0.0  # relative L2 that its own approximation may move a gradient by
    compiles: ClassVar[bool] = False  # by torch.compile: the first call takes seconds

    def missing(self, device: str) -> str | None:
        """Why it cannot run here; None where it can."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"not installed: pip install {self.distribution}"
        if self.needs_gpu and device == "cpu":
            return "needs a GPU"
        return None

    def unsupported(self, task: Task) -> str | None:
        """Why it cannot do this task; None where it can."""
        return None if task.path in self.paths else f"does not compute the {PATHS[task.path]}"

    def taking_part(self, task: Task, device: str, *, compile: bool) -> Provider | str:
        """Itself, without torch.compile unless `compile`, or why it is left out."""
        able = self if compile else self.uncompiled()
        return self.missing(device) or self.unsupported(task) or able or "left out: compiling takes seconds"

    def uncompiled(self) -> Provider | None:
        """Itself without torch.compile, for tests; None where there is nothing else."""
        return None if self.compiles else self

    @property
    def version(self) -> str | None:
        return None if self.distribution is None else installed(self.distribution)

    @abstractmethod
    def build(self, task: Task, batch: Batch) -> Run:
        """Everything that need not be repeated at each call is done here."""


def given(x: Tensor | None) -> Tensor:
    """A part of the batch that the path has."""
    assert x is not None, "the batch was made for another path"
    return x


def leaf(x: Tensor | None) -> Tensor:
    """A leaf of its own on the batch's memory."""
    return given(x).detach().requires_grad_()


def run_of(
    call: Callable[..., Any],
    *sources: Tensor | None,
    enter: Callable[[Any], Tensor] = leaf,
    restore: Callable[[], object] | None = None,
) -> Run:
    """`call` gives a tensor or several; its arguments share the sources' memory: leaves, or what `enter` makes."""

    def forward() -> Result:
        inputs = tuple(map(enter, sources))
        outputs = call(*inputs)
        return Result(outputs if isinstance(outputs, tuple) else (outputs,), inputs)

    return Run(forward, restore)


def run_in_place(call: Callable[[Tensor], Any], logits: Tensor | None, source: Tensor | None = None) -> Run:
    """`call` overwrites `source`, else a copy of the logits, which get back their values before each call."""
    original = given(logits)
    copy = original.clone() if source is None else source
    return run_of(call, copy, enter=produced, restore=lambda: copy[:, : original.shape[1]].copy_(original))


def in_one_line(error: Exception) -> str:
    """For a table: a failure is a result, shown as such."""
    first, *_ = [*str(error).strip().splitlines(), ""]
    return f"{type(error).__name__}: {first}"[:200]
