"""The two sweeps over a row, a tile of [STEPS, LANES] columns at a time: statistics, and the gradient.

A row's statistics are gathered lane by lane over segments of SEGMENT columns, and the segments are merged in order,
whether one program takes them all or each has its own: the sums are the same bit for bit.
"""

import triton
import triton.language as tl

from .numeric import quotient
from .softmax import (
    LOG2E,
    add_tile,
    entropy_of,
    exponent,
    log_probability,
    merge,
    merge_lanes,
    origin_of,
    tanh,
)  # fmt: skip


@triton.jit
def z_of(logit, inner, cap, SOFTCAP: tl.constexpr):
    """(z, dz / dlogit without the slope)."""
    if SOFTCAP:
        t = tanh(logit * inner)
        return cap * t, 1 - t * t
    else:
        return logit, 1.0


@triton.jit
def columns_of(STEPS: tl.constexpr, LANES: tl.constexpr):
    """Consecutive threads own consecutive lanes, a lane's STEPS columns stand LANES apart: one thread has them all."""
    return tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def segment_stats(
    data, begin, end, transform, ACC: tl.constexpr, SOFTCAP: tl.constexpr, SUM_P2: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """(max, sum, dot, sum2) of the columns [begin, begin + SEGMENT) below `end`."""
    natural, _slope, inner, cap = transform
    unit = natural * LOG2E
    max, sum = tl.full([LANES], float("-inf"), ACC), tl.zeros([LANES], ACC)
    dot, sum2 = sum, sum
    for start in range(begin, tl.minimum(begin + SEGMENT, end), STEPS * LANES):
        columns = start + columns_of(STEPS, LANES)
        in_bounds = columns < end
        logit = tl.load(data + columns, mask=in_bounds, other=float("-inf")).to(ACC)
        z, _ = z_of(logit, inner, cap, SOFTCAP)
        if SOFTCAP:  # -inf has become -cap
            z = tl.where(in_bounds, z, float("-inf"))
        max, sum, dot, sum2 = add_tile(max, sum, dot, sum2, z, unit, SUM_P2)
    return merge_lanes(max, sum, dot, sum2, unit)


@triton.jit
def row_stats(
    data, end, transform, ACC: tl.constexpr, SOFTCAP: tl.constexpr, SUM_P2: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    natural, _, _, _ = transform
    max, sum = tl.full([], float("-inf"), ACC), tl.zeros([], ACC)
    dot, sum2 = sum, sum
    for begin in range(0, end, SEGMENT):
        a, b, c, d = segment_stats(data, begin, end, transform, ACC, SOFTCAP, SUM_P2, STEPS, LANES, SEGMENT)
        max, sum, dot, sum2 = merge(max, sum, dot, sum2, a, b, c, d, natural * LOG2E)
    return max, sum, dot, sum2


@triton.jit
def merged_segments(partials, segments, transform, ACC: tl.constexpr):
    """The same from what the segments stored, [segments, 4]."""
    natural, _, _, _ = transform
    max, sum = tl.full([], float("-inf"), ACC), tl.zeros([], ACC)
    dot, sum2 = sum, sum
    for i in range(0, segments):
        at = partials + 4 * i
        a, b, c, d = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        max, sum, dot, sum2 = merge(max, sum, dot, sum2, a, b, c, d, natural * LOG2E)
    return max, sum, dot, sum2


@triton.jit
def finished(s, z, transform, is_active):
    """(logp, entropy, max, log_sum, sum p^2) of a row whose target has `z`; zeros where it is not active."""
    natural, _, _, _ = transform
    max, sum, dot, sum2 = s
    sum = tl.where(max == float("-inf"), float("nan"), sum)  # every logit is -inf: no distribution
    log_sum = tl.log(sum)
    logp, entropy = log_probability(z, max, log_sum, natural), entropy_of(sum, dot)
    sum_p2 = quotient(sum2, sum * sum)
    return (
        tl.where(is_active, logp, 0.0), tl.where(is_active, entropy, 0.0), tl.where(is_active, max, 0.0),
        tl.where(is_active, log_sum, 0.0), tl.where(is_active, sum_p2, 0.0),
    )  # fmt: skip


@triton.jit
def write_gradient(
    data, out, begin, tiles, vocab, is_active, target, max, a, b, at_target, transform,
    ACC: tl.constexpr, SOFTCAP: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """slope * 2^y (a + b y), and slope * at_target at the target; zeros, and nothing read, if the row is not active.

    Backwards: the end of the row is what the first sweep left in the cache. `out` may be the row: each element is read
    and written by one thread, and the target is patched before the store.
    """
    natural, slope, inner, cap = transform
    origin, unit, a, b, at_target = origin_of(max), natural * LOG2E, slope * a, slope * b, slope * at_target
    read_to = tl.where(is_active, vocab, 0)
    for i in range(0, tiles):
        columns = begin + (tiles - 1 - i) * (STEPS * LANES) + columns_of(STEPS, LANES)
        logit = tl.load(data + columns, mask=columns < read_to, other=0.0).to(ACC)
        z, inner_slope = z_of(logit, inner, cap, SOFTCAP)
        y = exponent(z, origin, unit)
        g = tl.where(columns == target, at_target, tl.exp2(y) * tl.fma(y, b, a)) * inner_slope
        tl.store(out + columns, tl.where(is_active, g, 0.0).to(out.dtype.element_ty), mask=columns < vocab)
