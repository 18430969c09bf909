"""Online softmax statistics and what a row's gradient is made of: csrc/math/softmax.h, for scalars and for lanes alike.

With y = (z - max) * log2(e): the sums of 2^y, of y 2^y and of 4^y, all relative to the maximum, so adding a constant to
the logits changes no digit of the entropy.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numeric import expm1, quotient, times, weighted

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e5)  # 2^this is 0 and this * 0 is 0, where -inf * 0 would be NaN


class Softmax(NamedTuple):
    """The maximum of z, and the sums of 2^y, y 2^y and 4^y."""

    max: Any
    sum: Any
    dot: Any
    sum2: Any


@triton.jit
def exponent(z, origin, unit):
    """y, finite whatever z is below the origin; a NaN stays one."""
    return tl.maximum((z - origin) * unit, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def origin_of(max):
    """What y is measured from: -inf - -inf would be NaN."""
    return tl.where(max == float("-inf"), 0.0, max)


@triton.jit
def relative_to(s, origin, unit):
    """The sums as if `origin`, at least as high as their maximum, had been theirs."""
    shift = exponent(s.max, origin, unit)
    scale = tl.exp2(shift)
    return scale * s.sum, scale * (s.dot + shift * s.sum), scale * scale * s.sum2


@triton.jit
def merge(s, other, unit):
    top = tl.maximum(s.max, other.max)
    origin = origin_of(top)
    sum, dot, sum2 = relative_to(s, origin, unit)
    other_sum, other_dot, other_sum2 = relative_to(other, origin, unit)
    return Softmax(top, sum + other_sum, dot + other_dot, sum2 + other_sum2)


@triton.jit
def merge_lanes(s, unit):
    """A vector of statistics to one."""
    top = tl.max(s.max, 0)
    sum, dot, sum2 = relative_to(s, origin_of(top), unit)
    return Softmax(top, tl.sum(sum, 0), tl.sum(dot, 0), tl.sum(sum2, 0))


@triton.jit
def add_tile(s, z, unit, SUM_P2: tl.constexpr):
    """Each lane's statistics with its column of z, [STEPS, LANES], added: nothing crosses threads."""
    top = tl.maximum(s.max, tl.max(z, 0))
    origin = origin_of(top)
    sum, dot, sum2 = relative_to(s, origin, unit)
    y = exponent(z, origin[None, :], unit)
    e = tl.exp2(y)
    if SUM_P2:
        sum2 += tl.sum(e * e, 0)
    return Softmax(top, sum + tl.sum(e, 0), dot + tl.sum(y * e, 0), sum2)


@triton.jit
def log_probability(z, max, log_sum, natural):
    """At most 0, unless it is NaN."""
    logp = (z - max) * natural - log_sum
    return tl.where(logp > 0, 0.0, logp)


@triton.jit
def entropy_of(sum, dot):
    return tl.log(sum) - quotient(LN2 * dot, sum)


@triton.jit
def row_gradient(g_logp, g_entropy, log_sum, entropy):
    """(a, b) of d loss / d logit_j = slope * 2^y (a + b y), from -p (g + h (log p + H))."""
    inv_sum = tl.exp(-log_sum)
    return -inv_sum * (g_logp + weighted(g_entropy, entropy - log_sum)), -inv_sum * g_entropy * LN2


@triton.jit
def target_gradient(g_logp, g_entropy, logp, entropy):
    """The target's entry without the slope. 1 - p is formed as -expm1(logp): exact for a peaked row."""
    of_entropy = times(tl.exp(logp), logp + entropy)  # p log p is 0 where p is
    return -g_logp * expm1(logp) - weighted(g_entropy, of_entropy)


@triton.jit
def tanh(x):
    """Without cancellation near 0: in float32 x + x^3 P(x^2) there, relative error 1e-9, and 1 - 2 / (e^2x + 1) beyond
    0.55; in float64 E / (E + 2) with E = expm1(2 x)."""
    if x.dtype == tl.float64:
        e = expm1(tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL) * 2)
        return tl.where(x < 0, -e, e) / (e + 2)
    else:
        u = x * x
        p = tl.fma(u, -6.264367955e-3, 2.106413707e-2)
        p = tl.fma(u, p, -5.385029639e-2)
        p = tl.fma(u, p, 1.333256445e-1)
        p = tl.fma(u, p, -3.333331680e-1)
        far = 1 - 2 / (tl.exp2(tl.abs(x) * (2 * LOG2E)) + 1)
        return tl.where(tl.abs(x) < 0.55, tl.fma(u * x, p, x), tl.where(x < 0, -far, far))
