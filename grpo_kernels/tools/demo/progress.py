"""What the terminal shows while the demo trains."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .train import Step


class LiveProgress:
    """A bar with the newest reward and loss; where there is no terminal, such as in CI, a line now and then."""

    def __init__(self, console: Console, steps: int):
        self._console = console
        self._steps = steps
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("starting", total=steps, figures="")

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        self._progress.update(self._bar, description=name)

    def step(self, step: Step) -> None:
        figures = f"reward {step.reward:.3f}  loss {step.loss:+.4f}"
        self._progress.update(self._bar, advance=1, figures=figures)
        if not self._console.is_terminal and (step.step - 1) % max(1, self._steps // 15) == 0:
            self._console.print(f"step {step.step}/{self._steps}  {figures}  {step.seconds:.1f} s")
