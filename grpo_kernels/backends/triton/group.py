"""Statistics of a group's rewards, in the group's own launch or in the loss's.

Sums are of fixed-point integers: exact, so that the order of the samples changes no bit, where nothing is sorted. Each
value is first taken as its share of the group's range, in [0, 1], with as many bits as 64 leave for the count.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import advantage, centred
from .numeric import max_, quotient

GROUP_BLOCK = tl.constexpr(128)  # groups are small
LARGEST_SHARE = tl.constexpr(1.001)  # 1, and what quotients of float32 and their squares may be above


class Source(NamedTuple):
    """Where rewards lie: a row of `components` for each sample, `stride` apart; None for the last three: not given."""

    rewards: Any
    stride: Any
    components: Any
    weights: Any
    valid: Any
    order: Any  # of the samples, group after group


class Statistics(NamedTuple):
    """The lowest reward, the mean above it, the deviation, how many count, whether all are equal, and their range, 1
    where there is none."""

    low: Any
    above: Any
    std: Any
    count: Any
    constant: Any
    span: Any


@triton.jit
def sample_at(source, i, mask):
    """Where the i-th sample of the groups, which lie one after the other, is kept."""
    if source.order is None:
        return i
    else:
        return tl.load(source.order + i, mask, 0)


@triton.jit
def reward_at(source, i, mask, ACC: tl.constexpr):
    """The weighted sum of the components that the i-th samples have; NaN where there is none, or it does not count."""
    at = sample_at(source, i, mask)
    total, any = tl.zeros_like(i).to(ACC), i < 0
    for c in range(source.components):
        r = tl.load(source.rewards + at * source.stride + c, mask, float("nan")).to(ACC)
        there = r == r
        if source.weights is not None:
            r = r * tl.load(source.weights + c).to(ACC)
        total, any = total + tl.where(there, r, 0.0), any | there
    if source.valid is not None:
        any = any & (tl.load(source.valid + at, mask, 0) != 0)
    return tl.where(any, total, float("nan"))


@triton.jit
def fixed(share, on, scale):
    """A number in [-1, 1] as an integer; 0 where it is off, and where an infinite reward has made it NaN or large.

    The highest sample's share is x / x, which `/` may round above 1: `scale_for` leaves room for it."""
    return tl.where(on & (tl.abs(share) <= LARGEST_SHARE), share * scale, 0.0).to(tl.int64)


@triton.jit
def scale_for(count):
    """A power of two of which `count` are at most 2^60, or 2^61 where log2 is rounded up past an integer: with
    LARGEST_SHARE still within 63 bits. What it is exactly, nothing depends on."""
    return tl.exp2(60.0 - tl.ceil(tl.log2(max_(count, 1.0))))


@triton.jit
def finite_range(low, high):
    """(origin, range, whether it is finite): infinite rewards are seen from 0."""
    span = high - low
    finite = span - span == 0
    return tl.where(finite, low, 0.0), tl.where(finite & (span > 0), span, 1.0), finite


@triton.jit
def statistics(source, begin, end, ddof, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Of the rewards [begin, end), centred before they are squared."""
    zeros, counted = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], tl.int32)
    low, high = zeros + float("inf"), zeros - float("inf")
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r = reward_at(source, i, i < end, ACC)
        counted += (r == r).to(tl.int32)
        low, high = tl.minimum(low, r), tl.maximum(high, r)  # a NaN is passed over
    count, least, most = tl.sum(counted, 0).to(ACC), tl.min(low, 0), tl.max(high, 0)
    constant = (least == most) | (count == 0)
    origin, span, finite = finite_range(least, most)
    scale, n = scale_for(count), max_(count, 1.0)
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r = reward_at(source, i, i < end, ACC)
        total += fixed((r - origin) / span, r == r, scale)
    above = tl.where(finite, quotient(quotient(tl.sum(total, 0).to(ACC), scale), n) * span, least + most)
    squares = tl.zeros([BLOCK], tl.int64)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r = reward_at(source, i, i < end, ACC)
        d = ((r - origin) - above) / span
        squares += fixed(d * d, r == r, scale)
    variance = quotient(quotient(tl.sum(squares, 0).to(ACC), scale), max_(count - ddof, 1.0))
    std = tl.where(finite, tl.sqrt(variance) * span, float("nan"))
    some = count > 0
    return Statistics(
        tl.where(some, tl.where(constant, least, origin), 0.0), tl.where(constant, 0.0, above),
        tl.where(constant | (count <= ddof), 0.0, std), count, constant, span,
    )  # fmt: skip


@triton.jit
def sample_advantage(rewards, stride, sample, on, group_size, eps, FORM: tl.constexpr, ACC: tl.constexpr):
    """Of one sample, from its group's rewards, "centred" or "normalised"; 0 where they are "given", or NaN."""
    if FORM.advantages == "given":
        return 0.0
    else:
        begin = sample // group_size * group_size
        end = tl.where(on, begin + group_size, begin)
        group = statistics(Source(rewards, stride, 1, None, None, None), begin, end, 1.0, ACC, GROUP_BLOCK)
        r = tl.load(rewards + sample * stride, on, float("nan")).to(ACC)
        d = centred(r, group.low, group.above, 0.0, group.count, group.constant, False, "mean")
        scale: tl.constexpr = "group" if FORM.advantages == "normalised" else "none"
        a = advantage(r, d, r, group.low + group.above, group.std, group.count, 0.0, eps, scale, False)
        return tl.where(r == r, a, 0.0)
