"""Describes the machine in a last line of JSON: device, versions, and the milliseconds of the unit, a copy."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
from typing import Any

import torch

from grpo_kernels.tools.environment import commit, installed

from .measure import milliseconds

PACKAGES = ("torch", "triton", "pytest", "pytest-timeout", "pybind11", "ninja", "liger-kernel", "trl")
COPIED_BYTES = 1 << 30


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: found for name in PACKAGES if (found := installed(name))}


def describe(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"name": "cpu", "capability": None}
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name, "capability": [p.major, p.minor], "memory": p.total_memory, "cuda": torch.version.cuda,
        "multiprocessors": p.multi_processor_count, "l2_bytes": p.L2_cache_size,
    }  # fmt: skip


def tool(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip()[-400:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here: nothing was checked (--dry exercises the script itself)")
    size = COPIED_BYTES if device != "cpu" else 1 << 22
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device)
    query = "name,driver_version,temperature.gpu,clocks.sm,clocks.mem,memory.used"
    print(json.dumps({
        "device": describe(device), "versions": versions(), "commit": commit(), "copy_ms": copy,
        "copy_bytes_per_second": 2 * size / copy * 1e3,
        "nvidia_smi": tool("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "nvcc": tool("nvcc", "--version"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
