"""How a kernel is made and launched: nothing at run time is specialised, numbers travel as bits."""

from __future__ import annotations

import contextlib
import inspect
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # decided when the kernels below are made, and then for good

ACC_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
ALIGNMENT = 16  # bytes of the widest access


def kernel(fn: Callable) -> Any:
    """A kernel whose run-time arguments select no code: one variant for all lengths, strides, addresses and numbers.

    Integers are to be annotated `tl.int64`, or a stride past 2^31 would make a second one.
    """
    fixed = [name for name, p in inspect.signature(fn).parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(fn, do_not_specialize=fixed)


def scalar_bits(value: float, acc: torch.dtype) -> int:
    """A number as the integer that `bits_to_float` turns back: a float argument would be rounded to float32."""
    form = "<dq" if acc == torch.float64 else "<fi"
    return int(struct.unpack("<" + form[2], struct.pack(form[:2], value))[0])


@triton.jit
def bits_to_float(value_bits, ACC: tl.constexpr):
    if ACC == tl.float64:
        return value_bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return value_bits.to(tl.int32).to(tl.float32, bitcast=True)


def aligned(*matrices: Tensor) -> bool:
    """Whether every row, [B, T, V], starts and ends on a boundary of the widest access."""
    return all(
        x.data_ptr() % ALIGNMENT == 0
        and all(n * x.element_size() % ALIGNMENT == 0 for n in (*x.stride()[:-1], x.shape[-1]))
        for x in matrices
    )


def registers(limit: int) -> dict[str, int]:
    """Options that allow so many registers per thread: left alone, ptxas may aim at more programs and spill."""
    cuda = not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda"
    return {"maxnreg": limit} if cuda else {}


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
