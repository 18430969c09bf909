"""What this machine and this installation are: for reports, and for `grpo-kernels doctor`."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import grpo_kernels as gk

from ..backends import resolve

PACKAGES = ("torch", "triton", "transformers", "numpy")
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "verl")
NOT_INSTALLED = "not installed"


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of this library, Python and `packages`, or "not installed"."""
    ours = {"grpo-kernels": gk.__version__, "python": platform.python_version()}
    return ours | {package: installed(package) or NOT_INSTALLED for package in packages}


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def default_backend(device: str = "cpu") -> str:
    return resolve("auto", torch.device(device))


def instruction_set(backend: str) -> str:
    """What the kernels that run use: ours on `cpu`, PyTorch's own on any other backend."""
    if backend == "cpu":
        from ..backends.cpu import instruction_set as native

        return native()
    return torch.backends.cpu.get_cpu_capability().lower()


def devices() -> list[str]:
    names = [f"cpu ({platform.machine()}, threads: {torch.get_num_threads()})"]
    if torch.cuda.is_available():
        names += [f"cuda:{i} ({gpu_name(i)})" for i in range(torch.cuda.device_count())]
    return names


def gpu_name(index: int) -> str:
    """Its model, memory and compute capability."""
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}"
