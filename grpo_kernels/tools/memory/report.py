"""The answers of `grpo-kernels memory` as tables: what a loss step takes, what holds its peak, what a method takes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from ..providers import PATHS
from .labels import short_dtype
from .measure import GIB, Outcome, bytes_of_inputs
from .predict import formula_of, largest_batch
from .profile import Holding, MemoryProfile, readable
from .shape import LossShape
from .training import TrainingMemory

_HELD = {True: "where the formulas are held to measurements", False: "where no formula has met a GPU yet"}
MEASURED_ONLY = "measured only"  # there is no formula
_SHARE = 0.1  # of the peak: who holds less is not named in a row


def step_table(found: Sequence[Outcome], shape: LossShape, path: str, fit: float) -> Table:
    """One row a provider with a figure, the least memory first."""
    there = "the logits" if path == "logits" else "hidden states and lm_head"
    table = Table(
        title=f"{PATHS[path]}: peak in addition to {there} ({readable(bytes_of_inputs(shape, path))})",
        title_justify="left",
    )
    table.add_column("provider", no_wrap=True)
    for heading in ("measured", "predicted", "off by", "x logits", f"fit in {fit:g} GiB"):
        table.add_column(heading, justify="right")
    for outcome in _in_order(found):
        table.add_row(*_row(outcome, shape, path, fit))
    return table


def held_table(found: Sequence[Outcome]) -> Table:
    """What holds the peak of each provider, and why one was not measured."""
    table = Table("provider", "what holds the peak", show_edge=False, box=None)
    for outcome in _in_order(found):
        holdings = outcome.profile or outcome.prediction
        held = [] if holdings is None else [_held(holdings.at_peak)]
        table.add_row(outcome.provider, escape("; ".join([*([outcome.reason] if outcome.reason else []), *held])))
    return table


def _in_order(found: Sequence[Outcome]) -> list[Outcome]:
    return sorted((o for o in found if o.peak is not None), key=lambda o: (o.profile is None, o.peak))


def _row(outcome: Outcome, shape: LossShape, path: str, fit: float) -> list[str]:
    profile, prediction = outcome.profile, outcome.prediction
    measured = "" if profile is None else readable(profile.peak)
    predicted, off = MEASURED_ONLY if prediction is None else readable(prediction.peak), ""
    if profile is not None and prediction is not None:
        off = f"{100 * (prediction.peak / profile.peak - 1):+.1f} %"
    share = "" if outcome.peak is None else f"{outcome.peak / shape.logits:.2f}"
    return [outcome.provider, measured, predicted, off, share, _largest(outcome.provider, shape, path, fit)]


def _held(holdings: Sequence[Holding]) -> str:
    peak = sum(h.nbytes for h in holdings)
    return "; ".join(f"{h.nbytes / max(peak, 1):.0%} {h.label}" for h in holdings if h.nbytes >= _SHARE * peak)


def _largest(provider: str, shape: LossShape, path: str, fit: float) -> str:
    if formula_of(provider, path) is None:
        return "-"
    budget = int(fit * GIB)
    if path == "linear":
        most = largest_batch(provider, shape, budget - shape.head, path, beside=shape.hidden_states // shape.sequences)
    else:
        most = largest_batch(provider, shape, budget, path, beside=shape.logits // shape.sequences)
    return f"{most:,}"


def step_note(found: Sequence[Outcome], shape: LossShape, path: str) -> str:
    """Who needs least, whoever it is, and how to read the table."""
    measured = [o for o in found if o.profile is not None] or [o for o in found if o.prediction is not None]
    if not measured:
        return f"Nothing measured and nothing predicted. {_not_shown(found)}"
    least = min(measured, key=lambda o: o.peak or 0)
    how = "measured" if least.profile is not None else f"predicted for {shape.device}, {_HELD[shape.on_cpu]}"
    missing = _not_shown(found)
    return (
        f"Least memory, {how}: {least.provider} ({escape(least.title)}). Bytes of tensors alive at one moment, above "
        "what is there before the step, gradients included. What fits is counted in sequences of "
        f"{shape.tokens:,} tokens, by the prediction, inputs included."
        + (f" {missing}" if missing else "")
    )


def _not_shown(found: Sequence[Outcome]) -> str:
    """Who has no figure, and why: a formula there is for ours and for eager PyTorch alone."""
    missing = "; ".join(f"{o.provider}: {o.reason or MEASURED_ONLY}" for o in found if o.peak is None)
    return f"Not in the table: {escape(missing)}." if missing else ""


def heading(model: str, shape: LossShape) -> str:
    return (
        f"{model}: {shape.sequences} sequences x {shape.tokens} tokens, vocabulary {shape.vocab:,}, hidden "
        f"{shape.hidden:,}, {short_dtype(shape.dtype)}, {shape.fill:.0%} of the tokens active. "
        f"All logits: {readable(shape.logits)}, in float32 {readable(shape.logits32)}."
    )


def training_table(states: Sequence[TrainingMemory], model: str, shape: LossShape, precision: str) -> Table:
    """Methods and losses side by side; the last one names every row."""
    title = f"the whole training state of {model} ({precision}), micro-batch {shape.sequences} x {shape.tokens}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for state in states:
        table.add_column(f"{state.method.upper()}, loss: {state.provider}", justify="right")
    by_label = [{h.label: h.nbytes for h in state.holdings} for state in states]
    for label in by_label[-1]:
        table.add_row(label, *(_gib(held[label]) if label in held else "" for held in by_label))
    table.add_section()
    table.add_row("in all", *(_gib(state.total) for state in states))
    return table


def training_note(grpo: TrainingMemory, ppo: TrainingMemory) -> str:
    less = f"GRPO needs {1 - grpo.total / ppo.total:.0%} less than PPO."
    return (
        f"{less} By formula, unsharded; with full checkpointing (one hidden state a layer and token); a frozen "
        "reference in both; a critic of the actor's size, updated after it. Not counted: scratch of attention, the "
        "sampler and its KV cache, a reward model, fragmentation."
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= GIB / 100 else readable(nbytes)


def profile_tables(profile: MemoryProfile) -> Table:
    """What held the peak of a profile from elsewhere."""
    table = Table(title=f"{profile.device}: peak {readable(profile.peak)} above the start", title_justify="left")
    table.add_column("allocated by")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for h in profile.at_peak[:20]:
        table.add_row(escape(h.label), readable(h.nbytes), f"{h.nbytes / max(profile.peak, 1):.0%}")
    return table
