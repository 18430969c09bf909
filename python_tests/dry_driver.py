"""A Triton driver for a GPU that is not there: every launch is compiled for its target, none is run.

It takes the real path from Python, so it counts variants, checks grids and shared memory, and tells what a kernel uses.
For a process of its own, without TRITON_INTERPRET:

    dry = dry_run("cuda", 90)
    backend.row_forward(rows, False)  # grpo_kernels.backends.triton, on CPU tensors whose data nobody reads
    [resources(k) for k in dry.variants(stats_kernel)]
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

GRID_LIMITS = (2**31 - 1, 65535, 65535)
# Of one program at most, and multiprocessors: A100, H100, B200, MI300X; RTX 3090, L40S, RTX 5090.
SHARED_BYTES: dict[int | str, int] = {
    80: 163 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10, 86: 99 << 10, 89: 99 << 10, 120: 99 << 10
}  # fmt: skip
PROCESSORS: dict[int | str, int] = {80: 108, 90: 132, 100: 148, "gfx942": 304, 86: 82, 89: 142, 120: 170}


# Accesses of 16 bytes.
WIDE = {"cuda": ("ld.global.v4.b32", "st.global.v4.b32"), "hip": ("global_load_dwordx4", "global_store_dwordx4")}


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]


class Resources(NamedTuple):
    registers: int  # per thread
    spilled: int  # bytes of local memory per thread: to be 0
    shared: int  # bytes of a program


class DryDriver:
    """What triton.runtime.driver.active is asked for."""

    def __init__(self, target: GPUTarget):
        self.target, self.launches = target, (log := list[Launch]())

        class Launcher:
            def __init__(self, _: Any, metadata: Any):
                self.name = metadata.name

            def __call__(self, *args: Any) -> None:
                grid = args[:3]
                if not all(0 < size <= limit for size, limit in zip(grid, GRID_LIMITS, strict=True)):
                    raise ValueError(f"{self.name}: a grid must be within {GRID_LIMITS}; got {grid}")
                log.append(Launch(self.name, grid))

        class Utils:
            @staticmethod
            def get_device_properties(_: Any) -> dict[str, int]:
                return {"max_shared_mem": SHARED_BYTES[target.arch], "multiprocessor_count": PROCESSORS[target.arch]}

            @staticmethod
            def load_binary(*_: Any) -> tuple[int, ...]:
                return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads a program may have

        self.launcher_cls, self.utils = Launcher, Utils

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # keys each kernel's cache by target

    def set_current_device(self, device: Any) -> None: ...

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def variants(self, kernel: Any) -> list[Any]:
        """Everything compiled of a kernel for this target."""
        return list(kernel.device_caches[str(self.target)][0].values())


def dry_run(backend: str, arch: int | str) -> DryDriver:
    """Make this process compile for ("cuda", 90), ("hip", "gfx942") and so on; once, as sizes are remembered."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("a dry run compiles: start it without TRITON_INTERPRET")
    dry = DryDriver(GPUTarget(backend, arch, 64 if backend == "hip" else 32))
    driver.set_active(dry)
    return dry


def assembly(compiled: Any) -> str:
    return compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]


def constants_of(compiled: Any) -> dict[str, Any]:
    return {compiled.src.fn.arg_names[at[0]]: value for at, value in compiled.src.constants.items()}


def resources(compiled: Any) -> Resources:
    """As the assembler says, not the launch: a driver that loads nothing knows no registers."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        found = {k: int(v) for k, v in re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"])}
        return Resources(found["vgpr_count"], found["private_segment_fixed_size"], shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], shared)
