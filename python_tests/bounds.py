"""Checks every access of a kernel in Triton's interpreter against the memory of the launch's tensors."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

OURS = "grpo_kernels/backends/triton/"


class Outside(NamedTuple):
    kernel: str
    what: str  # load, store or atomic
    lanes: int
    line: str  # the innermost line of our code


class Accesses:
    """The accesses of all launches since the start. A lane outside is recorded and masked off, so the process
    survives."""

    def __init__(self) -> None:
        self.outside: list[Outside] = []
        self.inside: dict[str, int] = {}  # accesses of each kernel, one per block
        self._kernel, self._starts, self._ends = "", np.empty(0, np.uint64), np.empty(0, np.uint64)

    def begin_launch(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        runs = [runs_of(x) for x in tensors] or [np.empty((2, 0), np.uint64)]
        starts, ends = np.concatenate(runs, axis=1)
        order = starts.argsort()
        # Runs may be nested: after a start, the allowed memory ends where the longest run before it ends.
        self._kernel, self._starts, self._ends = kernel, starts[order], np.maximum.accumulate(ends[order])

    def allowed(self, what: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        """The mask without the lanes that would access memory outside the tensors."""
        before = np.searchsorted(self._starts, addresses, side="right")
        ends = np.concatenate([np.zeros(1, np.uint64), self._ends])[before]
        within = (addresses < ends) & (ends - addresses >= size)
        self.inside[self._kernel] = self.inside.get(self._kernel, 0) + 1
        if (mask & ~within).any():
            lines = [
                f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in traceback.extract_stack() if OURS in f.filename
            ]
            self.outside.append(Outside(self._kernel, what, int((mask & ~within).sum()), lines[-1] if lines else "?"))
        return mask & within


def runs_of(x: torch.Tensor) -> np.ndarray:
    """First byte and one past the last of each contiguous run, [2, runs]: a view's gaps are not its memory."""
    if not x.numel():
        return np.empty((2, 0), np.uint64)
    offsets, run = np.zeros(1, np.int64), 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if s and n > 1):
        if len(offsets) == 1 and stride == run:
            run *= size
        else:
            offsets = (offsets + np.arange(size)[:, None] * stride).ravel()
    starts = (x.data_ptr() + offsets * x.element_size()).astype(np.uint64)
    return np.stack([starts, starts + np.uint64(run * x.element_size())])


def check_accesses(monkeypatch: pytest.MonkeyPatch) -> Accesses:
    """Checks accesses until the test ends."""
    accesses, builder, executor = Accesses(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    arguments: Callable = executor._init_args_hst

    def allowed(what: str, pointers: Any, mask: Any) -> Any:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        data = accesses.allowed(what, np.asarray(pointers.data, np.uint64), np.asarray(mask.data, bool), size)
        return interpreter.TensorHandle(data, mask.dtype)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return load(self, pointers, allowed("load", pointers, mask), *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, allowed("store", pointers, mask), *rest)

    def checked_atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return atomic(self, operation, pointers, value, allowed("atomic", pointers, mask), *rest)

    def with_begin(self: Any, given: Any, options: Any) -> Any:
        positional, named = arguments(self, given, options)
        accesses.begin_launch(self.fn.__name__, [x for x in (*positional, *named.values()) if torch.is_tensor(x)])
        return positional, named

    for owner, name, replacement in (
        (builder, "create_masked_load", checked_load),
        (builder, "create_masked_store", checked_store),
        (builder, "create_atomic_rmw", checked_atomic),
        (executor, "_init_args_hst", with_begin),
    ):
        monkeypatch.setattr(owner, name, replacement)
    return accesses
