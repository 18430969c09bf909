"""The demo: a policy learns a rule by GRPO on the CPU in minutes, and the fused loss is compared with eager PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is an optional extra: importing this package must not need it
    from rich.console import Console

    from .measure import Comparison
    from .policy import Policy
    from .progress import LiveProgress
    from .tasks import Task
    from .train import Run, Settings

__all__ = ["run"]


def run(policy: Policy, task: Task, settings: Settings, out: Path, console: Console) -> Run:
    """Train, compare, print the tables, write `reward.png` and `report.json` under `out`."""
    from .. import environment
    from . import report
    from .progress import LiveProgress
    from .train import train

    out.mkdir(parents=True, exist_ok=True)
    with LiveProgress(console, settings.steps) as progress:
        result = train(policy, task, settings, progress)
        comparison = _compare(policy, result, progress)
    backend = environment.default_backend()
    outcome = report.Report(
        policy=policy.name,
        task=task.name,
        rule=task.rule,
        run=result,
        comparison=comparison,
        backend=backend,
        instruction_set=environment.instruction_set(),
    )
    report.print_report(outcome, console)
    report.save_picture(outcome, out / "reward.png")
    report.save_json(outcome, out / "report.json")
    console.print(f"Reward curve: {out / 'reward.png'}\nAll figures:  {out / 'report.json'}", soft_wrap=True)
    return result


def _compare(policy: Policy, result: Run, progress: LiveProgress) -> Comparison | None:
    """Whoever pressed Ctrl-C does not want to wait for this."""
    from .measure import compare

    if result.interrupted or result.last is None:
        return None
    progress.phase("comparing with eager PyTorch")
    try:
        with result.timed("comparison"):
            return compare(policy, result.last, result.settings.loss_config())
    except KeyboardInterrupt:
        result.interrupted = True
        return None
