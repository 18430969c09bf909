"""Group advantages: one launch for consecutive groups, two where the deviation is the batch's. Ids are sorted first."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...inputs.grouping import AdvantageForm, Samples, sorted_by_group
from ...inputs.layout import acc_dtype
from .group import GROUP_BLOCK, Source, finite_range, fixed, reward_at, sample_at, scale_for, statistics
from .launch import ACC_TYPES, bits_to_float, kernel, on_device_of, registers, scalar_bits
from .math import advantage, centred
from .numeric import clamp_, max_, quotient

WARPS = 4  # groups are small: a launch of many programs, each done in one step
BATCH_BLOCK, BATCH_WARPS = 1024, 8  # one program takes all samples
REGISTERS = 128  # per thread, at most


@triton.jit
def length_shift(source, lengths, begin, end, group, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """sum(l R) / sum(l), less the mean; 0 where no sample has a length."""
    longest = tl.zeros([BLOCK], ACC)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r = reward_at(source, i, i < end, ACC)
        length = tl.load(lengths + sample_at(source, i, i < end), i < end, 0.0).to(ACC)
        longest = max_(longest, tl.where(r == r, length, 0.0))
    unit, scale = tl.max(longest, 0), scale_for(group.count)
    unit = tl.where(unit > 0, unit, 1.0)
    total, weighted = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r = reward_at(source, i, i < end, ACC)
        share = tl.load(lengths + sample_at(source, i, i < end), i < end, 0.0).to(ACC) / unit
        total += fixed(share, r == r, scale)
        weighted += fixed(share * ((r - group.low - group.above) / group.span), r == r, scale)
    length = tl.sum(total, 0).to(ACC)
    mean = quotient(tl.sum(weighted, 0).to(ACC), tl.where(length > 0, length, 1.0))
    return tl.where(length > 0, mean * group.span, 0.0)


@triton.jit
def deviation_of_others(source, i, begin, end, ddof, count, ACC: tl.constexpr):
    """The standard deviation of the group without each sample of the block `i`, on the range of the others: equal ones
    give exactly 0, and an outlier takes no bit of theirs."""
    every = i * 0  # lane reads the same sample
    zero = every.to(ACC)
    low, high = zero + float("inf"), zero - float("inf")
    for j in range(begin, end):
        r = tl.where(i == j, float("nan"), reward_at(source, every + j, every == 0, ACC))  # a NaN is passed over
        low, high = tl.minimum(low, r), tl.maximum(high, r)
    origin, span, finite = finite_range(low, high)
    n, scale = count - 1, scale_for(count)
    total = every
    for j in range(begin, end):
        share = (reward_at(source, every + j, every == 0, ACC) - origin) / span
        total += fixed(share, (share == share) & (i != j), scale)
    centre, squares = quotient(quotient(total.to(ACC), scale), max_(n, 1.0)), every
    for j in range(begin, end):
        d = (reward_at(source, every + j, every == 0, ACC) - origin) / span - centre
        squares += fixed(d * d, (d == d) & (i != j), scale)
    variance = quotient(quotient(squares.to(ACC), scale), max_(n - ddof, 1.0))
    std = tl.where(finite, tl.sqrt(variance) * span, float("nan"))
    return tl.where(low == high, 0.0, tl.where(n > ddof, std, 0.0))


@triton.jit
def critics_disagree(source, critics, begin, end, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Of how many samples the critic's value is not the reward."""
    disagree = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r = reward_at(source, i, i < end, ACC)
        critic = tl.load(critics + sample_at(source, i, i < end), i < end, float("nan")).to(ACC)
        disagree += ((r == r) & (critic == critic) & (r != critic)).to(tl.int32)
    return tl.sum(disagree, 0)


@kernel
def batch_kernel(
    rewards, components: tl.int64, reward_weights, valid, std, samples: tl.int64, ddof: tl.int64,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    source = Source(rewards, components, components, reward_weights, valid, None)
    tl.store(std, statistics(source, samples * 0, samples, ddof.to(ACC), ACC, BLOCK).std)


@kernel
def group_kernel(
    rewards, components: tl.int64, reward_weights, valid, order, ends, lengths, critics, batch_std,
    advantages, means, stds, informative,
    group_size: tl.int64, ddof: tl.int64, eps: tl.int64, critic_weight: tl.int64, clip_low: tl.int64,
    clip_high: tl.int64, single_raw: tl.int64,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a group of group_size samples. With ids, `order` has the samples group after group, and there is a
    program for each, of which the first of each group works; `ends`, of each sample's group, say which that is."""
    program = tl.program_id(0).to(tl.int64)
    if ends is None:
        begin, end = program * group_size, program * group_size + group_size
    else:
        begin, end = program, program
        if tl.load(ends + program - 1, program > 0, 0) == program:
            end = tl.load(ends + program)
    source = Source(rewards, components, components, reward_weights, valid, order)
    group = statistics(source, begin, end, ddof.to(ACC), ACC, BLOCK)
    mean, std, count, shift = group.low + group.above, group.std, group.count, group.std * 0
    if BASELINE == "length_weighted":
        shift = length_shift(source, lengths, begin, end, group, ACC, BLOCK)
    informs = (count >= 2) & ~group.constant
    if critics is not None:
        informs = informs | (critics_disagree(source, critics, begin, end, ACC, BLOCK) > 0)
    if SCALE == "batch":
        std = tl.load(batch_std)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at, r = sample_at(source, i, i < end), reward_at(source, i, i < end, ACC)
        critic, deviation = r, std + tl.zeros([BLOCK], ACC)
        if critics is not None:
            critic = tl.load(critics + at, i < end, float("nan")).to(ACC)
        if SCALE == "leave_one_out":
            others = deviation_of_others(source, i, begin, end, ddof.to(ACC), count, ACC)
            deviation = tl.where(r == r, others, deviation)
        d = centred(r, group.low, group.above, shift, count, group.constant, single_raw != 0, BASELINE)
        a = advantage(
            r, d, critic, mean, deviation, count, bits_to_float(critic_weight, ACC), bits_to_float(eps, ACC), SCALE,
            critics is not None,
        )  # fmt: skip
        a = tl.where(r == r, clamp_(a, bits_to_float(clip_low, ACC), bits_to_float(clip_high, ACC)), 0.0)
        tl.store(advantages + at, a, i < end)
        tl.store(means + at, mean + tl.zeros([BLOCK], ACC), i < end)
        tl.store(stds + at, deviation, i < end)
        tl.store(informative + at, informs, i < end)


def group_advantages(samples: Samples, form: AdvantageForm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, weights, valid, ids, lengths, critics = (None if x is None else x.contiguous() for x in samples)
    assert rewards is not None
    (count, components), acc = rewards.shape, acc_dtype(rewards.dtype)
    advantages, means, stds = (rewards.new_empty(count) for _ in range(3))
    informative, batch_std = rewards.new_empty(count, dtype=torch.bool), None
    if not count:
        return advantages, means, stds, informative
    order, ends = (None, None) if ids is None else sorted_by_group(ids, ends=True)
    read = (rewards, components, weights, valid)
    constants: dict[str, Any] = {"ACC": ACC_TYPES[acc], "enable_fp_fusion": False, **registers(REGISTERS)}
    numbers = (form.eps, form.critic_weight, form.clip_low, form.clip_high)
    with on_device_of(rewards):
        if form.scale == "batch":
            batch_std = rewards.new_empty(1)
            batch_kernel[(1,)](
                *read, batch_std, count, form.ddof, BLOCK=BATCH_BLOCK, num_warps=BATCH_WARPS, **constants
            )
        group_kernel[(count if ids is not None else count // form.group_size,)](
            *read, order, ends, lengths, critics, batch_std, advantages, means, stds, informative,
            form.group_size, form.ddof, *(scalar_bits(x, acc) for x in numbers), int(form.single_raw),
            BASELINE=form.baseline, SCALE=form.scale, BLOCK=GROUP_BLOCK.value, num_warps=WARPS, **constants,
        )  # fmt: skip
    return advantages, means, stds, informative
