"""`grpo-kernels bench`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..environment import device_named
from ..providers import LOSSES, PATHS, Ours, Provider, Task, providers, providers_named
from ..shapes import shape_named
from . import plots, show
from .case import MODES, Case
from .lengths import measure_lengths
from .measure import Options, measure
from .results import Results, of_this_machine
from .sweeps import SWEEPS

LENGTHS = "lengths"


def bench(
    model: Annotated[str, typer.Option(help="Whose vocabulary and hidden size; --list names them.")] = "smollm2-135m",
    path: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(PATHS)}.")] = "logits,linear",
    sweep: Annotated[
        str, typer.Option(help=f"Vary one thing instead; comma-separated, of {', '.join(SWEEPS)}, {LENGTHS}.")
    ] = "",
    sequences: Annotated[int, typer.Option(min=1, help="In the batch.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Of each sequence.")] = 64,
    vocab: Annotated[int | None, typer.Option(min=2, help="Instead of the model's.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Instead of the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or fp16.")] = "bf16",
    loss: Annotated[str, typer.Option(help=f"One of {', '.join(LOSSES)}.")] = "dapo",
    kl: Annotated[float, typer.Option(min=0.0, help="Coefficient of the KL penalty.")] = 0.0,
    entropy: Annotated[float, typer.Option(min=0.0, help="Coefficient of the entropy bonus.")] = 0.0,
    fill: Annotated[float, typer.Option(help="Share of the tokens that the mask keeps.")] = 1.0,
    silent: Annotated[float, typer.Option(help="Share of the sequences whose advantage is 0.")] = 0.0,
    peaked: Annotated[bool, typer.Option("--peaked", help="Logits nearly certain of one token.")] = False,
    mode: Annotated[str, typer.Option(help=f"What is timed: {', '.join(MODES)}.")] = "both",
    upstream: Annotated[float, typer.Option(help="Gradient of the loss.")] = 1.0,
    chosen: Annotated[str, typer.Option("--providers", help="Comma-separated; all when left out.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    seconds: Annotated[float, typer.Option(min=0.0, help="For each provider's rounds of a case.")] = 1.0,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave out who compiles for seconds.")] = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for JSON and pictures.")] = Path("bench_output"),
    list_choices: Annotated[bool, typer.Option("--list", help="Models and providers, and stop.")] = False,
) -> None:
    """What a GRPO loss and its gradient cost here, in time and in bytes: this library compared with the others.

    Everybody who is installed takes part; a peer's failure and a peer's win are shown as such.
    """
    console = Console()
    try:
        device = device_named(device)
        if list_choices:
            return show.show_choices(device, console)
        shape = shape_named(model)
        own = (vocab or shape.vocab, hidden or shape.hidden)
        case = Case(
            Task("logits", loss, kl, entropy), model.lower() if own == (shape.vocab, shape.hidden) else "", sequences,
            tokens, *own, dtype, fill, silent, peaked, mode, upstream,
        )  # fmt: skip
        options = Options(device=device, seconds=seconds, compile=not no_compile)
        paths, sweeps = _split(path), _split(sweep)
        named = providers_named(chosen, device) or everybody(device, briefly=bool(sweeps))
        _check(paths, sweeps)
    except ValueError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    try:
        _run(case, paths, sweeps, named, options, out, console)
    except ImportError as error:  # of matplotlib, when everything else is written
        typer.echo(error, err=True)
        raise typer.Exit(1) from None


def everybody(device: str, *, briefly: bool) -> list[Provider]:
    """`briefly`: of ours only the way that is meant to be used."""
    return [p for p in providers(device) if not (briefly and isinstance(p, Ours) and p.way)]


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check(paths: list[str], sweeps: list[str]) -> None:
    for kind, given, known in (("path", paths, PATHS), ("sweep", sweeps, [*SWEEPS, LENGTHS])):
        for name in given:
            if name not in known:
                raise ValueError(f"{kind} {name!r} is not known; choose from {', '.join(known)}")


def _run(
    case: Case, paths: list[str], sweeps: list[str], chosen: list[Provider], options: Options, out: Path,
    console: Console,
) -> None:  # fmt: skip
    records: list[dict[str, Any]] = []
    pictures: list[tuple[Any, ...]] = []  # drawn at the end, when the whole result is known
    for path in [] if sweeps else paths:
        one = _on_path(case, path)
        with console.status(f"measuring {one.name}"):
            record = measure(one, chosen, options)
        records.append(record)
        show.show_case(record, console)
        pictures.append((plots.bars, record, f"{path}.png"))
    for name in sweeps:
        for path in paths[:1] if name in ("group-size", LENGTHS) else paths:
            _one_sweep(name, _on_path(case, path), chosen, options, records, pictures, console)
    show.show_legend(records, console)
    results = of_this_machine(records, shlex.join(["grpo-kernels", *sys.argv[1:]]))
    _save(results, pictures, out, console)


def _on_path(case: Case, path: str) -> Case:
    """With the sizes that the path has."""
    task = replace(case.task, path=path)
    if path == "advantages":
        return replace(SWEEPS["group-size"][1](case)[0][1], sequences=case.sequences * 16)
    if path in ("tokens", "gae"):
        return replace(case, task=task, model="", vocab=0, hidden=0, dtype="fp32")
    return replace(case, task=task, hidden=case.hidden if path == "linear" else 0)


def _one_sweep(
    name: str, case: Case, chosen: list[Provider], options: Options, records: list[dict[str, Any]],
    pictures: list[tuple[Any, ...]], console: Console,
) -> None:  # fmt: skip
    file = f"{name}-{case.task.path}.png"
    if name == LENGTHS:
        with console.status("measuring new lengths"):
            record = measure_lengths(case, chosen, options)
        records.append(record)
        show.show_lengths(record, console)
        pictures.append((plots.lengths, record, file))
        return
    axis, points = SWEEPS[name]
    swept = []
    for x, point in points(case):
        with console.status(f"measuring {point.name}"):
            swept.append({**measure(point, chosen, options), "sweep": name, "x": x})
    swept = [record for record in swept if "unit_seconds" in record]
    records.extend(swept)
    show.show_sweep(f"{name}, {PATHS[swept[0]['task']['path']]}", axis, swept, console)
    pictures.append((lambda found, *rest: plots.sweep(found, axis, *rest), swept, file))


def _save(results: Results, pictures: list[tuple[Any, ...]], out: Path, console: Console) -> None:
    results.save(out / "bench.json")
    written = [out / "bench.json", *(draw(what, results, out / name) for draw, what, name in pictures)]
    console.print(f"\n{results.caption}", style="dim", highlight=False)
    console.print("written: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)
