"""Timing that survives a noisy machine: providers are interleaved, and every figure is a ratio within one run.

The unit of what reads logits is ``copy``: ``out.copy_(logits)`` into memory that is mapped already. It moves as many
bytes as a loss and its gradient must, so its time is the floor.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...backends import available_backends
from ..environment import gpu_name, installed, instruction_set
from .clock import Clock, WallClock

PACKAGES = ("triton", "trl", "liger-kernel", "cut-cross-entropy", "verl", "quack-kernels", "transformers")


def measure_interleaved(
    providers: Mapping[str, Callable[[], object]],
    rounds: int | Mapping[str, int],
    setup: Callable[[], object] | None = None,
    *,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    clock: Clock | None = None,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each call of each provider. Interleaved, so that a disturbance of the machine hits all alike.

    Args:
        providers: by name.
        rounds: calls of each provider, or by name; the fewer ones are spread over the rounds of the others.
        setup: called before every call of every provider, untimed, so that all start from the same caches.
        prepare: by name, called before every call of that provider, untimed: restores what the last call overwrote.
        clock: the wall clock when left out. Its flush is the last thing before each call.
        warm_up: call each provider once before the first round, untimed.
    """
    clock, prepare = clock or WallClock(), prepare or {}

    def timed(name: str) -> float:
        for before in (setup, prepare.get(name)):
            if before is not None:
                before()
        clock.flush()
        return clock.seconds(providers[name])

    wanted = {name: rounds if isinstance(rounds, int) else rounds[name] for name in providers}
    total = max(wanted.values())
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    if warm_up:
        for name in names:
            timed(name)
    for turn in range(total):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same neighbour
            if (turn + 1) * wanted[name] // total > turn * wanted[name] // total:
                seconds[name].append(timed(name))
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine_info() -> dict[str, Any]:
    """What a figure must be read with: processor, GPU, threads, instruction set, versions and commit."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instruction_set": instruction_set("cpu" if available_backends()["cpu"] == "ok" else "reference"),
        "gpu": _gpu(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
    }


def device_of(machine: Mapping[str, Any]) -> str:
    """The one that two results must share to be compared: the GPU, else the processor and how much of it."""
    return machine.get("gpu") or f"{machine['cpu']}, {machine['torch_threads']} threads, {machine['instruction_set']}"


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    return f"{gpu_name(torch.cuda.current_device())}, CUDA {torch.version.cuda}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, "+" when files differ from it; None outside one."""
    root = Path(__file__).resolve().parents[3]
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
