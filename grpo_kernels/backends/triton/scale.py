"""A gradient times the upstream one, which only the device knows: every program reads it, and ends where it is 1.

A matrix without gaps is one row, whatever its number of columns: rows of an odd vocabulary would begin anywhere.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...inputs.layout import acc_dtype
from .launch import ACC_TYPES, ALIGNMENT, INTERPRETED, kernel, on_device_of
from .policy_inputs import view_args
from .row import row_at

BLOCK, WARPS = 4096, 8
PROGRAMS = 2048  # a few on each multiprocessor: so many end within microseconds


@triton.jit
def multiply(at, mask, f):
    x = tl.load(at, mask)
    tl.store(at, (x.to(f.dtype) * f).to(x.dtype), mask)


@kernel
def scale_kernel(
    matrix, stride_b: tl.int64, stride_t: tl.int64, factor, rows: tl.int64, tokens: tl.int64, columns: tl.int64,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    f = tl.load(factor).to(ACC)
    if f != 1:
        ACCESS: tl.constexpr = 128 // matrix.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
        vector_columns = columns // ACCESS * ACCESS  # in accesses that no mask may split
        blocks = tl.cdiv(columns, BLOCK)
        for i in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
            row, begin = i // blocks, i % blocks * BLOCK
            data = row_at(matrix, stride_b, stride_t, row // tokens, row % tokens, ALIGNED)
            column = begin + tl.arange(0, BLOCK)
            multiply(data + column, column < vector_columns, f)
            if ALIGNED:
                if begin + BLOCK >= columns:
                    rest = vector_columns + tl.arange(0, ACCESS)
                    multiply(data + rest, rest < columns, f)


def rows_without_gaps(matrix: Tensor) -> Tensor:
    """[1, 1, all elements] where they lie one after the other, else the matrix."""
    return matrix.view(1, 1, -1) if matrix.is_contiguous() else matrix


def rows_begin_aligned(matrix: Tensor) -> bool:
    """On a boundary of the widest access; where they end does not matter."""
    steps = [
        n * matrix.element_size() for n, size in zip(matrix.stride()[:2], matrix.shape[:2], strict=True) if size > 1
    ]
    return all(n % ALIGNMENT == 0 for n in (matrix.data_ptr(), *steps))


def scale(matrix: Tensor, factor: Tensor) -> None:
    if not matrix.numel():
        return
    matrix = rows_without_gaps(matrix)
    batch, tokens, columns = matrix.shape
    rows = batch * tokens
    with on_device_of(matrix):
        scale_kernel[(min(PROGRAMS, rows * triton.cdiv(columns, BLOCK)),)](
            *view_args(matrix), factor, rows, tokens, columns,
            ACC=ACC_TYPES[acc_dtype(matrix.dtype)], ALIGNED=rows_begin_aligned(matrix), BLOCK=BLOCK,
            num_warps=1 if INTERPRETED else WARPS, enable_fp_fusion=False,
        )  # fmt: skip
