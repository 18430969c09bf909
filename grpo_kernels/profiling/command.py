"""`grpo-kernels memory`: measure, predict, print, save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import environment
from ..testing.providers import Provider, Task, provider_named, providers
from ..testing.shapes import ModelShape
from .measure import PATHS, Outcome, available_bytes, outcomes
from .plot import save_profiles
from .profile import MemoryProfile
from .report import (
    heading,
    profile_tables,
    step_note,
    step_table,
    training_note,
    training_table,
)
from .shape import LossShape
from .snapshot import load_snapshot, snapshot_profile
from .training import METHODS, TrainingMemory, training_memory

_MEASURABLE = 0.7  # of the free memory


@dataclass(frozen=True)
class Request:
    """What the command was asked for."""

    model: ModelShape
    shape: LossShape
    task: Task  # its path is not read
    names: tuple[str, ...]  # of providers; empty: all
    measure: bool
    fit: float  # GiB
    precision: str


def chosen_providers(names: Sequence[str], device: str) -> list[Provider]:
    """Raises ValueError for a name that is none."""
    kind = torch.device(device).type
    return [provider_named(name, kind) for name in names] if names else providers(kind)


def run(request: Request, console: Console) -> dict[str, list[Outcome]]:
    """Measures and predicts on both paths, and prints the tables."""
    shape, found = request.shape, {}
    chosen = chosen_providers(request.names, shape.device)
    available = int(_MEASURABLE * available_bytes(shape.device)) if request.measure else 0
    console.print(heading(request.model.model, shape))
    for path in PATHS:
        task = Task(path, request.task.loss, request.task.kl_coef, request.task.entropy_coef)
        with console.status("") as status:
            found[path] = outcomes(chosen, task, shape, available, lambda name: status.update(f"measuring {name}"))
        if found[path]:
            console.print(step_table(found[path], shape, path, request.fit))
            console.print(step_note(found[path], shape, path), style="dim")
    methods = compared_methods(request)
    console.print(training_table(methods, request.model.model, shape, request.precision))
    console.print(training_note(methods), style="dim")
    return found


def compared_methods(request: Request) -> list[TrainingMemory]:
    return [training_memory(request.model, request.shape, method=m, precision=request.precision) for m in METHODS]


def figures(request: Request, found: dict[str, list[Outcome]]) -> dict[str, Any]:
    """Everything, for JSON: bytes and seconds."""
    shape = {**vars(request.shape), "dtype": str(request.shape.dtype).removeprefix("torch.")}
    return {
        "model": request.model.model,
        "shape": shape,
        "versions": environment.versions((*environment.PACKAGES, *environment.PEERS)),
        "devices": environment.devices(),
        "steps": [outcome.to_dict() for path in found for outcome in found[path]],
        "training": {
            m.method: {"total_bytes": m.total, "holdings": [h._asdict() for h in m.holdings]}
            for m in compared_methods(request)
        },
    }


def save(request: Request, found: dict[str, list[Outcome]], json_path: Path | None, plot: Path | None) -> None:
    """Figures as JSON, the timelines from hidden states as a picture."""
    if json_path is not None:
        json_path.write_text(json.dumps(figures(request, found), indent=1) + "\n")
    if plot is not None:
        measured = {o.provider: o.profile for o in found["linear"] if o.profile is not None}
        if not measured:
            raise ValueError("there is no timeline to draw: nothing was measured")
        save_profiles(measured, plot, heading(request.model.model, request.shape))


def show_snapshot(path: Path, device: int, plot: Path | None, console: Console) -> MemoryProfile:
    """A CUDA memory snapshot from elsewhere."""
    profile = snapshot_profile(load_snapshot(path), device)
    console.print(profile_tables(profile))
    if plot is not None:
        profile.plot(plot, title=str(path.name))
    return profile
