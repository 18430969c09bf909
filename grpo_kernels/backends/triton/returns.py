"""Generalised advantage estimation, and the critic's loss."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...inputs.layout import acc_dtype
from .launch import ACC_TYPES, bits_to_float, kernel, on_device_of, registers, scalar_bits
from .math import temporal_difference, value_term
from .numeric import max_, quotient, weighted
from .packed import first_of_tail, sequence_bounds
from .policy_inputs import read, view_args

# Tokens of a sequence scanned together, 8 per thread: one of each 128, no neighbours, so that a scan is 8 scans of 128
# tokens, each across the warps.
BLOCK, WARPS = 1024, 4
REGISTERS = 168  # per thread, at most: three programs on a multiprocessor; packed GAE spills with 128


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


@triton.jit
def store_tail(cu_seqlens, sequences, tokens, advantages, values, returns, ACC: tl.constexpr, BLOCK: tl.constexpr):
    zeros = tl.zeros([BLOCK], ACC)
    for start in range(
        first_of_tail(cu_seqlens, sequences, tokens, BLOCK), tokens, tl.num_programs(0).to(tl.int64) * BLOCK
    ):
        t = start + tl.arange(0, BLOCK)
        tl.store(advantages + t, zeros, t < tokens)
        if values is not None:
            tl.store(returns + t, zeros, t < tokens)


@kernel
def gae_kernel(
    rewards, rewards_b: tl.int64, rewards_t: tl.int64, values, values_b: tl.int64, values_t: tl.int64,
    active, active_b: tl.int64, active_t: tl.int64, cu_seqlens, tokens: tl.int64, sequences: tl.int64,
    gamma_bits: tl.int64, decay_bits: tl.int64, advantages, returns, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a sequence, a block of its tokens at a time from the end; packed, at least one, and with it a share of
    what lies past the last boundary, which is zeros."""
    sequence = tl.program_id(0).to(tl.int64)
    gamma, decay = bits_to_float(gamma_bits, ACC), bits_to_float(decay_bits, ACC)
    if cu_seqlens is None:
        b, first, length, out = sequence, sequence * 0, tokens, sequence * tokens
    else:
        b = sequence * 0
        first, end = sequence_bounds(cu_seqlens, sequence, sequence < sequences, tokens)
        length, out = end - first, first
    running, next_value = gamma * 0, gamma * 0
    for back in range(0, tl.cdiv(length, BLOCK)):
        begin = (tl.cdiv(length, BLOCK) - 1 - back) * BLOCK
        t = begin + tl.arange(0, BLOCK)
        in_bounds, follows = t < length, t + 1 < length
        is_active, next_is_active = in_bounds, follows
        if active is not None:
            at = active + b * active_b + (first + t) * active_t
            is_active = in_bounds & (tl.load(at, mask=in_bounds, other=0) != 0)
            next_is_active = follows & (tl.load(at + active_t, mask=follows, other=0) != 0)
        zero = tl.zeros([BLOCK], ACC)
        r = read((rewards, rewards_b, rewards_t), b, first + t, is_active, zero, ACC)
        v = read((values, values_b, values_t), b, first + t, is_active, zero, ACC)
        following = read((values, values_b, values_t), b, first + t + 1, next_is_active, zero, ACC)
        ahead, has_later = tl.associative_scan((following, next_is_active.to(tl.int32)), 0, latest, reverse=True)
        ahead = tl.where(has_later != 0, ahead, next_value)
        delta = tl.where(is_active, temporal_difference(r, v, ahead, gamma), 0.0)
        factor, total = tl.associative_scan((tl.where(is_active, decay, 1.0), delta), 0, chained, reverse=True)
        a = total + factor * running
        tl.store(advantages + out + t, tl.where(is_active, a, 0.0), mask=in_bounds)
        if values is not None:
            tl.store(returns + out + t, tl.where(is_active, a + v, 0.0), mask=in_bounds)
        running, next_value = first_of(a, t, begin), first_of(ahead, t, begin)
    if cu_seqlens is not None:
        store_tail(cu_seqlens, sequences, tokens, advantages, values, returns, ACC, BLOCK)


def gae(
    rewards: Tensor, values: Tensor | None, active: Tensor | None, cu_seqlens: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    acc, (batch, tokens) = acc_dtype(rewards.dtype), rewards.shape
    advantages = rewards.new_empty(rewards.shape, dtype=acc)
    returns = torch.empty_like(advantages) if values is not None else advantages.new_empty(0)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if advantages.numel():
        with on_device_of(rewards):
            gae_kernel[(max(sequences, 1),)](
                *view_args(rewards), *view_args(values), *view_args(active),
                None if cu_seqlens is None else cu_seqlens.contiguous(), tokens, sequences, scalar_bits(gamma, acc),
                scalar_bits(gamma * lam, acc), advantages, returns, ACC=ACC_TYPES[acc], BLOCK=BLOCK, num_warps=WARPS,
                enable_fp_fusion=False, **registers(REGISTERS),
            )  # fmt: skip
    return advantages, returns


@triton.jit
def left_by_all(sums, programs, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """A row of `sums`, added in the order of the programs. Read from the cache that they share."""
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums + i, i < programs, 0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def reduce_values(sums, programs, loss, metrics, ACC: tl.constexpr, BLOCK: tl.constexpr):
    tokens = left_by_all(sums + programs, programs, ACC, BLOCK)
    tl.store(loss, left_by_all(sums, programs, ACC, BLOCK))
    tl.store(metrics, tokens)
    for k in tl.static_range(1, 4):
        mean = quotient(left_by_all(sums + (k + 1) * programs, programs, ACC, BLOCK), max_(tokens, 1.0))
        tl.store(metrics + k, mean)


@kernel
def value_kernel(
    values, values_b: tl.int64, values_t: tl.int64, old, old_b: tl.int64, old_t: tl.int64,
    targets, targets_b: tl.int64, targets_t: tl.int64, weights, weights_b: tl.int64, weights_t: tl.int64,
    active, active_b: tl.int64, active_t: tl.int64, tokens: tl.int64, count: tl.int64, clip: tl.int64,
    loss, per_token, g_values, metrics, sums, done, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes a block of tokens and stores its partials in `sums` [5, programs]: loss, tokens, clipped,
    values, targets. `done`, int32: how many programs have; the last one adds them up."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    b, t, in_bounds = i // tokens, i % tokens, i < count
    is_active = in_bounds & (tl.load(active + b * active_b + t * active_t, mask=in_bounds, other=0) != 0)
    zero = tl.zeros([BLOCK], ACC)
    value = read((values, values_b, values_t), b, t, is_active, zero, ACC)
    target = read((targets, targets_b, targets_t), b, t, is_active, zero, ACC)
    weight = read((weights, weights_b, weights_t), b, t, is_active, zero, ACC)
    term, slope, clipped = value_term(
        value, read((old, old_b, old_t), b, t, is_active, value, ACC), target, bits_to_float(clip, ACC)
    )
    tl.store(per_token + i, tl.where(is_active, term, 0.0), mask=in_bounds)
    tl.store(g_values + i, tl.where(is_active, weighted(weight, slope), 0.0), mask=in_bounds)
    programs, at = tl.num_programs(0).to(tl.int64), sums + program
    tl.store(at, tl.sum(tl.where(is_active, weighted(weight, term), 0.0), 0))
    tl.store(at + programs, tl.sum(is_active.to(ACC), 0))
    tl.store(at + 2 * programs, tl.sum((is_active & clipped).to(ACC), 0))
    tl.store(at + 3 * programs, tl.sum(value, 0))
    tl.store(at + 4 * programs, tl.sum(target, 0))
    # One thread has stored them, the one that now says so: its release covers them.
    if tl.atomic_add(done, 1, sem="acq_rel") == programs - 1:
        reduce_values(sums, programs, loss, metrics, ACC, BLOCK)


def value_loss(
    values: Tensor, old_values: Tensor | None, returns: Tensor, weights: Tensor, active: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc, count = acc_dtype(values.dtype), values.numel()
    per_token, g_values = (values.new_empty(values.shape, dtype=acc) for _ in range(2))
    if not count:
        return values.new_zeros((), dtype=acc), per_token, g_values, values.new_zeros(4, dtype=acc)
    programs = triton.cdiv(count, BLOCK)
    loss, metrics, sums = (values.new_empty(shape, dtype=acc) for shape in ((), 4, (5, programs)))
    views: list[Any] = [arg for x in (values, old_values, returns, weights, active) for arg in view_args(x)]
    done = torch.zeros(1, dtype=torch.int32, device=values.device)
    with on_device_of(values):
        value_kernel[(programs,)](
            *views, values.shape[1], count, scalar_bits(clip, acc), loss, per_token, g_values, metrics, sums, done,
            ACC=ACC_TYPES[acc], BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return loss, per_token, g_values, metrics
