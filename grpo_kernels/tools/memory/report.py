"""The answers of `grpo-kernels memory` as tables: what a loss step takes, what holds its peak, what a method takes."""

from __future__ import annotations

from collections.abc import Sequence

from ..providers import PATHS
from ..tables import Table
from ..units import GIB, readable_bytes
from .labels import short_dtype
from .measure import Outcome, bytes_of_inputs
from .predict import formula_of, largest_batch
from .profile import Holding
from .shape import LossShape
from .training import TrainingMemory

_HELD = {True: "where the formulas are held to measurements", False: "where no formula has met a GPU yet"}
MEASURED_ONLY = "measured only"  # there is no formula
_SHARE = 0.1  # of the peak: who holds less is not named in a row


def step_table(found: Sequence[Outcome], shape: LossShape, path: str, fit: float) -> Table:
    """One row a provider with a figure, the least memory first."""
    there = "the logits" if path == "logits" else "hidden states and lm_head"
    title = f"{PATHS[path]}: peak in addition to {there} ({readable_bytes(bytes_of_inputs(shape, path))})"
    headings = ("provider", "measured", "predicted", "off by", "x logits", f"fit in {fit:g} GiB")
    return Table(headings, [_row(outcome, shape, path, fit) for outcome in _in_order(found)], title)


def held_table(found: Sequence[Outcome]) -> Table:
    """What holds the peak of each provider, and why one was not measured."""
    rows = []
    for outcome in _in_order(found):
        holdings = outcome.profile or outcome.prediction
        held = [] if holdings is None else [_held(holdings.at_peak)]
        rows.append((outcome.provider, "; ".join([*([outcome.reason] if outcome.reason else []), *held])))
    return Table(("provider", "what holds the peak"), rows, left=2)


def _in_order(found: Sequence[Outcome]) -> list[Outcome]:
    return sorted((o for o in found if o.peak is not None), key=lambda o: (o.profile is None, o.peak))


def _row(outcome: Outcome, shape: LossShape, path: str, fit: float) -> list[str]:
    profile, prediction = outcome.profile, outcome.prediction
    measured = "" if profile is None else readable_bytes(profile.peak)
    predicted = MEASURED_ONLY if prediction is None else readable_bytes(prediction.peak)
    off = "" if profile is None or prediction is None else f"{100 * (prediction.peak / profile.peak - 1):+.1f} %"
    share = "" if outcome.peak is None else f"{outcome.peak / shape.logits:.2f}"
    return [outcome.provider, measured, predicted, off, share, _largest(outcome.provider, shape, path, fit)]


def _held(holdings: Sequence[Holding]) -> str:
    peak = sum(h.nbytes for h in holdings)
    return "; ".join(f"{h.nbytes / max(peak, 1):.0%} {h.label}" for h in holdings if h.nbytes >= _SHARE * peak)


def _largest(provider: str, shape: LossShape, path: str, fit: float) -> str:
    if formula_of(provider, path) is None:
        return "-"
    once, each = (shape.head, shape.hidden_states) if path == "linear" else (0, shape.logits)
    most = largest_batch(provider, shape, int(fit * GIB) - once, path, beside=each // shape.sequences)
    return f"{most:,}"


def step_note(found: Sequence[Outcome], shape: LossShape, path: str) -> str:
    """Who needs least, whoever it is, how to read the table, and who is not in it."""
    missing = "; ".join(f"{o.provider}: {o.reason or MEASURED_ONLY}" for o in found if o.peak is None)
    missing = f" Not in the table: {missing}." if missing else ""
    shown = _in_order(found)
    if not shown:
        return f"{PATHS[path]}: nothing measured and nothing predicted.{missing}"
    least = shown[0]
    how = "measured" if least.profile is not None else f"predicted for {shape.device}, {_HELD[shape.on_cpu]}"
    return (
        f"Least memory, {how}: {least.provider} ({least.title}). Bytes of tensors alive at one moment, above what is "
        "there before the step, gradients included. What fits is counted in sequences of "
        f"{shape.tokens:,} tokens, by the prediction, inputs included.{missing}"
    )


def heading(model: str, shape: LossShape) -> str:
    return (
        f"{model}: {shape.sequences} sequences x {shape.tokens} tokens, vocabulary {shape.vocab:,}, hidden "
        f"{shape.hidden:,}, {short_dtype(shape.dtype)}, {shape.fill:.0%} of the tokens active. "
        f"All logits: {readable_bytes(shape.logits)}, in float32 {readable_bytes(shape.logits32)}."
    )


def training_table(states: Sequence[TrainingMemory], model: str, shape: LossShape, precision: str) -> Table:
    """Methods and losses side by side; the last one names every row."""
    by_label = [{h.label: readable_bytes(h.nbytes) for h in state.holdings} for state in states]
    rows: list[tuple[str, ...]] = [(label, *(held.get(label, "") for held in by_label)) for label in by_label[-1]]
    rows.append(())
    rows.append(("in all", *(readable_bytes(state.total) for state in states)))
    title = f"the whole training state of {model} ({precision}), micro-batch {shape.sequences} x {shape.tokens}"
    return Table(("", *(f"{state.method.upper()}, loss: {state.provider}" for state in states)), rows, title)


def training_note(grpo: TrainingMemory, ppo: TrainingMemory) -> str:
    less = f"GRPO needs {1 - grpo.total / ppo.total:.0%} less than PPO."
    return (
        f"{less} By formula, unsharded; with full checkpointing (one hidden state a layer and token); a frozen "
        "reference in both; a critic of the actor's size, updated after it. Not counted: scratch of attention, the "
        "sampler and its KV cache, a reward model, fragmentation."
    )
