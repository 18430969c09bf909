"""What the demo leaves behind: two tables, a picture of the reward and every figure as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import grpo_kernels as gk

from .. import environment
from ..pictures import picture
from ..tables import Table
from ..units import readable_bytes
from .measure import LARGER, Comparison
from .train import Evaluation, Run

MISSING = "not measured"


@dataclass(frozen=True)
class Report:
    policy: str
    task: str
    rule: str
    run: Run
    comparison: Comparison | None
    backend: str
    instruction_set: str

    @property
    def setup(self) -> str:
        """One line: which loss, which kernels."""
        config = self.run.settings.loss_config()
        return (
            f"{config.objective}, {config.kl_coef:g} x {config.kl_estimator}, {config.aggregation}; "
            f"backend {self.backend} ({self.instruction_set}), threads: {torch.get_num_threads()}"
        )


def print_report(report: Report, console: Console) -> None:
    run = report.run
    if run.interrupted:
        console.print(f"[yellow]Stopped early:[/yellow] {len(run.steps)} of {run.settings.steps} steps done.")
    console.print(_rewards(report))
    console.print(_reward_note(report), style="dim")
    if run.before:
        console.print(_examples(run.before, run.after))
    console.print(_losses(report))
    console.print(_loss_note(report), style="dim")


def _rewards(report: Report) -> Table:
    run = report.run
    rows: list[tuple[str, ...]] = [
        (label, *(f"{getattr(e, name):.3f}" if e else MISSING for e in (run.before, run.after)))
        for label, name in (("mean reward", "reward"), ("of it: correct", "correct"), ("of it: form", "form"))
    ]
    if run.steps:
        first, last = run.steps[0], run.steps[-1]
        rows += [(), ("training batch, first and last step", f"{first.reward:.3f}", f"{last.reward:.3f}")]
    return Table(("", "before", "after"), rows, f"{report.policy}, {report.task}: {len(run.steps)} GRPO steps")


def _reward_note(report: Report) -> str:
    evaluation = report.run.before
    judged = (
        f"Before and after: {evaluation.samples} answers sampled at temperature 1 to the same "
        f"{report.run.settings.evaluation_prompts} problems, none of them trained on, with the same random numbers. "
        if evaluation
        else ""
    )
    return f"{judged}Reward: {report.rule}."


def _examples(before: Evaluation, after: Evaluation | None) -> Table:
    rows = [
        (question, repr(answer), repr(after.examples[i][1]) if after else MISSING)
        for i, (question, answer) in enumerate(before.examples)
    ]
    return Table(("problem", "first answer before", "first answer after"), rows, "held-out problems", left=3)


def _losses(report: Report) -> Table:
    headings = ("", "grpo_kernels", "eager PyTorch", "difference")
    title = "the same loss on the same batch, forward and backward"
    if (c := report.comparison) is None:
        return Table(headings, [("loss, gradients, time, memory", *[MISSING] * 3)], title)
    rows: list[tuple[str, ...]] = [("loss", f"{c.fused_loss:+.7f}", f"{c.eager_loss:+.7f}", f"{c.loss_difference:.1e}")]
    errors = {"gradient, hidden states": c.hidden_gradient_error, "gradient, head weight": c.weight_gradient_error}
    for label, error in errors.items():
        rows.append((label, "", "", "no signal" if error is None else f"{error:.1e} relative"))
    seconds = c.fused.seconds, c.eager.seconds
    rows.append(("time", *(f"{1e3 * s:,.1f} ms" for s in seconds), _times(*seconds, "faster", "slower")))
    peaks = {
        "peak memory": (c.fused.peak_bytes, c.eager.peak_bytes),
        f"peak memory, {LARGER} x the batch": (c.fused.larger_peak_bytes, c.eager.larger_peak_bytes),
    }
    for label, pair in peaks.items():
        rows.append((label, *map(readable_bytes, pair), _times(*pair, "less", "more")))
    return Table(headings, rows, title)


def _times(ours: float, theirs: float, better: str, worse: str) -> str:
    return f"{theirs / ours:.2f} x {better}" if ours <= theirs else f"{ours / theirs:.2f} x {worse}"


def _loss_note(report: Report) -> str:
    if (c := report.comparison) is None:
        return report.setup
    no_signal = (
        "No signal: in every group all rewards were equal, so there is no gradient to compare. "
        if c.hidden_gradient_error is None
        else ""
    )
    return (
        f"{report.setup}. Batch: {c.rows} token positions, {c.active_rows} of them in the mask, "
        f"vocabulary {c.vocabulary:,}, fp32. Relative: largest difference / largest value. "
        f"{no_signal}Time: median of {c.rounds} interleaved rounds. "
        "Peak memory: what torch allocated above what was there before, gradients included, by its profiler."
    )


def save_json(report: Report, path: Path) -> None:
    run = report.run
    figures: dict[str, Any] = {
        "policy": report.policy,
        "task": report.task,
        "rule": report.rule,
        "interrupted": run.interrupted,
        "settings": asdict(run.settings),
        "loss_config": _config(run.settings.loss_config()),
        "backend": report.backend,
        "instruction_set": report.instruction_set,
        "threads": torch.get_num_threads(),
        "devices": environment.devices(),
        "versions": environment.versions(),
        "before": asdict(run.before) if run.before else None,
        "after": asdict(run.after) if run.after else None,
        "comparison": asdict(report.comparison) if report.comparison else None,
        "seconds": run.seconds,
        "steps": [asdict(step) for step in run.steps],
    }
    path.write_text(json.dumps(figures, indent=2) + "\n")


def _config(config: gk.LossConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config) if field.init}


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, `window` at most."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def save_picture(report: Report, path: Path) -> None:
    run = report.run
    numbers, rewards = [step.step for step in run.steps], [step.reward for step in run.steps]
    window = max(3, len(rewards) // 20)
    held_out = [(0, run.before), (len(numbers) + 1, run.after)]
    judged = [(at, evaluation.reward) for at, evaluation in held_out if evaluation]
    with picture(path, 8, 4.5) as figure:
        axes = figure.subplots()
        axes.plot(numbers, rewards, "o-", color="tab:blue", alpha=0.35, ms=3, label="mean of the batch")
        axes.plot(numbers, smooth(rewards, window), color="tab:blue", lw=2, label=f"mean of {window} steps")
        if judged:
            axes.plot(*zip(*judged, strict=True), "D", color="tab:orange", label="held-out problems")
        axes.legend(loc="lower right")
        axes.set(xlabel="GRPO step", ylabel="mean reward (0 to 1)", ylim=(-0.02, 1.02))
        axes.set_title(f"{report.policy}, {report.task}\n{report.setup}")
        axes.grid()
