"""What is installed, what would run, and whether it computes what the reference computes."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import grpo_kernels as gk

from . import environment

TOLERANCE = 1e-4  # fp32 gradients of a few thousand terms; a wrong formula is off by far more


@dataclass(frozen=True)
class SelfTest:
    error: float  # largest relative difference among loss and gradients
    seconds: float

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE  # false for NaN

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'FAILED'}, differs by {self.error:.1e} from the reference"


def self_test(backend: str = "auto") -> SelfTest:
    """The fused linear loss, off-policy with KL, entropy and a ragged mask, on `backend` and on the reference."""
    begin = time.perf_counter()
    pairs = zip(_loss_and_gradients(backend), _loss_and_gradients("reference"), strict=True)
    errors = [((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs]
    worst = max(errors, key=lambda error: (error != error, error))  # a NaN is the worst of all
    return SelfTest(worst, time.perf_counter() - begin)


def _loss_and_gradients(backend: str) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    rows, tokens, width, vocabulary = 8, 24, 64, 5003
    hidden = torch.randn(rows, tokens, width, generator=draw).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=draw).mul_(0.2).requires_grad_()
    targets = torch.randint(vocabulary, (rows, tokens), generator=draw)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=draw)
    with torch.no_grad():
        logps = gk.linear_token_logps(hidden, weight, targets, backend="reference").logps
    old, ref = (logps + 0.2 * torch.randn(rows, tokens, generator=draw) for _ in range(2))
    out = gk.linear_grpo_loss(
        hidden, weight, targets, torch.randn(rows, generator=draw), mask, old_logps=old, ref_logps=ref,
        config=gk.LossConfig(kl_coef=0.05, entropy_coef=0.01), backend=backend,
    )  # fmt: skip
    return out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))


def print_diagnosis(console: Console) -> bool:
    """Tables, the self-test and the line for a bug report; whether the self-test passed."""
    backend = environment.default_backend()
    versions = environment.versions()
    test = self_test()

    table = Table(title="grpo-kernels doctor", title_justify="left", show_header=False)
    for package, version in versions.items():
        table.add_row(package, version)
    table.add_section()
    for device in environment.devices():
        table.add_row("device", escape(device))
    table.add_row("instruction set", environment.instruction_set(backend))
    table.add_section()
    for name, state in gk.available_backends().items():
        table.add_row(f"backend {name}", f"[green]{state}[/green]" if state == "ok" else escape(state))
    table.add_row('"auto" on the CPU', backend)
    table.add_section()
    table.add_row("self-test", f"{test}, {test.seconds:.1f} s")
    console.print(table)
    console.print("For a bug report:")
    console.print(_summary(versions, backend, test), soft_wrap=True, highlight=False, markup=False)
    return test.passed


def _summary(versions: dict[str, str], backend: str, test: SelfTest) -> str:
    present = [f"{name} {version}" for name, version in versions.items() if version != "not installed"]
    kernels = f"{backend} ({environment.instruction_set(backend)}), threads: {torch.get_num_threads()}"
    return "; ".join([*present, f"{platform.system()} {platform.machine()}", kernels, f"self-test {test}"])
