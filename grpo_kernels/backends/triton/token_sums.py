"""The token kernel's sums: what each token adds, how a program leaves its own behind, and the metrics that the last
program makes of all of them."""

import triton
import triton.language as tl

from ...config import METRICS
from .numeric import expm1_minus_x, max_, min_, quotient, weighted

# What the programs leave behind: first what is added up, then two minima and two maxima.
ADDED, MINIMA, SUMS = tl.constexpr(19), tl.constexpr(21), tl.constexpr(23)
TOKENS, CLIPPED_LOW, CLIPPED_HIGH = tl.constexpr(3), tl.constexpr(9), tl.constexpr(10)  # three of them
METRIC_COUNT = tl.constexpr(len(METRICS))


@triton.jit
def identity(i: tl.constexpr):
    """The neutral element of the i-th sum."""
    if i < ADDED:
        return 0.0
    elif i < MINIMA:
        return float("inf")
    else:
        return float("-inf")


@triton.jit
def empty_sums(BLOCK: tl.constexpr, ACC: tl.constexpr):
    sums = ()
    for i in tl.static_range(SUMS):
        sums = sums + (tl.full([BLOCK], identity(i), ACC),)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def merge(a, b):
    sums = ()
    for i in tl.static_range(SUMS):
        if i < ADDED:
            sums = sums + (a[i] + b[i],)  # noqa: RUF005
        elif i < MINIMA:
            sums = sums + (min_(a[i], b[i]),)  # noqa: RUF005
        else:
            sums = sums + (max_(a[i], b[i]),)  # noqa: RUF005
    return sums


@triton.jit
def across(lanes, i: tl.constexpr):
    """The i-th sum of all lanes."""
    if i < ADDED:
        return tl.sum(lanes, 0)
    elif i < MINIMA:
        return tl.min(lanes, 0)
    else:
        return tl.max(lanes, 0)


@triton.jit
def token_sums(on, logp, moved, entropy, log_ratio, token, term, s):
    """What each lane's token adds to the sums; `moved`: its own log-ratio, clamped."""
    drift, w = logp - token.rollout, token.token_weight * token.pooled_weight
    one, ratio = tl.zeros_like(logp) + 1, tl.exp(log_ratio)
    bonus = weighted(s.entropy_coef * token.entropy_mask * token.entropy_weight, entropy)
    sums = (
        weighted(token.weight, term.policy), weighted(token.weight * s.kl_coef, term.kl), -bonus,
        one, entropy, term.kl, -moved, expm1_minus_x(moved),
        ratio, tl.where(term.low, one, 0.0), tl.where(term.high, one, 0.0), tl.where(term.cap, one, 0.0),
        term.weight, tl.where(w == 0, one, 0.0), w, w * w,
        -drift, expm1_minus_x(drift), tl.abs(drift),
        ratio, w,
        ratio, w,
    )  # fmt: skip
    kept = ()
    for i in tl.static_range(SUMS):  # a masked token's NaN stays its own
        kept = kept + (tl.where(on, sums[i], identity(i)),)  # noqa: RUF005
    return kept


@triton.jit
def store_partials(sums, sums_ptr, counts_ptr, sequence, sequences):
    """What a program found, where the last one finds it; True for that one. Integers may be added in any order.

    Scalars are stored by one thread, the one that then says so: its release covers them on every device."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for k in tl.static_range(SUMS):
        tl.store(sums_ptr + k * programs + program, across(sums[k], k))
    at = counts_ptr + 1 + 3 * sequence
    tl.atomic_add(at, tl.sum(sums[TOKENS], 0).to(tl.int32), sequence < sequences, sem="relaxed")
    tl.atomic_add(at + 1, tl.sum(sums[CLIPPED_LOW], 0).to(tl.int32), sequence < sequences, sem="relaxed")
    tl.atomic_add(at + 2, tl.sum(sums[CLIPPED_HIGH], 0).to(tl.int32), sequence < sequences, sem="relaxed")
    return tl.atomic_add(counts_ptr, 1, sem="acq_rel") == programs - 1


@triton.jit
def store_metrics(metrics, loss, t, low_min, high_max):
    """From the sums of all tokens, scalars by now, in the order of config.METRICS."""
    policy, kl, entropy, tokens, raw_entropy, raw_kl, approx_kl, approx_kl_k3 = t[0:8]
    ratio, low, high, cap, gradient_weight, rejected, weight, squares = t[8:16]
    rollout_kl, rollout_kl_k3, rollout_abs_diff, ratio_min, weight_min, ratio_max, weight_max = t[16:23]
    n, any = max_(tokens, 1.0), tokens > 0  # a mean of ones is 1
    ess = tl.where(squares == 0, 0.0, quotient(weight * weight, n * squares))
    values = (
        policy, kl, entropy, tokens,
        quotient(raw_entropy, n), quotient(raw_kl, n), quotient(approx_kl, n), quotient(approx_kl_k3, n),
        tl.where(any, quotient(ratio, n), 1.0), tl.where(any, ratio_min, 1.0), tl.where(any, ratio_max, 1.0),
        quotient(low, n), quotient(high, n), quotient(low + high, n), quotient(cap, n),
        tl.where(any, low_min, 0.0), tl.where(any, high_max, 0.0),
        tl.where(any, quotient(gradient_weight, n), 1.0), quotient(rejected, n),
        tl.where(any, quotient(weight, n), 1.0),
        tl.where(any, weight_min, 1.0), tl.where(any, weight_max, 1.0), tl.where(any, ess, 1.0),
        quotient(rollout_kl, n), quotient(rollout_kl_k3, n), quotient(rollout_abs_diff, n),
    )  # fmt: skip
    tl.store(loss, policy + kl + entropy)
    for i in tl.static_range(METRIC_COUNT):
        tl.store(metrics + i, values[i])


@triton.jit
def reduce_programs(sums_ptr, counts_ptr, sequences, metrics, loss, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """All partials, in the order of the programs, loaded from the cache that programs share."""
    programs = tl.num_programs(0).to(tl.int64)
    sums = empty_sums(BLOCK, ACC)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        one = ()
        for k in tl.static_range(SUMS):
            sum = tl.load(sums_ptr + k * programs + i, i < programs, identity(k), cache_modifier=".cg")
            one = one + (sum,)  # type: ignore[assignment]  # noqa: RUF005
        sums = merge(sums, one)
    low_min, high_max = tl.full([BLOCK], float("inf"), ACC), tl.full([BLOCK], float("-inf"), ACC)
    for start in range(0, sequences, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = counts_ptr + 3 * i
        tokens = tl.load(at, i < sequences, 0, cache_modifier=".cg").to(ACC)
        low = tl.load(at + 1, i < sequences, 0, cache_modifier=".cg").to(ACC)
        high = tl.load(at + 2, i < sequences, 0, cache_modifier=".cg").to(ACC)
        low_min = min_(low_min, tl.where(tokens > 0, quotient(low, tokens), float("inf")))
        high_max = max_(high_max, tl.where(tokens > 0, quotient(high, tokens), float("-inf")))
    total = ()
    for k in tl.static_range(SUMS):
        total = total + (across(sums[k], k),)  # type: ignore[assignment]  # noqa: RUF005
    store_metrics(metrics, loss, total, tl.min(low_min, 0), tl.max(high_max, 0))
