"""Timing that survives a noisy machine: providers take turns, and every figure is a ratio within one run.

The unit is ``copy``: ``out.copy_(logits)`` into memory that is mapped already. It moves as many bytes as a loss and its
gradient must, so its time is the floor.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import cpu


@dataclass(frozen=True)
class Shape:
    """The lm_head of a model: [vocab, hidden]."""

    model: str
    vocab: int
    hidden: int


SHAPES = {
    "smollm2": Shape("SmolLM2-135M", 49152, 576),
    "llama3": Shape("Llama-3.2-1B", 128256, 2048),
    "qwen2.5": Shape("Qwen2.5-0.5B", 151936, 896),
    "qwen3": Shape("Qwen3-0.6B", 151936, 1024),
    "gemma3": Shape("Gemma-3-1B", 262144, 1152),
}


@dataclass(frozen=True)
class Provider:
    """Who computes it, and how often: the slow ones vary less and cost more."""

    name: str
    description: str
    rounds: int


PROVIDERS = {
    p.name: p
    for p in (
        Provider("ours", "this library, backend cpu", 9),
        Provider("eager", "plain PyTorch, float32 log-softmax, autograd", 3),
        Provider("compile", "torch.compile of the eager function", 3),
        Provider("copy", "out.copy_(logits) into mapped memory", 9),
    )
}


def measure_interleaved(
    providers: Mapping[str, Callable[[], object]],
    rounds: int | Mapping[str, int],
    setup: Callable[[], object] | None = None,
    *,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each call of each provider. They take turns, so that a disturbance of the machine hits all alike.

    Args:
        providers: by name.
        rounds: calls of each provider, or by name; the fewer ones are spread over the rounds of the others.
        setup: called before every call of every provider, untimed, so that all start from the same caches.
        warm_up: call each provider once before the first round, untimed.
    """
    wanted = {name: rounds if isinstance(rounds, int) else rounds[name] for name in providers}
    total = max(wanted.values())
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    if warm_up:
        for name in names:
            _timed(providers[name], setup)
    for turn in range(total):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same neighbour
            if (turn + 1) * wanted[name] // total > turn * wanted[name] // total:
                seconds[name].append(_timed(providers[name], setup))
    return seconds


def _timed(run: Callable[[], object], setup: Callable[[], object] | None) -> float:
    if setup is not None:
        setup()
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - begin
        del result  # its memory goes back before the next provider's turn, outside the timing
        return seconds
    finally:
        if collecting:
            gc.enable()


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


class _Produced(torch.autograd.Function):
    """Logits as a model hands them over: part of a graph, and in memory that may be overwritten."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def produced(logits: Tensor) -> Tensor:
    """`logits` as a non-leaf that shares their memory: what `inplace` needs, without a copy."""
    return _Produced.apply(torch.zeros((), requires_grad=True), logits)


def machine_info() -> dict[str, Any]:
    """What a figure must be read with: CPU, cores, threads, instruction set, versions and commit."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Of the checkout that this package lies in, "+" when files differ from it; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
