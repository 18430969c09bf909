"""`grpo-kernels demo | bench | memory | doctor`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
except ImportError as missing:
    # Only the console script and `python -m` import this module: one sentence serves them better than a traceback.
    raise SystemExit(f"grpo-kernels needs {missing.name}: run `pip install 'grpo-kernels[cli]'`.") from None

from .bench.command import bench
from .demo import run, tasks, train
from .demo.errors import DemoError, require
from .doctor import doctor
from .memory.command import memory

if TYPE_CHECKING:
    from .demo.policy import Policy

STEPS = f"{train.SMOLLM.steps}, synthetic {train.SYNTHETIC.steps}"

app = typer.Typer(
    help="Fused GRPO loss kernels: see them learn, what a loss costs in time and in bytes, and what runs here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.command()(bench)
app.command()(memory)
app.command()(doctor)


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
    """Train a small language model by GRPO on the CPU, and compare the fused loss with eager PyTorch.

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


if __name__ == "__main__":
    app()
