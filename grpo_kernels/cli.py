"""`grpo-kernels demo | memory | doctor`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
except ImportError as missing:
    # Only the console script and `python -m` import this module: one sentence serves them better than a traceback.
    raise SystemExit(f"grpo-kernels needs {missing.name}: run `pip install 'grpo-kernels[demo]'`.") from None

from .demo import run, tasks, train
from .demo.errors import DemoError, require

if TYPE_CHECKING:
    from .demo.policy import Policy

STEPS = f"{train.SMOLLM.steps}, synthetic {train.SYNTHETIC.steps}"

app = typer.Typer(
    help="Fused GRPO loss kernels: see them learn, see what a loss takes, and what runs on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    steps: Annotated[int | None, typer.Option(min=1, help="GRPO steps.", show_default=STEPS)] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Problems per step.")] = None,
    group_size: Annotated[int | None, typer.Option(min=2, help="Answers sampled per problem.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Of AdamW.")] = None,
    seed: Annotated[int, typer.Option(help="Of the problems and the sampling.")] = 0,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for picture and figures.")] = Path("demo_output"),
    synthetic: Annotated[bool, typer.Option("--synthetic", help="A tiny policy, no language model.")] = False,
) -> None:
    """Train a small language model by GRPO on the CPU, and set the fused loss beside eager PyTorch.

    It learns to answer additions as a bare equation. Ctrl-C stops at any time and shows what was done so far.
    """
    chosen = dict(
        steps=steps, prompts=prompts, group_size=group_size, max_new_tokens=max_new_tokens, learning_rate=learning_rate
    )
    changes = {name: value for name, value in chosen.items() if value is not None}
    console = Console()
    try:
        interrupted = _demo(synthetic, {**changes, "seed": seed}, out, console)
    except DemoError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped.")
        interrupted = True
    if interrupted:
        raise typer.Exit(130)


def _demo(synthetic: bool, changes: dict[str, Any], out: Path, console: Console) -> bool:
    """Whether Ctrl-C ended it."""
    require(["matplotlib"] if synthetic else ["matplotlib", "transformers", "gguf"])
    settings = replace(train.SYNTHETIC if synthetic else train.SMOLLM, **changes).with_evaluation_for_steps()
    if synthetic:
        from .demo.synthetic import SyntheticPolicy, one_thread

        with one_thread():
            return run(SyntheticPolicy(seed=settings.seed), tasks.CopyDigits(), settings, out, console).interrupted
    return run(_language_model(console), tasks.Addition(), settings, out, console).interrupted


def _language_model(console: Console) -> Policy:
    from .demo import smollm

    path = smollm.find_model()
    with console.status(f"loading {smollm.SmolPolicy.name}"):
        return smollm.SmolPolicy(path)


@app.command()
def memory(
    model: Annotated[str, typer.Option(help="Whose vocabulary, hidden size and parameters.")] = "qwen2.5-0.5b",
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of a micro-batch.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 128,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    fill: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the tokens that the mask keeps.")] = 1.0,
    loss: Annotated[str, typer.Option(help="Of TRL's loss types.")] = "dapo",
    kl: Annotated[float, typer.Option(min=0.0, help="KL coefficient.")] = 0.0,
    provider: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    fit: Annotated[float, typer.Option(min=0.0, help="GiB that the largest batch has to fit into.")] = 24.0,
    predict: Annotated[bool, typer.Option("--predict", help="Formulas only, measure nothing.")] = False,
    precision: Annotated[str, typer.Option(help="bf16_adam, bf16_only or fp32_adam.")] = "bf16_adam",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Timelines as a picture.")] = None,
    json: Annotated[Path | None, typer.Option(help="All figures.")] = None,
    snapshot: Annotated[Path | None, typer.Option(help="Read a CUDA memory snapshot instead.", exists=True)] = None,
) -> None:
    """What a GRPO loss takes in bytes, by provider: the peak, what holds it, the largest batch, PPO beside GRPO."""
    from .profiling import command
    from .profiling.shape import LossShape
    from .testing.batch import DTYPES
    from .testing.providers import Task
    from .testing.shapes import shape_named

    console = Console()
    try:
        if snapshot is not None:
            command.show_snapshot(snapshot, 0, plot, console)
            return
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        named = shape_named(model)
        shape = LossShape(sequences, tokens, named.vocab, named.hidden, DTYPES[dtype], fill, device=device)
        names = tuple(provider or ())
        request = command.Request(named, shape, Task("linear", loss, kl), names, not predict, fit, precision)
        command.save(request, command.run(request, console), json, plot)
    except (ValueError, ImportError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="For whose shape to say what would run.")] = "qwen2.5-0.5b",
    rows: Annotated[int, typer.Option(min=1, help="Tokens of that batch.")] = 4096,
) -> None:
    """Versions, devices, backends, what would run, a self-test, and one line to paste into a bug report."""
    from .doctor import print_diagnosis
    from .testing.shapes import shape_named

    try:
        shape = shape_named(model)
    except ValueError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    if not print_diagnosis(Console(), rows=rows, vocab=shape.vocab, hidden=shape.hidden):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
