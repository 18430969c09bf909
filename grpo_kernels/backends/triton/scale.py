"""A gradient times the upstream one, which only the device knows: every program reads it, and ends where it is 1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, REALS, aligned, kernel, on_device_of
from .row import row_at

BLOCK, WARPS = 4096, 8
PROGRAMS = 2048  # a few on each multiprocessor: so many end within microseconds


@kernel
def scale_kernel(
    matrix, stride_b: tl.int64, stride_t: tl.int64, factor, rows: tl.int64, tokens: tl.int64, columns: tl.int64,
    REAL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    f = tl.load(factor).to(REAL)
    if f != 1:
        if ALIGNED:
            columns = tl.multiple_of(columns, 16)
        blocks = tl.cdiv(columns, BLOCK)
        for i in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
            row, column = i // blocks, i % blocks * BLOCK + tl.arange(0, BLOCK)
            at = row_at(matrix, stride_b, stride_t, row // tokens, row % tokens, ALIGNED) + column
            x = tl.load(at, column < columns)
            tl.store(at, (x.to(REAL) * f).to(x.dtype), column < columns)


def scale(matrix: Tensor, factor: Tensor) -> None:
    """[B, T, V] with any strides of the first two, [R, V] or [R]."""
    x = matrix.view(1, 1, -1) if matrix.is_contiguous() and matrix.dim() < 3 else matrix
    rows, columns = x.shape[0] * x.shape[1], x.shape[2]
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not x.numel():
        return
    with on_device_of(x):
        scale_kernel[(min(PROGRAMS, rows * triton.cdiv(columns, BLOCK)),)](
            x, x.stride(0), x.stride(1), factor.contiguous(), rows, x.shape[1], columns,
            REAL=REALS[real], ALIGNED=aligned(x), BLOCK=BLOCK, num_warps=1 if INTERPRETED else WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
