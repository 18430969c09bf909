"""The loss step of every provider, measured where it fits and predicted where it does not."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

from ..providers import Provider, Task, both, in_one_line
from ..providers.batch import Batch, linear_batch, logits_batch
from ..units import readable_bytes
from .events import native_stderr_silenced
from .predict import Prediction, formula_of, predict
from .profile import MemoryProfile, profile_memory
from .shape import LossShape

PATHS = ("linear", "logits")
_M_MMAP_THRESHOLD = -3  # of malloc.h
_COPIES = 3  # of the inputs: made in float32, and copied by who writes in place


@dataclass(frozen=True)
class Outcome:
    """What is known of one provider; `reason` says why there is no profile, where one was wanted."""

    provider: str
    path: str
    title: str
    profile: MemoryProfile | None
    prediction: Prediction | None
    reason: str | None = None

    @property
    def peak(self) -> int | None:
        """As measured, else as predicted."""
        if self.profile is not None:
            return self.profile.peak
        return None if self.prediction is None else self.prediction.peak

    def to_dict(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "path": self.path,
            "title": self.title,
            "reason": self.reason,
            "predicted_bytes": None if self.prediction is None else self.prediction.peak,
            "measured": None if self.profile is None else self.profile.to_dict(),
        }


def make_batch(shape: LossShape, path: str) -> Batch:
    """Inputs of a step, as the benchmarks make them."""
    grid, device = (shape.sequences, shape.tokens), shape.device
    if path == "linear":
        batch = linear_batch(grid, shape.vocab, shape.hidden, shape.dtype, device=device)
    else:
        batch = logits_batch(grid, shape.vocab, shape.dtype, device=device)
    return (
        batch if shape.fill == 1 else Batch(batch.tokens.filled(shape.fill), batch.logits, batch.hidden, batch.weight)
    )


def profile_step(provider: Provider, task: Task, batch: Batch, shape: LossShape) -> MemoryProfile:
    """One forward and backward, after another one has made whatever stays: thread pools, graphs, workspaces."""
    run = provider.build(task, batch)
    restore: Callable[[], object] = run.restore or (lambda: None)
    restore()
    both(run)
    restore()
    gc.collect()
    with profile_memory(shape.device, sizes=shape.sizes) as profile:
        with record_function("forward"):
            outputs, inputs = run.forward()
        with record_function("backward"):
            gradients = torch.autograd.grad(outputs[0], inputs)
    del outputs, inputs, gradients
    return profile


def map_large_blocks() -> None:
    """For a process that is all ours, as it lasts. Records of shapes lie between the tensors, and glibc's heap cannot
    reuse the gaps: a step of Liger's with 16 sequences, 1 GiB of tensors at its peak, grew the process to 18."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def available_bytes(device: str) -> int:
    """Memory that is free now."""
    if device == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return free


def outcomes(
    providers: Iterable[Provider], task: Task, shape: LossShape, available: int, on_start: Callable[[str], None]
) -> list[Outcome]:
    """Outcomes of those that compute the task, measured where the step should fit into `available` bytes (0: nowhere).

    Who has no formula is taken to need what eager PyTorch does. `on_start` is told each name before its turn.
    """
    chosen = [provider for provider in providers if not provider.unsupported(task)]
    inputs, as_eager = bytes_of_inputs(shape, task.path), predict("eager", shape, task.path)
    batch = make_batch(shape, task.path) if chosen and _COPIES * inputs < available else None
    found = []
    for provider in chosen:
        on_start(provider.name)
        prediction = predict(provider.name, shape, task.path) if formula_of(provider.name, task.path) else None
        reason, profile = provider.missing("cpu" if shape.on_cpu else "cuda"), None
        needed = _COPIES * inputs + (prediction or as_eager).peak
        if available and reason is None and (batch is None or needed > available):
            reason = f"too large for here: {readable_bytes(needed)} with its inputs"
            reason += "" if prediction else ", if it needs what eager PyTorch does"
        if batch is not None and reason is None:
            profile, reason = _profile_or_reason(provider, task, batch, shape)
        found.append(Outcome(provider.name, task.path, provider.title, profile, prediction, reason))
    return found


def bytes_of_inputs(shape: LossShape, path: str) -> int:
    """What is there before the step: hidden states and lm_head, or logits."""
    return shape.head + shape.hidden_states if path == "linear" else shape.logits


def _profile_or_reason(
    provider: Provider, task: Task, batch: Batch, shape: LossShape
) -> tuple[MemoryProfile | None, str | None]:
    try:
        with native_stderr_silenced(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return profile_step(provider, task, batch, shape), None
    except Exception as error:  # a peer's failure is a result, shown as such
        return None, f"fails: {in_one_line(error)}"
