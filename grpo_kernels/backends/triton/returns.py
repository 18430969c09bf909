"""Generalised advantage estimation, and the critic's loss."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import real_dtype
from .launch import REALS, bits, kernel, number, on_device_of
from .math import temporal_difference, value_term
from .policy_inputs import read, view_args

BLOCK, WARPS = 1024, 4  # tokens of a sequence scanned together: 8 a thread, and the scan crosses warps once


@triton.jit
def latest(later_value, later_has, value, has):
    """The nearest active value from a token on."""
    return tl.where(has != 0, value, later_value), later_has | has


@triton.jit
def chained(later_factor, later_sum, factor, sum):
    """A = sum + factor * A of what follows: two such steps are one."""
    return later_factor * factor, sum + factor * later_sum


@triton.jit
def first_of(x, t, begin):
    return tl.sum(tl.where(t == begin, x, 0.0), 0)


@kernel
def gae_kernel(
    rewards, rewards_b: tl.int64, rewards_t: tl.int64, values, values_b: tl.int64, values_t: tl.int64,
    active, active_b: tl.int64, active_t: tl.int64, cu_seqlens, tokens: tl.int64, gamma_bits: tl.int64,
    decay_bits: tl.int64, advantages, returns, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a sequence, a block of its tokens at a time from the end."""
    sequence = tl.program_id(0).to(tl.int64)
    gamma, decay = number(gamma_bits, REAL), number(decay_bits, REAL)
    if cu_seqlens is None:
        b, first, length, out = sequence, sequence * 0, tokens, sequence * tokens
    else:
        b, first, out = sequence * 0, tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - first
    running, next_value = gamma * 0, gamma * 0
    for back in range(0, tl.cdiv(length, BLOCK)):
        begin = (tl.cdiv(length, BLOCK) - 1 - back) * BLOCK
        t = begin + tl.arange(0, BLOCK)
        inside, follows = t < length, t + 1 < length
        counts, next_counts = inside, follows
        if active is not None:
            at = active + b * active_b + (first + t) * active_t
            counts = inside & (tl.load(at, mask=inside, other=0) != 0)
            next_counts = follows & (tl.load(at + active_t, mask=follows, other=0) != 0)
        zero = tl.zeros([BLOCK], REAL)
        r = read((rewards, rewards_b, rewards_t), b, first + t, counts, zero, REAL)
        v = read((values, values_b, values_t), b, first + t, counts, zero, REAL)
        following = read((values, values_b, values_t), b, first + t + 1, next_counts, zero, REAL)
        ahead, known = tl.associative_scan((following, next_counts.to(tl.int32)), 0, latest, reverse=True)
        ahead = tl.where(known != 0, ahead, next_value)
        delta = tl.where(counts, temporal_difference(r, v, ahead, gamma), 0.0)
        factor, total = tl.associative_scan((tl.where(counts, decay, 1.0), delta), 0, chained, reverse=True)
        a = total + factor * running
        tl.store(advantages + out + t, tl.where(counts, a, 0.0), mask=inside)
        if values is not None:
            tl.store(returns + out + t, tl.where(counts, a + v, 0.0), mask=inside)
        running, next_value = first_of(a, t, begin), first_of(ahead, t, begin)


def gae(
    rewards: Tensor, values: Tensor | None, active: Tensor | None, cu_seqlens: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    real, (batch, tokens) = real_dtype(rewards.dtype), rewards.shape
    advantages = rewards.new_zeros(rewards.shape, dtype=real)
    returns = torch.zeros_like(advantages) if values is not None else advantages.new_empty(0)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if sequences and tokens:
        with on_device_of(rewards):
            gae_kernel[(sequences,)](
                *view_args(rewards), *view_args(values), *view_args(active),
                None if cu_seqlens is None else cu_seqlens.contiguous(), tokens, bits(gamma, real),
                bits(gamma * lam, real), advantages, returns, REAL=REALS[real], BLOCK=BLOCK, num_warps=WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
    return advantages, returns


@kernel
def value_kernel(
    values, values_b: tl.int64, values_t: tl.int64, old, old_b: tl.int64, old_t: tl.int64,
    targets, targets_b: tl.int64, targets_t: tl.int64, weights, weights_b: tl.int64, weights_t: tl.int64,
    active, active_b: tl.int64, active_t: tl.int64, tokens: tl.int64, count: tl.int64, clip: tl.int64,
    per_token, g_values, sums, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of tokens a program; `sums` [5, programs]: loss, tokens, clipped, values, targets."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    b, t, inside = i // tokens, i % tokens, i < count
    on = inside & (tl.load(active + b * active_b + t * active_t, mask=inside, other=0) != 0)
    zero = tl.zeros([BLOCK], REAL)
    value = read((values, values_b, values_t), b, t, on, zero, REAL)
    target = read((targets, targets_b, targets_t), b, t, on, zero, REAL)
    weight = read((weights, weights_b, weights_t), b, t, on, zero, REAL)
    term, slope, clipped = value_term(
        value, read((old, old_b, old_t), b, t, on, value, REAL), target, number(clip, REAL)
    )
    tl.store(per_token + i, tl.where(on, term, 0.0), mask=inside)
    tl.store(g_values + i, tl.where(on, weight * slope, 0.0), mask=inside)
    programs, at = tl.num_programs(0), sums + program
    tl.store(at, tl.sum(tl.where(on, weight * term, 0.0), 0))
    tl.store(at + programs, tl.sum(on.to(REAL), 0))
    tl.store(at + 2 * programs, tl.sum((on & clipped).to(REAL), 0))
    tl.store(at + 3 * programs, tl.sum(value, 0))
    tl.store(at + 4 * programs, tl.sum(target, 0))


def value_loss(
    values: Tensor, old_values: Tensor | None, returns: Tensor, weights: Tensor, active: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real, count = real_dtype(values.dtype), values.numel()
    per_token, g_values = (values.new_empty(values.shape, dtype=real) for _ in range(2))
    programs = triton.cdiv(count, BLOCK)
    sums = values.new_zeros((5, programs), dtype=real)
    views: list[Any] = [arg for x in (values, old_values, returns, weights, active) for arg in view_args(x)]
    if count:
        with on_device_of(values):
            value_kernel[(programs,)](
                *views, values.shape[1], count, bits(clip, real), per_token, g_values, sums, REAL=REALS[real],
                BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    loss, tokens, *others = sums.sum(1).unbind()  # one writer a column, added in one order
    metrics = torch.stack([tokens, *(x / tokens.clamp(min=1) for x in others)])
    return loss, per_token, g_values, metrics
