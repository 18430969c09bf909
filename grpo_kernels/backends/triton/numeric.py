"""Scalar vocabulary of the Triton kernels, for blocks and for scalars alike: csrc/math/numeric.h."""

import triton
import triton.language as tl


@triton.jit
def min_(a, b):
    return tl.where(a > b, b, a)


@triton.jit
def max_(a, b):
    return tl.where(a < b, b, a)


@triton.jit
def clamp_(x, low, high):
    """A NaN stays one, where tl.clamp would return a bound."""
    return min_(max_(x, low), high)


@triton.jit
def quotient(a, b):
    """Rounded to nearest. `/` of float32 is not on a GPU: it may be two units in the last place off, and x / x above 1.
    For what is divided once a row, a group or a launch, as it takes a dozen instructions."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def weighted(weight, x):
    """weight * x, and exactly 0 where the weight is: what is removed may be infinite or NaN."""
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def times(a, b):
    """a * b, but 0 times infinity is 0; a NaN stays one."""
    return tl.where(((a == 0) & (b == b)) | ((b == 0) & (a == a)), 0.0, a * b)


@triton.jit
def expm1_minus_x(x):
    """e^x - 1 - x without cancellation: near 0 its series, x^2/2 (1 + x/3 (1 + x/4 (...))), to the type's last bit."""
    LAST: tl.constexpr = 17 if x.dtype == tl.float64 else 10
    series = 1.0 + x * (1.0 / LAST)
    for i in tl.static_range(LAST - 3):
        series = 1.0 + x * series * (1.0 / (LAST - 1 - i))
    far = tl.exp(x) - 1.0 - min_(x, 1000.0)  # of infinity: e^1000 is no number already
    return tl.where(tl.abs(x) < 0.5, x * x * 0.5 * series, far)


@triton.jit
def expm1(x):
    """By the same series; no backend's own library is asked."""
    return tl.where(tl.abs(x) < 0.5, x + expm1_minus_x(x), tl.exp(x) - 1.0)


@triton.jit
def is_finite(x):
    return x - x == 0
