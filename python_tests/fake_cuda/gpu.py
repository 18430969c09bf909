"""A GPU for the library's own checks, in a process of its own: what is installed, and kernels that only note that they
were launched."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime.jit import JITFunction

from grpo_kernels import backends
from grpo_kernels.ops import advantages, loss
from dry_driver import dry_run


class _NativeModule:
    """In the place of `_cuda`: a number for each constant of kernels.h, a name for each kernel."""

    __name__ = "grpo_kernels.backends._cuda"
    TOKEN_SUMS = GAE_SUMS = VALUE_SUMS = MOMENT_SUMS = 8
    TOKENS_PER_TILE = TOKENS_IN_TABLE = 2048

    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name

    @staticmethod
    def Rows(*_: Any) -> str:
        return "Rows"

    @staticmethod
    def unusable() -> str:
        return ""


class _Launches:
    """Who is told of a launch."""

    note: Callable[[str], None] = staticmethod(lambda name: None)


def install() -> None:
    """Makes `backend="auto"` what it is on an H100: "cuda", and "triton" for float64."""
    module: Any = _NativeModule()
    sys.modules[module.__name__] = backends._cuda = module  # type: ignore[attr-defined]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)  # type: ignore[assignment, return-value]
    FakeTensor.data_ptr = lambda self: 0  # type: ignore[method-assign]
    dry_run("cuda", 90)
    for name in ("cuda", "triton"):
        importlib.import_module(f"grpo_kernels.backends.{name}").BACKEND.unavailable = lambda: None
    backends.implementation.cache_clear()
    kernels: Any = backends.implementation("cuda")
    kernels._launch = lambda kernel, device, *args: _Launches.note(f"cuda.{kernel}")
    JITFunction.run = lambda self, *args, **options: _Launches.note(f"triton.{self.fn.__name__}")


@contextlib.contextmanager
def launches_noted(note: Callable[[str], None]) -> Iterator[None]:
    """Gives `note` the name of every kernel that would have been launched."""
    before, _Launches.note = _Launches.note, staticmethod(note)
    try:
        yield
    finally:
        _Launches.note = before


@contextlib.contextmanager
def without_native_kernels() -> Iterator[None]:
    """`backend="auto"` where nvcc was not there."""
    before, backends._of_gpu = backends._of_gpu, lambda index, dtype: "triton"
    try:
        yield
    finally:
        backends._of_gpu = before


def operator_bodies() -> dict[Any, Callable]:
    """The function that each operator of the library runs on every device."""
    return {
        op: getattr(module, f"_{name}")
        for module in (loss, advantages)
        for name, op in vars(module).items()
        if isinstance(op, torch._ops.OpOverload)
    }
