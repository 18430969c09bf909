"""The two sweeps over a row, a tile of [STEPS, LANES] columns at a time: statistics, and the gradient.

A row's statistics are gathered lane by lane over segments of SEGMENT columns, and the segments are merged in order,
whether one program takes them all or each has its own: the sums are the same bit for bit.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numeric import quotient
from .softmax import (
    LOG2E,
    Softmax,
    add_tile,
    entropy_of,
    exponent,
    log_probability,
    merge,
    merge_lanes,
    origin_of,
    tanh,
)


class Sweep(NamedTuple):
    """How a kernel goes over a row, the same for all rows of a launch: a constexpr."""

    ACC: tl.dtype
    SOFTCAP: bool
    ALIGNED: bool  # every row begins and ends on 16 bytes
    STEPS: int
    LANES: int
    SEGMENT: int


class Transform(NamedTuple):
    """Makes a difference of z one of logarithms; dz / dlogit without softcap'; z = cap * tanh(logit * inner)."""

    natural: Any
    slope: Any
    inner: Any
    cap: Any


class RowResult(NamedTuple):
    """Zeros where the row is not active."""

    logp: Any
    entropy: Any
    max: Any
    log_sum: Any
    sum_p2: Any


@triton.jit
def z_of(logit, transform, SWEEP: tl.constexpr):
    """(z, dz / dlogit without the slope)."""
    if SWEEP.SOFTCAP:
        t = tanh(logit * transform.inner)
        return transform.cap * t, 1 - t * t
    else:
        return logit, 1.0


@triton.jit
def columns_of(SWEEP: tl.constexpr):
    """Consecutive threads own consecutive lanes, a lane's STEPS columns stand LANES apart: one thread has them all."""
    return tl.arange(0, SWEEP.STEPS)[:, None] * SWEEP.LANES + tl.arange(0, SWEEP.LANES)[None, :]


@triton.jit
def segment_stats(data, begin, end, transform, SWEEP: tl.constexpr, SUM_P2: tl.constexpr):
    """Of the columns [begin, begin + SEGMENT) below `end`."""
    unit = transform.natural * LOG2E
    LANES: tl.constexpr = SWEEP.LANES  # a list takes no field of a tuple in Triton 3.6
    zeros = tl.zeros([LANES], SWEEP.ACC)
    s = Softmax(tl.full([LANES], float("-inf"), SWEEP.ACC), zeros, zeros, zeros)
    for start in range(begin, tl.minimum(begin + SWEEP.SEGMENT, end), SWEEP.STEPS * SWEEP.LANES):
        columns = start + columns_of(SWEEP)
        in_bounds = columns < end
        logit = tl.load(data + columns, mask=in_bounds, other=float("-inf")).to(SWEEP.ACC)
        z, _ = z_of(logit, transform, SWEEP)
        if SWEEP.SOFTCAP:  # -inf has become -cap
            z = tl.where(in_bounds, z, float("-inf"))
        s = add_tile(s, z, unit, SUM_P2)
    return merge_lanes(s, unit)


@triton.jit
def no_columns(SWEEP: tl.constexpr):
    zero = tl.zeros([], SWEEP.ACC)
    return Softmax(tl.full([], float("-inf"), SWEEP.ACC), zero, zero, zero)


@triton.jit
def row_stats(data, end, transform, SWEEP: tl.constexpr, SUM_P2: tl.constexpr):
    s = no_columns(SWEEP)
    for begin in range(0, end, SWEEP.SEGMENT):
        of_segment = segment_stats(data, begin, end, transform, SWEEP, SUM_P2)
        s = merge(s, of_segment, transform.natural * LOG2E)
    return s


@triton.jit
def merged_segments(partials, segments, transform, SWEEP: tl.constexpr):
    """The same from what the segments stored, [segments, 4]."""
    s = no_columns(SWEEP)
    for i in range(0, segments):
        at = partials + 4 * i
        stored = Softmax(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
        s = merge(s, stored, transform.natural * LOG2E)
    return s


@triton.jit
def finished(s, z, transform, is_active):
    """Of a row whose target has `z`."""
    sum = tl.where(s.max == float("-inf"), float("nan"), s.sum)  # every logit is -inf: no distribution
    log_sum = tl.log(sum)
    logp, entropy = log_probability(z, s.max, log_sum, transform.natural), entropy_of(sum, s.dot)
    sum_p2 = quotient(s.sum2, sum * sum)
    return RowResult(
        tl.where(is_active, logp, 0.0), tl.where(is_active, entropy, 0.0), tl.where(is_active, s.max, 0.0),
        tl.where(is_active, log_sum, 0.0), tl.where(is_active, sum_p2, 0.0),
    )  # fmt: skip


@triton.jit
def write_gradient(
    data, out, begin, tiles, vocab, is_active, target, max, a, b, at_target, transform, SWEEP: tl.constexpr
):
    """slope * 2^y (a + b y), and slope * at_target at the target; zeros, and nothing read, if the row is not active.

    Backwards: the end of the row is what the first sweep left in the cache. `out` may be the row: each element is read
    and written by one thread, and the target is patched before the store.
    """
    origin, unit, slope = origin_of(max), transform.natural * LOG2E, transform.slope
    a, b, at_target = slope * a, slope * b, slope * at_target
    read_to = tl.where(is_active, vocab, 0)
    for i in range(0, tiles):
        columns = begin + (tiles - 1 - i) * (SWEEP.STEPS * SWEEP.LANES) + columns_of(SWEEP)
        logit = tl.load(data + columns, mask=columns < read_to, other=0.0).to(SWEEP.ACC)
        z, inner_slope = z_of(logit, transform, SWEEP)
        y = exponent(z, origin, unit)
        g = tl.where(columns == target, at_target, tl.exp2(y) * tl.fma(y, b, a)) * inner_slope
        tl.store(out + columns, tl.where(is_active, g, 0.0).to(out.dtype.element_ty), mask=columns < vocab)
