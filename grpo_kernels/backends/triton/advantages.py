"""Group advantages. Rewards are sorted within their group before they are summed, so that the order of the samples
changes no bit, and what does not count, a NaN by then, comes last."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...grouping import AdvantageForm, Samples
from ...layout import real_dtype
from ...reference.advantages import combined_rewards
from .launch import REALS, bits, kernel, number, on_device_of
from .math import advantage, centred
from .numeric import clamp_, max_

GROUP_BLOCK, WARPS = 128, 4  # groups are small: a launch of many programs, each done in one step
BATCH_BLOCK, BATCH_WARPS = 1024, 8  # one program takes all samples


@triton.jit
def moments(values, begin, end, ddof, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """(mean, residual, std, count, constant) of the rewards [begin, end), centred in a second pass: no cancellation.
    The residual is the mean of what is left after the mean, as rounded, is taken off."""
    zeros = tl.zeros([BLOCK], REAL)
    counted, total = zeros, zeros
    low, high = zeros + float("inf"), zeros - float("inf")
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r = tl.load(values + i, i < end, float("nan"))
        counts = r == r
        counted += tl.where(counts, 1.0, 0.0)
        total += tl.where(counts, r, 0.0)
        low, high = tl.minimum(low, r), tl.maximum(high, r)  # a NaN is passed over
    count, least = tl.sum(counted, 0), tl.min(low, 0)
    n, constant = max_(count, 1.0), (least == tl.max(high, 0)) | (count == 0)
    mean = tl.where(constant, tl.where(count == 0, 0.0, least), tl.sum(total, 0) / n)
    left, squares = zeros, zeros
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r = tl.load(values + i, i < end, float("nan"))
        d = tl.where(r == r, r - mean, 0.0)
        left, squares = left + d, squares + d * d
    residual = tl.sum(left, 0) / n
    variance = (tl.sum(squares, 0) - n * residual * residual) / max_(count - ddof, 1.0)
    std = tl.where(constant | (count <= ddof), 0.0, tl.sqrt(max_(variance, 0.0)))
    return mean, tl.where(constant, 0.0, residual), std, count, constant


@triton.jit
def length_shift(values, lengths, begin, end, mean, residual, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """sum(l R) / sum(l), less the mean."""
    weighted = tl.zeros([BLOCK], REAL)
    total = weighted
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r = tl.load(values + i, i < end, float("nan"))
        length = tl.where(r == r, tl.load(lengths + i, i < end, 0.0), 0.0)
        weighted += length * tl.where(r == r, r - mean - residual, 0.0)
        total += length
    length = tl.sum(total, 0)
    return tl.where(length > 0, tl.sum(weighted, 0) / tl.where(length > 0, length, 1.0), 0.0)


@triton.jit
def deviation_of_others(values, i, begin, end, mean, count, ddof, REAL: tl.constexpr):
    """The standard deviation of the group without each sample of the block `i`, in two passes over the others: equal
    ones give exactly 0."""
    zero = tl.zeros_like(i).to(REAL)
    total, low, high = zero, zero + float("inf"), zero - float("inf")
    for j in range(begin, end):
        r = tl.load(values + j)
        d = tl.where(i == j, float("nan"), r - mean)  # a NaN is passed over
        total += tl.where(d == d, d, 0.0)
        low, high = tl.minimum(low, d), tl.maximum(high, d)
    n = count - 1
    centre, squares = clamp_(total / max_(n, 1.0), low, high), zero
    for j in range(begin, end):
        r = tl.load(values + j)
        d = tl.where(i == j, float("nan"), r - mean - centre)
        squares += tl.where(d == d, d * d, 0.0)
    return tl.where(n > ddof, tl.sqrt(squares / max_(n - ddof, 1.0)), 0.0)


@kernel
def batch_kernel(values, std, samples: tl.int64, ddof: tl.int64, REAL: tl.constexpr, BLOCK: tl.constexpr):
    _, _, deviation, _, _ = moments(values, samples * 0, samples, ddof.to(REAL), REAL, BLOCK)
    tl.store(std, deviation)


@kernel
def group_kernel(
    values, order, ends, lengths, critics, batch_std, advantages, means, stds, informative,
    group_size: tl.int64, ddof: tl.int64, eps: tl.int64, critic_weight: tl.int64, clip_low: tl.int64,
    clip_high: tl.int64, single_raw: tl.int64,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values, lengths, critics: group after group, sorted; order: where they came from. A program a group of
    group_size, or a program a sample, of which the first of each group works; `ends`, of each sample's group, say which
    that is."""
    program = tl.program_id(0).to(tl.int64)
    if ends is None:
        begin = program * group_size
        end, origin = begin + group_size, begin
    else:
        begin, origin = program, program * 0
        first = tl.load(ends + program - 1, program > 0, 0) == program
        end = tl.where(first, tl.load(ends + program), begin)
    mean, residual, std, count, constant = moments(values, begin, end, ddof.to(REAL), REAL, BLOCK)
    shift = residual * 0
    if BASELINE == "length_weighted":
        shift = length_shift(values, lengths, begin, end, mean, residual, REAL, BLOCK)
    disagrees = tl.zeros([BLOCK], tl.int32)
    if critics is not None:
        for start in range(begin, end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            r, critic = tl.load(values + i, i < end, float("nan")), tl.load(critics + i, i < end, float("nan"))
            disagrees += ((r == r) & (critic == critic) & (r != critic)).to(tl.int32)
    informs = ((count >= 2) & ~constant) | (tl.sum(disagrees, 0) > 0)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r = tl.load(values + i, i < end, float("nan"))
        at, critic = origin + tl.load(order + i, i < end, 0), r
        if critics is not None:
            critic = tl.load(critics + i, i < end, float("nan"))
        deviation = std + r * 0
        if SCALE == "batch":
            deviation = tl.load(batch_std) + r * 0
        elif SCALE == "leave_one_out":
            deviation = deviation_of_others(values, i, begin, end, mean, count, ddof.to(REAL), REAL)
        deviation = tl.where(r == r, deviation, tl.load(batch_std) if SCALE == "batch" else std)
        d = centred(r, mean, residual, shift, count, constant, single_raw != 0, BASELINE)
        a = advantage(
            r, d, critic, mean + residual, deviation, count, number(critic_weight, REAL), number(eps, REAL), SCALE,
            critics is not None,
        )  # fmt: skip
        a = tl.where(r == r, clamp_(a, number(clip_low, REAL), number(clip_high, REAL)), 0.0)
        tl.store(advantages + at, a, i < end)
        tl.store(means + at, mean + residual + a * 0, i < end)
        tl.store(stds + at, deviation, i < end)
        tl.store(informative + at, informs, i < end)


def group_advantages(samples: Samples, form: AdvantageForm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = real_dtype(samples.rewards.dtype)
    rewards = combined_rewards(samples, real)
    advantages, means, stds = (torch.empty_like(rewards) for _ in range(3))
    informative, count = torch.empty_like(rewards, dtype=torch.bool), rewards.numel()
    if not count:
        return advantages, means, stds, informative
    order, ends = order_of(rewards, samples, form)
    flat = order if ends is not None else order + _first_of_groups(count, form.group_size, order.device)

    def sorted_(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(real)[flat.view(-1)]

    values = sorted_(rewards)
    constants: dict[str, Any] = {"REAL": REALS[real], "enable_fp_fusion": False}
    numbers = (form.eps, form.critic_weight, form.clip_low, form.clip_high)
    with on_device_of(rewards):
        batch_std = None
        if form.scale == "batch":
            batch_std = rewards.new_empty(1)
            batch_kernel[(1,)](
                rewards.sort().values, batch_std, count, form.ddof, BLOCK=BATCH_BLOCK, num_warps=BATCH_WARPS,
                **constants,
            )  # fmt: skip
        group_kernel[(count if ends is not None else count // form.group_size,)](
            values, order, ends, sorted_(samples.lengths), sorted_(samples.critic_values), batch_std, advantages, means,
            stds, informative, form.group_size, form.ddof, *(bits(x, real) for x in numbers), int(form.single_raw),
            BASELINE=form.baseline, SCALE=form.scale, BLOCK=GROUP_BLOCK, num_warps=WARPS, **constants,
        )  # fmt: skip
    return advantages, means, stds, informative


def order_of(rewards: Tensor, samples: Samples, form: AdvantageForm) -> tuple[Tensor, Tensor | None]:
    """Where each sorted reward came from, and where its group ends: within consecutive groups, [groups, size], None;
    or over all samples. Equal rewards are ordered by length, as these are summed too."""
    if samples.group_ids is None:
        grid = rewards.view(-1, form.group_size)
        if samples.lengths is None:
            return grid.argsort(dim=-1, stable=True), None
        by_length = samples.lengths.view_as(grid).argsort(dim=-1, stable=True)
        return by_length.gather(-1, grid.gather(-1, by_length).argsort(dim=-1, stable=True)), None
    order = torch.arange(rewards.numel(), device=rewards.device)
    for key in (samples.lengths, rewards, samples.group_ids):
        if key is not None:
            order = order[key[order].argsort(stable=True)]
    ids = samples.group_ids[order]
    return order, torch.searchsorted(ids, ids, right=True)


def _first_of_groups(samples: int, group_size: int, device: torch.device) -> Tensor:
    return torch.arange(0, samples, group_size, device=device)[:, None]
