"""The CUDA backend on CPU tensors: the library's own Python and host code launch on a runtime without a GPU
(fake_cudart.cpp), which passes on each kernel's name and parameters, and nvcc's PTX runs. csrc is unchanged."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
import torch

from grpo_kernels.backends.native import NativeBackend, no_float64
from grpo_kernels.backends.workspace import CudaWorkspace

from .machine import Grid, Options, program
from .text import entries
from .triton_launch import Ran, spans_of

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FLAGS = "-std=c++17 -Xcompiler -fPIC,-fvisibility=hidden".split()
KERNEL_FLAGS = "-O3 -fmad=false -cudart none".split()  # as in setup.py: PTX for one architecture, no machine code
MODULE = "_on_ptx"

LAUNCHED = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_size_t, ctypes.c_uint, ctypes.c_void_p
)


def version() -> str | None:
    """nvcc's version, such as '13.0'; None where it is not installed."""
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ")[1].split(",")[0]


def build(arch: int = 90, source: Path = ROOT / "csrc") -> Path:
    """The folder of the module and its PTX, rebuilt whenever a source, a flag or nvcc changes."""
    digest = hashlib.sha256(f"{version()} {arch} {FLAGS} {KERNEL_FLAGS}".encode())
    for file in sorted([*source.rglob("*"), HERE / "fake_cudart.cpp"]):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    folder = ROOT / "build" / f"ptx-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / f"{MODULE}.so").exists():
            _compile(arch, source, folder)
    return folder


def _compile(arch: int, source: Path, folder: Path) -> None:
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    target = f"arch=compute_{arch},code=compute_{arch}"
    jobs = [
        ["nvcc", *FLAGS, "-O1", *include, f"-DGK_MODULE={MODULE}", "-DGK_CUDA", "-c", source / "bindings.cpp"],
        ["nvcc", *FLAGS, "-O1", "-c", HERE / "fake_cudart.cpp"],
    ]
    for file in sorted((source / "cuda").glob("*.cu")):
        kept = folder / file.stem
        kept.mkdir(exist_ok=True)
        jobs.append(["nvcc", *FLAGS, *KERNEL_FLAGS, "-gencode", target, "--keep", "--keep-dir", kept, "-c", file])
    objects = [folder / f"{Path(job[-1]).stem}.o" for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_call, [[*job, "-o", to] for job, to in zip(jobs, objects, strict=True)]))
    for kept in (folder / path.stem for path in objects):
        if (ptx := kept / f"{kept.name}.ptx").exists():
            shutil.move(ptx, folder)
            shutil.rmtree(kept)
    unfinished = folder / "unfinished.so"
    _call(["c++", "-shared", *objects, "-o", unfinished])
    unfinished.rename(folder / f"{MODULE}.so")


def _call(command: list[Any]) -> None:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


class CudaOnPtx(NativeBackend):
    """The backend "cuda" on CPU tensors, with interpreted PTX as its machine code."""

    name = "cuda"
    fuses_group_advantages = True

    def __init__(self, arch: int = 90):
        folder = build(arch)
        spec = importlib.util.spec_from_file_location(MODULE, folder / f"{MODULE}.so")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        super().__init__(module, CudaWorkspace(module))
        self.options, self.ran, self.edit = Options(), list[Ran](), lambda text, entry: text
        self._texts = {e: text for f in folder.glob("*.ptx") for text in [f.read_text()] for e in entries(text)}
        self._error: BaseException | None = None
        self._library = ctypes.PyDLL(str(folder / f"{MODULE}.so"))
        self._launched, self._arch = LAUNCHED(self._run), arch
        self.machine()

    def machine(
        self, shared_bytes: int = 227 << 10, multiprocessors: int = 2, blocks_at_once: int = 1, bulk_copies: bool = True
    ) -> None:
        """Without bulk copies the PTX counts as sm_80's: rows are loaded with cp.async, and there are no clusters."""
        version = self._arch if bulk_copies else 80
        self._library.ptx_machine(self._launched, shared_bytes, version, multiprocessors, blocks_at_once)

    def rejects(self, device: torch.device, dtype: torch.dtype | None) -> str | None:
        return no_float64(self.name, dtype)

    def _launch(self, kernel: Any, device: torch.device, *arguments: Any) -> None:
        self._spans = spans_of(tensors_of_the_callers(2))
        super()._launch(kernel, device, *arguments)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, name: bytes, blocks: Any, threads: int, shared: int, cluster: int, parameters: int) -> None:
        if self._error is not None:
            return
        try:
            entry = name.decode()
            made = program(self.edit(self._texts[entry], entry), entry)
            if len(made.kernel.parameters) != 1:
                raise NotImplementedError(f"{entry} has {len(made.kernel.parameters)} parameters and not one struct")
            data = ctypes.string_at(parameters, made.kernel.parameter_bytes)
            grid = Grid(
                made, tuple(blocks[i] for i in range(3)), threads, data, shared_bytes=shared, cluster=cluster,
                spans=self._spans, options=self.options,
            )  # fmt: skip
            self.ran.append(Ran(short(entry), grid))
            grid.run()
        except BaseException as error:  # ctypes would print it and go on
            self._error = error


def tensors_of_the_callers(frames: int) -> list[torch.Tensor]:
    """The tensors in the callers of `_launch`: kernels get only addresses, and may access nothing but these."""
    frame, held = sys._getframe(2), list[torch.Tensor]()
    for _ in range(frames):
        held += _tensors(list(frame.f_locals.values()))
        frame = frame.f_back
    return held


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


@functools.cache
def short(entry: str) -> str:
    """row_kernel of _ZN2gk10row_kernelIfLb0ELb0EEEvNS_7RowArgsE."""
    match = re.search(r"\d+([a-z][a-z_]*_kernel)", entry)
    return match[1] if match else entry
