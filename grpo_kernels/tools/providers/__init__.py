"""Everybody who computes a GRPO loss, behind one interface; each peer in its best legal configuration.

for provider in providers("cpu"):
    reason = provider.missing("cpu") or provider.unsupported(task)
    run = provider.build(task, batch)       # imports the peer, copies what it overwrites
    loss, gradients = both(run)             # again and again, after run.restore()
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LOSSES, PATHS, Loss, Provider, Result, Run, Task, given, in_one_line
from .cce import CutCrossEntropy
from .liger import Liger, LigerOnlyLinear
from .ours import BACKENDS, WAYS, Ours
from .plain import Compiled, Eager
from .quack import Quack
from .trl import TRL
from .verl import Verl, VerlOnGPU

__all__ = [
    "LOSSES",
    "PATHS",
    "Compiled",
    "Loss",
    "Ours",
    "Provider",
    "Result",
    "Run",
    "Task",
    "both",
    "given",
    "in_one_line",
    "provider_named",
    "providers",
    "providers_named",
]


def providers(device: str = "cpu") -> list[Provider]:
    """All of them, ours first, whether they are here or not: see `Provider.missing`. `device`: "cpu" or "cuda"."""
    on_cpu = device == "cpu"
    ours = [Ours(backend, way) for backend in BACKENDS[device] for way in WAYS]
    peers = [
        Eager(), Compiled(), TRL(), LigerOnlyLinear() if on_cpu else Liger(), CutCrossEntropy(),
        CutCrossEntropy(exact=True), Verl() if on_cpu else VerlOnGPU(), Quack(),
    ]  # fmt: skip
    return [*ours, *peers]


def provider_named(name: str, device: str = "cpu") -> Provider:
    """Raises ValueError with the names there are."""
    known = {provider.name: provider for provider in providers(device)}
    if name not in known:
        raise ValueError(f"provider {name!r} is not known; choose from {', '.join(known)}")
    return known[name]


def providers_named(names: str, device: str = "cpu") -> list[Provider]:
    """Those of a comma-separated list."""
    return [provider_named(name.strip(), device) for name in names.split(",") if name.strip()]


def both(run: Run, upstream: float = 1.0) -> tuple[Tensor, ...]:
    """Forward and backward: the outputs, then the gradient of the first by every input. Log-probs get a gradient of
    `upstream` each; advantages are not differentiated."""
    outputs, inputs = run.forward()
    if not inputs:
        return outputs
    gradients = torch.autograd.grad(outputs[0], inputs, torch.full_like(outputs[0], upstream))
    return *(output.detach() for output in outputs), *gradients
