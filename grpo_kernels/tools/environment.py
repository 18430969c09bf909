"""What this machine and this installation are: for reports, and for `grpo-kernels doctor`."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import grpo_kernels as gk

from ..backends import available_backends, resolve

PACKAGES = ("torch", "triton", "transformers", "numpy")
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "verl", "quack-kernels")
NOT_INSTALLED = "not installed"


def versions(packages: tuple[str, ...] = (*PACKAGES, *PEERS)) -> dict[str, str]:
    """Versions of this library, Python and `packages`, or "not installed"."""
    ours = {"grpo-kernels": gk.__version__, "python": platform.python_version()}
    return ours | {package: installed(package) or NOT_INSTALLED for package in packages}


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that this package lies in, "+" when files differ from it; None outside one."""
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


def machine_info() -> dict[str, Any]:
    """What a figure must be read with: processor, GPU, threads, instruction set, versions and commit."""
    gpu = f"{gpu_name(torch.cuda.current_device())}, CUDA {torch.version.cuda}" if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "packages": {name: found for name in ("triton", "transformers", *PEERS) if (found := installed(name))},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def default_backend(device: str = "cpu") -> str:
    return resolve("auto", torch.device(device))


def instruction_set() -> str:
    """What a loss on the CPU uses: our kernels', or PyTorch's own where ours are not here."""
    if available_backends()["cpu"] == "ok":
        from ..backends.cpu import instruction_set as native

        return native()
    return torch.backends.cpu.get_cpu_capability().lower()


def device_named(name: str, *, present: bool = True) -> str:
    """A command's --device, where "auto" is the GPU if there is one. Raises ValueError for one that is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or auto; got {name!r}")
    if name == "cuda" and present and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU here")
    return name


def devices() -> list[str]:
    names = [f"cpu ({platform.machine()}, threads: {torch.get_num_threads()})"]
    if torch.cuda.is_available():
        names += [f"cuda:{i} ({gpu_name(i)})" for i in range(torch.cuda.device_count())]
    return names


def gpu_name(index: int) -> str:
    """Its model, memory and compute capability."""
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}"
