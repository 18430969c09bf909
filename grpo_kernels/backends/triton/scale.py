"""A gradient times the upstream one, which only the device knows: every program reads it, and ends where it is 1."""

import triton
import triton.language as tl
from torch import Tensor

from ...layout import real_dtype
from .launch import INTERPRETED, REALS, aligned, kernel, on_device_of
from .policy_inputs import view_args
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
    batch, tokens, columns = matrix.shape
    rows = batch * tokens
    if not matrix.numel():
        return
    with on_device_of(matrix):
        scale_kernel[(min(PROGRAMS, rows * triton.cdiv(columns, BLOCK)),)](
            *view_args(matrix), factor, rows, tokens, columns,
            REAL=REALS[real_dtype(matrix.dtype)], ALIGNED=aligned(matrix), BLOCK=BLOCK,
            num_warps=1 if INTERPRETED else WARPS, enable_fp_fusion=False,
        )  # fmt: skip
