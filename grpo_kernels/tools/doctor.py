"""`grpo-kernels doctor`: what is installed, what would run, and whether it computes what the reference computes."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.text import Text

import grpo_kernels as gk

from ..backends import BackendUnavailable, resolve
from . import environment
from .memory.formulas import chunks_of
from .memory.shape import LossShape
from .providers import in_one_line
from .shapes import shape_named
from .tables import Table

TOLERANCE = 1e-4  # fp32 gradients of a few thousand terms; a wrong formula is off by far more


@dataclass(frozen=True)
class SelfTest:
    backend: str
    device: str
    error: float  # largest relative difference among loss and gradients
    seconds: float
    failure: str | None = None  # why it did not run to its end

    @property
    def passed(self) -> bool:
        return self.failure is None and self.error <= TOLERANCE  # false for NaN

    def __str__(self) -> str:
        if self.failure is not None:
            return f"FAILED, {self.failure}"
        return f"{'ok' if self.passed else 'FAILED'}, differs by {self.error:.1e} from the reference"


def self_tests() -> list[SelfTest]:
    """Tests every backend that is here, on the device that it is for."""
    here = [name for name, state in gk.available_backends().items() if state == "ok" and name != "reference"]
    gpu = torch.cuda.is_available()
    return [self_test(name, "cuda" if gpu and name != "cpu" else "cpu") for name in here]


def self_test(backend: str = "auto", device: str = "cpu") -> SelfTest:
    """The fused linear loss, off-policy with KL, entropy and a ragged mask, on `backend` and on the reference."""
    begin = time.perf_counter()
    try:
        found = _loss_and_gradients(backend, device)
    except Exception as error:  # a diagnosis reports whatever it meets
        return SelfTest(backend, device, float("nan"), time.perf_counter() - begin, in_one_line(error))
    pairs = zip(found, _loss_and_gradients("reference", "cpu"), strict=True)
    errors = [((ours.cpu() - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs]
    worst = max(errors, key=lambda error: (error != error, error))  # a NaN is the worst of all
    return SelfTest(backend, device, worst, time.perf_counter() - begin)


def _loss_and_gradients(backend: str, device: str) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    rows, tokens, width, vocabulary = 8, 24, 64, 5003
    hidden = torch.randn(rows, tokens, width, generator=draw)
    weight = torch.randn(vocabulary, width, generator=draw).mul_(0.2)
    targets = torch.randint(vocabulary, (rows, tokens), generator=draw)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=draw)
    logps = gk.linear_token_logps(hidden, weight, targets, backend="reference").logps
    old, ref = (logps + 0.2 * torch.randn(rows, tokens, generator=draw) for _ in range(2))
    inputs = (hidden, weight, targets, torch.randn(rows, generator=draw), mask, old, ref)
    hidden, weight, targets, advantages, mask, old, ref = (x.to(device) for x in inputs)
    hidden.requires_grad_(), weight.requires_grad_()
    out = gk.linear_grpo_loss(
        hidden, weight, targets, advantages, mask, old_logps=old, ref_logps=ref,
        config=gk.LossConfig(kl_coef=0.05, entropy_coef=0.01), backend=backend,
    )  # fmt: skip
    return out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))


# ---- which kernel would run ----


class Plan(NamedTuple):
    """What a call would run."""

    call: str
    device: str
    backend: str
    kernels: str


def plans(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> list[Plan]:
    """For each device here: the kernels of a loss of `rows` tokens, without running one."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [plan for device in ("cpu", *gpus) for plan in _plans(device, rows, vocab, hidden, dtype)]


def _plans(device: str, rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> Iterator[Plan]:
    try:
        backend = resolve("auto", torch.device(device))
    except BackendUnavailable as error:
        yield Plan("every loss", device, "none", error.reason)
        return
    except ValueError as error:  # a GPU that is too old next to one that is not
        yield Plan("every loss", device, "none", str(error))
        return
    chunks, largest = chunks_of(LossShape(1, rows, vocab, hidden, dtype, device=device))
    linear = f"{chunks} chunk{'s' * (chunks > 1)} of {largest} rows at most"
    one, two = "loss and gradient in one launch", "log-probs, then the gradient: two launches"
    yield Plan("grpo_loss, token-level ratio", device, backend, f"row_policy: {one}")
    yield Plan("grpo_loss, sequence-level ratio", device, backend, f"row_forward, row_backward: {two}")
    yield Plan("linear_grpo_loss", device, backend, f"{linear}: matmul, row_policy in place, two matmuls")


# ---- the command ----


def doctor(
    model: Annotated[str, typer.Option(help="For whose shape to say what would run.")] = "qwen2.5-0.5b",
    rows: Annotated[int, typer.Option(min=1, help="Tokens of that batch.")] = 4096,
) -> None:
    """Versions, devices, backends, what would run, a self-test, and one line to paste into a bug report."""
    try:
        shape = shape_named(model)
    except ValueError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    if not print_diagnosis(Console(), rows=rows, vocab=shape.vocab, hidden=shape.hidden):
        raise typer.Exit(1)


def print_diagnosis(
    console: Console, *, rows: int, vocab: int, hidden: int, dtype: torch.dtype = torch.bfloat16
) -> bool:
    """Tables, the self-tests and the line for a bug report; whether all self-tests passed."""
    tests = self_tests()
    versions = environment.versions()
    console.print(_installation(versions))
    console.print(_backends(tests))
    console.print(_kernels(rows, vocab, hidden, dtype))
    console.print("For a bug report:")
    console.print(_summary(versions, tests), soft_wrap=True, highlight=False, markup=False)
    return bool(tests) and all(test.passed for test in tests)


def _installation(versions: dict[str, str]) -> Table:
    missing = environment.NOT_INSTALLED
    rows = [(package, Text(version, "dim" if version == missing else "")) for package, version in versions.items()]
    found = [("device", device) for device in environment.devices()]
    return Table(
        ("", ""), [*rows, (), *found, ("instruction set", environment.instruction_set())], "grpo-kernels doctor", left=2
    )


def _backends(tests: list[SelfTest]) -> Table:
    by_name = {test.backend: test for test in tests}
    rows = []
    for name, state in gk.available_backends().items():
        test = by_name.get(name)
        result = Text("is what the others are compared with" if name == "reference" else "did not run")
        if test is not None:
            colour = "green" if test.passed else "red"
            result = Text(f"{test}, {test.seconds:.1f} s on {test.device}", colour)
        rows.append((name, Text(state, "green" if state == "ok" else ""), result))
    return Table(("backend", "state", "self-test"), rows, "backends", left=3)


def _kernels(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> Table:
    name = str(dtype).removeprefix("torch.")
    title = f'what backend="auto" would run: {rows:,} tokens, vocabulary {vocab:,}, hidden {hidden:,}, {name}'
    return Table(("call", "device", "backend", "kernels"), plans(rows, vocab, hidden, dtype), title, left=4)


def _summary(versions: dict[str, str], tests: list[SelfTest]) -> str:
    present = [f"{name} {version}" for name, version in versions.items() if version != environment.NOT_INSTALLED]
    ran = [f"self-test {test.backend} on {test.device} {test}" for test in tests] or ["no backend ran a self-test"]
    kernels = f"instruction set {environment.instruction_set()}"
    gpus = environment.devices()[1:]
    system = f"{platform.system()} {platform.machine()}"
    return "; ".join([*present, system, f"threads: {torch.get_num_threads()}", kernels, *gpus, *ran])
