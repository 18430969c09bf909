"""Measures a case: everybody is checked against ours first, then timed, interleaved."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..memory.peak import peak_memory
from ..providers import Provider, Run, both, given, in_one_line
from ..providers.batch import Batch
from .case import Case
from .clock import Clock, clock_for
from .timing import measure_interleaved

CHUNK, COMPARED_CHUNKS = 1 << 17, 64  # elements compared at a time; chunks of a tensor, evenly spread
# Relative L2 distance from ours. Halves round the gradient once, on the linear path before two more matmuls.
TOLERANCES = {"bf16": 5e-3, "fp16": 5e-3, "fp32": 1e-4}
LINEAR_TOLERANCES = {"bf16": 2e-2, "fp16": 2e-2, "fp32": 1e-4}
ROUNDED_PART = (slice(0, 2), slice(0, 16))  # of the batch, in float32: whose log-probs are rounded is checked there
PER_TOKEN = ("targets", "mask", "logps", "old_logps", "ref_logps")
UNTIMED_BYTES = 1 << 20  # inputs below this fit any cache: no flush


@dataclass(frozen=True)
class Options:
    """`seconds`: what a provider may take for its rounds of one case; their number lies within the bounds."""

    device: str = "cpu"
    seconds: float = 1.0
    least_rounds: int = 3
    most_rounds: int = 20
    memory: bool = True
    timed: bool = True  # False: only checked, as the tests do
    compile: bool = True  # False leaves out who needs seconds to compile
    strict: bool = False  # a provider that fails or differs raises instead of being reported so


class Differs(AssertionError):
    """A provider that computes something else than ours."""


def measure(case: Case, chosen: Sequence[Provider], options: Options) -> dict[str, Any]:
    """The record of a case; see docs/benchmarks.md for its fields."""
    device = options.device
    batch = case.batch(device)
    unit, copy = _unit(case, batch)
    record: dict[str, Any] = {
        "case": case.name, **case.to_json(), "device": device, "logits_bytes": case.logits_bytes,
        "input_bytes": batch.source.nbytes, "active_share": batch.tokens.mask.float().mean().item(),
        "unit": unit, "providers": {},
    }  # fmt: skip
    runs = _checked(case, batch, chosen, options, record["providers"])
    if not options.timed or not runs:
        return record
    calls, prepare = {}, {}
    for name, run in runs.items():
        calls[name], before = _step(run, case)
        if before is not None:
            prepare[name] = before
    clock = clock_for(device, flush=batch.source.nbytes > UNTIMED_BYTES or case.task.path == "linear")
    memory = options.memory and case.mode != "backward"
    return time_interleaved(record, calls, (unit, copy), options, clock=clock, prepare=prepare, memory=memory)


def time_interleaved(
    record: dict[str, Any], calls: dict[str, Callable[[], object]], unit: tuple[str, Callable[[], object]],
    options: Options, *, clock: Clock, prepare: dict[str, Callable[[], object]] | None = None, memory: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Adds what the calls take to the record of their providers."""
    prepare, calls = prepare or {}, {unit[0]: unit[1], **calls}
    first = measure_interleaved(calls, 1, prepare=prepare, clock=clock, warm_up=False)  # they have run, to be checked
    rounds = {name: _rounds(seconds[0], options) for name, seconds in first.items()}
    seconds = measure_interleaved(calls, rounds, prepare=prepare, clock=clock, warm_up=False)
    record["unit_seconds"] = summary(seconds.pop(unit[0]))
    for name, values in seconds.items():
        record["providers"][name] |= summary(values)
        if memory:
            record["providers"][name]["peak_bytes"] = peak_bytes(calls[name], prepare.get(name), options.device)
    return record


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles (with fewer than four rounds the extremes)."""
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 3 else (min(seconds), 0, max(seconds))
    return {"seconds": statistics.median(seconds), "low": low, "high": high, "rounds": len(seconds)}


def peak_bytes(call: Callable[[], object], prepare: Callable[[], object] | None = None, device: str = "cpu") -> int:
    """Tensors alive at one moment above what was there before the call, its results included."""
    if device == "cpu":
        return peak_memory(call, setup=prepare, warm_up=False, resident=False).tensor_bytes
    if prepare is not None:
        prepare()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _rounds(seconds: float, options: Options) -> int:
    return max(options.least_rounds, min(options.most_rounds, int(options.seconds / max(seconds, 1e-9))))


def _step(run: Run, case: Case) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """What is timed, and what comes before it untimed."""
    if case.mode == "both":
        return lambda: both(run, case.upstream), run.restore
    if case.mode == "forward":
        return run.forward, run.restore
    if case.mode == "no_grad":
        return torch.no_grad()(run.forward), run.restore
    graphs: list[Any] = []

    def forward() -> None:
        graphs.clear()
        if run.restore is not None:
            run.restore()
        graphs.append(run.forward())

    def backward() -> object:
        outputs, inputs = graphs.pop()
        return torch.autograd.grad(outputs[0], inputs, torch.full_like(outputs[0], case.upstream))

    return backward, forward


def _unit(case: Case, batch: Batch) -> tuple[str, Callable[[], object]]:
    """What every figure is a multiple of: a copy of the input, or on the linear path three matmuls."""
    if case.task.path == "linear":
        return "3 matmuls", _matmuls(batch)
    source = batch.source
    out = torch.zeros_like(source)  # mapped memory
    return "copy", lambda: out.copy_(source)


def _matmuls(batch: Batch) -> Callable[[], object]:
    """Logits of the active rows and both gradients into mapped memory: 6 N H V operations."""
    rows, head = given(batch.hidden)[batch.tokens.mask], given(batch.weight)
    logits = torch.zeros(rows.shape[0], head.shape[0], dtype=head.dtype, device=head.device)
    g_hidden, g_weight = torch.zeros_like(rows), torch.zeros_like(head)

    def run() -> None:
        torch.mm(rows, head.t(), out=logits)
        torch.mm(logits, head, out=g_hidden)
        torch.mm(logits.t(), rows, out=g_weight)

    return run


def _checked(
    case: Case, batch: Batch, chosen: Sequence[Provider], options: Options, found: dict[str, Any]
) -> dict[str, Run]:
    """Those that run and agree with the first of them; of all, title, version and reason are noted in `found`."""
    runs: dict[str, Run] = {}
    expected: tuple[Tensor, ...] | None = None
    reference: Provider | None = None
    for provider in chosen:
        if case.task.path not in provider.paths:
            continue
        entry = found[provider.name] = {"title": provider.title, "version": provider.version}
        able = provider.taking_part(case.task, options.device, compile=options.compile)
        if isinstance(able, str):
            entry["missing"] = able
            continue
        if able.compiles:  # the graphs of earlier cases go, or dynamo would stop at its limit of recompilations
            torch.compiler.reset()
        try:
            run = able.build(case.task, batch)
            if run.restore is not None:
                run.restore()
            values = both(run, case.upstream)
            if expected is None:
                expected, reference = values, able
            tolerance = (LINEAR_TOLERANCES if case.task.path == "linear" else TOLERANCES)[case.dtype]
            tolerance = max(tolerance, able.approximates)
            if able.rounded_logps and _in_halves(case, options.device):
                part = _float32_part(batch)
                theirs, ours = (both(p.build(case.task, part)) for p in (able, reference or able))
                distance(theirs, ours, TOLERANCES["fp32"])
                tolerance = math.inf  # the same computation, but for the rounding: how far it moves is noted
            entry["distance"] = distance(values, expected, tolerance)
        except Exception as error:  # a peer's failure is a result: out of memory, a compiler, another computation
            if options.strict:
                raise
            entry["failed"] = in_one_line(error)
            continue
        runs[provider.name] = run
    return runs


def _in_halves(case: Case, device: str) -> bool:
    """Whether log-probs from these logits are rounded by who computes them in the logits' dtype on a CPU."""
    return device == "cpu" and case.dtype != "fp32" and case.task.path in ("logits", "logps")


def _float32_part(batch: Batch) -> Batch:
    tokens = batch.tokens
    per_token = {name: getattr(tokens, name)[ROUNDED_PART] for name in PER_TOKEN}
    part = replace(tokens, advantages=tokens.advantages[ROUNDED_PART[0]], **per_token)
    return replace(batch, logits=given(batch.logits)[ROUNDED_PART].float(), tokens=part)


def distance(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> float:
    """The largest relative L2 distance of an output or gradient; raises Differs beyond the tolerance."""
    worst = 0.0
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if x.shape != y.shape:  # Liger's logits have one position more, which it ignores
            x = x[:, : y.shape[1]]
        relative = relative_distance(x, y)
        if not relative <= tolerance:
            raise Differs(f"computes something else: output {i} is {relative:.1e} from ours, tolerance {tolerance:.0e}")
        worst = max(worst, relative)
    return worst


def relative_distance(x: Tensor, y: Tensor) -> float:
    """L2, of some chunks of a tensor as large as the logits."""
    difference = norm = 0.0
    pairs = list(zip(x.detach().reshape(-1).split(CHUNK), y.detach().reshape(-1).split(CHUNK), strict=True))
    for a, b in pairs[:: max(1, len(pairs) // COMPARED_CHUNKS)]:
        difference += (a.float() - b.float()).square().sum(dtype=torch.float64).item()
        norm += b.float().square().sum(dtype=torch.float64).item()
    return (difference / norm) ** 0.5 if norm else difference**0.5
