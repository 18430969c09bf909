"""The Triton backend on CPU tensors: the library launches, Triton compiles for a GPU that is not there, its PTX runs.
For a process of its own, without TRITON_INTERPRET."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch

from grpo_kernels.backends import triton as backend
from dry_driver import DryDriver, dry_run

from .machine import Grid, Options, program


class Ran(NamedTuple):
    kernel: str
    grid: Grid


class TritonOnPtx:
    def __init__(self, arch: int = 90):
        self.options, self.ran, self.edit = Options(), list[Ran](), lambda text, entry: text
        self.driver = dry_run("cuda", arch)
        self.driver.launcher_cls = self._launcher()
        handles = iter(range(1, 1 << 30))
        self.driver.utils.load_binary = staticmethod(lambda *_: (0, next(handles), 0, 0, 1024))
        backend.BACKEND.unavailable, backend.BACKEND.rejects = lambda: None, lambda device, dtype: None

    def _launcher(outer: TritonOnPtx) -> type:
        class Launcher:
            def __init__(self, source: Any, metadata: Any):
                self.source, self.metadata = source, metadata

            def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
                ptx = outer.edit(compiled(outer.driver, self.source.fn, function).asm["ptx"], self.metadata.name)
                outer.launch(ptx, self.source, self.metadata, (x, y, z), rest[4:])  # behind metadata and hooks

        return Launcher

    def launch(self, ptx: str, source: Any, metadata: Any, blocks: tuple[int, int, int], args: tuple) -> None:
        made = program(ptx, metadata.name)
        parameters = bytearray(made.kernel.parameter_bytes)
        passed = zip(source.fn.arg_names, args, strict=True)
        values = [value for name, x in passed for value in leaves(x, source.signature[name])]
        offsets = [at for at, _ in made.kernel.parameters.values()]
        for value, at in zip(values, offsets, strict=False):  # what Triton adds at the end is 0
            parameters[at : at + len(value)] = value
        grid = Grid(
            made, blocks, 32 * metadata.num_warps, bytes(parameters), shared_bytes=metadata.shared,
            spans=spans_of(args), options=self.options,
        )  # fmt: skip
        self.ran.append(Ran(metadata.name, grid))
        grid.run()


def leaves(value: Any, kind: Any) -> list[bytes]:
    """An argument as the kernel's parameters hold it; those of a tuple one by one."""
    if kind == "constexpr":
        return []
    if isinstance(kind, tuple):
        return [leaf for x, k in zip(value, kind, strict=True) for leaf in leaves(x, k)]
    if kind == "fp32":
        return [struct.pack("<f", value)]
    return [struct.pack("<q", value.data_ptr() if isinstance(value, torch.Tensor) else int(value))]


def compiled(driver: DryDriver, fn: Any, function: int) -> Any:
    return next(k for k in driver.variants(fn) if k.function == function)


def spans_of(values: Any) -> list[tuple[int, int]]:
    """Where the tensors among these lie."""
    storages = [x.untyped_storage() for x in values if isinstance(x, torch.Tensor)]
    return sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes()})
