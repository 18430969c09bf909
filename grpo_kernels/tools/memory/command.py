"""`grpo-kernels memory`: measure, predict, print, save."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import environment
from ..environment import device_named
from ..providers import LOSSES, Provider, Task, providers, providers_named
from ..providers.batch import DTYPES
from ..shapes import ModelShape, shape_named
from .measure import PATHS, Outcome, available_bytes, map_large_blocks, outcomes
from .plot import save_panels
from .profile import MemoryProfile, peak_table
from .report import heading, held_table, step_note, step_table, training_note, training_table
from .shape import LossShape
from .snapshot import load_snapshot, snapshot_profile
from .training import PRECISIONS, TrainingMemory, training_memory

_MEASURABLE = 0.7  # of the free memory


@dataclass(frozen=True)
class Request:
    """What the command was asked for."""

    model: ModelShape
    shape: LossShape
    task: Task  # its path is not read
    providers: list[Provider]
    measure: bool
    fit: float  # GiB
    precision: str


def run(request: Request, console: Console) -> dict[str, list[Outcome]]:
    """Measures and predicts on both paths, and prints the tables."""
    shape, found = request.shape, {}
    map_large_blocks()
    available = int(_MEASURABLE * available_bytes(shape.device)) if request.measure else 0
    console.print(heading(request.model.model, shape))
    for path in PATHS:
        task = replace(request.task, path=path)
        with console.status("") as status:
            found[path] = outcomes(
                request.providers, task, shape, available, lambda name: status.update(f"measuring {name}")
            )
        if any(outcome.peak is not None for outcome in found[path]):
            console.print(step_table(found[path], shape, path, request.fit))
            console.print(held_table(found[path]))
        if found[path]:
            console.print(step_note(found[path], shape, path), style="dim", markup=False)
    states = compared_states(request)
    console.print(training_table(states, request.model.model, shape, request.precision))
    console.print(training_note(states[0], states[-1]), style="dim")
    return found


def compared_states(request: Request) -> list[TrainingMemory]:
    """GRPO with our loss, with eager PyTorch's, and PPO with ours."""
    chosen = (("grpo", "ours"), ("grpo", "eager"), ("ppo", "ours"))
    return [
        training_memory(request.model, request.shape, method=method, provider=loss, precision=request.precision)
        for method, loss in chosen
    ]


def figures(request: Request, found: dict[str, list[Outcome]]) -> dict[str, Any]:
    """Everything, for JSON: bytes and seconds."""
    shape = {**vars(request.shape), "dtype": str(request.shape.dtype).removeprefix("torch.")}
    return {
        "model": request.model.model,
        "shape": shape,
        "versions": environment.versions(),
        "devices": environment.devices(),
        "steps": [outcome.to_dict() for path in found for outcome in found[path]],
        "training": [
            {**vars(state), "holdings": [h._asdict() for h in state.holdings], "total_bytes": state.total}
            for state in compared_states(request)
        ],
    }


def save(request: Request, found: dict[str, list[Outcome]], json_path: Path | None, plot: Path | None) -> None:
    """Figures as JSON, the timelines from hidden states as a picture."""
    if json_path is not None:
        json_path.write_text(json.dumps(figures(request, found), indent=1) + "\n")
    if plot is not None:
        measured = {o.provider: o.profile for o in found["linear"] if o.profile is not None}
        if not measured:
            raise ValueError("there is no timeline to draw: nothing was measured")
        panels = {name: profile.panel(relative=len(measured) > 1) for name, profile in measured.items()}
        save_panels(panels, plot, heading(request.model.model, request.shape))


def show_snapshot(path: Path, plot: Path | None, console: Console) -> MemoryProfile:
    """A CUDA memory snapshot from elsewhere: of its first GPU with a history."""
    content = load_snapshot(path)
    recorded = (i for i, trace in enumerate(content["device_traces"]) if trace)
    profile = snapshot_profile(content, next(recorded, 0))
    console.print(peak_table(profile, 20))
    if plot is not None:
        profile.plot(plot, title=str(path.name))
    return profile


def memory(
    model: Annotated[str, typer.Option(help="Whose vocabulary, hidden size and parameters.")] = "qwen2.5-0.5b",
    sequences: Annotated[int, typer.Option(min=1, help="In the micro-batch.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Of each sequence.")] = 128,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    fill: Annotated[float, typer.Option(help="Share of the tokens that the mask keeps.")] = 1.0,
    loss: Annotated[str, typer.Option(help=f"One of {', '.join(LOSSES)}.")] = "dapo",
    kl: Annotated[float, typer.Option(min=0.0, help="Coefficient of the KL penalty.")] = 0.0,
    chosen: Annotated[str, typer.Option("--providers", help="Comma-separated; all when left out.")] = "",
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave out who compiles for seconds.")] = False,
    predict: Annotated[bool, typer.Option("--predict", help="Ours and eager by formula, measure nothing.")] = False,
    fit: Annotated[float, typer.Option(min=0.0, help="GiB for the largest batch to fit into.")] = 24.0,
    precision: Annotated[str, typer.Option(help=f"Of the training state: {', '.join(PRECISIONS)}.")] = "bf16_adam",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Timelines as a picture.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", dir_okay=False, help="All figures.")] = None,
    snapshot: Annotated[Path | None, typer.Option(exists=True, help="Read a CUDA memory snapshot instead.")] = None,
) -> None:
    """What a GRPO loss takes in bytes: the peak, what holds it, the largest batch that fits, PPO compared with GRPO.

    Measured where it fits, ours and eager PyTorch's by formula where it does not; the others are measured only. A
    peer's failure and a peer's win are shown as such.
    """
    console = Console()
    try:
        if snapshot is not None:
            show_snapshot(snapshot, plot, console)
            return
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        device = device_named(device, present=not predict)
        named = shape_named(model)
        shape = LossShape(sequences, tokens, named.vocab, named.hidden, DTYPES[dtype], fill, device=device)
        taking_part = providers_named(chosen, device) or providers(device)
        taking_part = [provider for provider in taking_part if not (no_compile and provider.compiles)]
        request = Request(named, shape, Task("linear", loss, kl), taking_part, not predict, fit, precision)
        save(request, run(request, console), json_path, plot)
    except (ValueError, ImportError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
