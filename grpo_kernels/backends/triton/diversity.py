"""Near-duplicates: torch sorts the n-grams, matrix products count what two samples share, a kernel decides in order.

Tokens are counted first, so this synchronises. An n-gram of one sample alone gets no column, which
leaves the products a fraction of all n-grams. Similarities are compared as the bits of their float64: integers, in the
same order.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .launch import kernel, on_device_of, scalar_bits

COLUMNS = 2048  # of one product: that many ones still add up exactly in float16
ELEMENTS = 1 << 28  # of the matrices in use at a time
BLOCK, WARPS = 1024, 4
SEED = 0x3C6EF372FE94F82B  # any large number: `mixed` takes 0 to 0


class Members(NamedTuple):
    """Where each sample, [S], lies in its group."""

    group: Tensor
    place: Tensor
    order: Tensor  # the samples, group after group
    sizes: Tensor  # [groups], and where each begins in that order
    starts: Tensor


class Sets(NamedTuple):
    """[entries]: n-grams that two or more samples of a group have, group after group; the sizes of all sets, [S]."""

    sample: Tensor
    column: Tensor  # within the group
    sizes: Tensor


@kernel
def greedy_kernel(similar, sizes, keep, leader, best, width: tl.int64, threshold: tl.int64, BLOCK: tl.constexpr):
    """In order: kept, the kept sample before that is most similar, the first of equals, and how much, -1 without one.
    A program a group; `similar` [groups, width, width] and the threshold are the bits of float64."""
    group = tl.program_id(0).to(tl.int64)
    row, at = similar + group * width * width, group * width
    for i in range(tl.load(sizes + group)):
        most, first = at * 0 - 1, at * 0 + i
        for start in range(0, i, BLOCK):
            j = start + tl.arange(0, BLOCK)
            kept = tl.load(keep + at + j, j < i, 0) != 0
            s = tl.where(kept, tl.load(row + j, j < i, -1), -1)
            top = tl.max(s, 0)
            where = tl.min(tl.where(s == top, j, start + BLOCK), 0)
            first, most = tl.where(top > most, where, first), tl.maximum(most, top)
        kept = most < threshold
        tl.store(keep + at + i, kept)
        tl.store(leader + at + i, tl.where(kept, i, first))
        tl.store(best + at + i, most)
        tl.debug_barrier()  # before other threads read whether it is kept
        row += width


def group_diversity(
    token_ids: Tensor, active: Tensor | None, cu_seqlens: Tensor | None, group_ids: Tensor | None, group_size: int,
    ngram: int, threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    samples = token_ids.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    keep = token_ids.new_zeros(samples, dtype=torch.bool)
    similarity, weights = (token_ids.new_zeros(samples, dtype=torch.float32) for _ in range(2))
    if not samples:
        return keep, similarity, weights
    members = members_of(samples, group_ids, group_size, token_ids.device)
    sets = shared_ngrams(*active_tokens(token_ids, active, cu_seqlens), ngram, samples, members)
    for mine, slots, similar, sizes in similarities(sets, members):
        kept, leader, best = greedy(similar, sizes, threshold)
        one = torch.zeros_like(leader).index_put_(slots, leader.new_ones(()))  # and none where a group has ended
        clusters = torch.zeros_like(leader).scatter_add_(1, leader, one).gather(1, leader)
        keep[mine] = kept[slots]
        similarity[mine] = torch.where(best < 0, 0.0, best.view(torch.float64))[slots].float()
        weights[mine] = (1 / clusters[slots].double()).float()
    return keep, similarity, weights


def members_of(samples: int, group_ids: Tensor | None, group_size: int, device: torch.device) -> Members:
    order = torch.arange(samples, device=device)
    if group_ids is None:
        starts = order[::group_size]
        return Members(order // group_size, order % group_size, order, torch.full_like(starts, group_size), starts)
    ids, order = group_ids.sort(stable=True)
    _, rank, sizes = ids.unique_consecutive(return_inverse=True, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(samples, device=device) - starts[rank]
    group, places = (torch.empty_like(order).scatter(0, order, x) for x in (rank, place))
    return Members(group, places, order, sizes, starts)


def active_tokens(token_ids: Tensor, active: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens that count, [K] int64, and the sample of each, in order."""
    batch, tokens = token_ids.shape
    at = torch.arange(batch * tokens, device=token_ids.device)
    on = torch.ones_like(at, dtype=torch.bool) if active is None else active.reshape(-1)
    if cu_seqlens is None:
        owner = at // max(tokens, 1)
    else:
        owner, on = torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True), on & (at < cu_seqlens[-1])
    return token_ids.reshape(-1)[on].to(torch.int64), owner[on]


def mixed(h: Tensor) -> Tensor:
    """A bijection of 64 bits that leaves no pattern (the finaliser of MurmurHash3)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = (h ^ ((h >> 33) & 0x7FFFFFFF)) * (factor - (1 << 64))
    return h ^ ((h >> 33) & 0x7FFFFFFF)


def ngrams(tokens: Tensor, owner: Tensor, n: int, samples: int) -> tuple[Tensor, Tensor]:
    """Each n-gram's 64 bits, a token itself or a hash, and its sample; a sample shorter than n is one n-gram."""
    counts = owner.bincount(minlength=samples)
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    remaining = counts[owner] - place
    starts = (place == 0) | (remaining >= n)
    if n == 1 or not len(tokens):
        return tokens, owner
    h = mixed(counts.clamp(max=n)[owner] + SEED)
    for k in range(min(n, int(counts.max()))):
        h = torch.where(remaining > k, mixed(h + tokens.roll(-k)), h)
    return h[starts], owner[starts]


def changes(*keys: Tensor) -> Tensor:
    """Where a sorted run of equal keys begins."""
    new = torch.ones_like(keys[0], dtype=torch.bool)
    if len(new):
        new[1:] = torch.stack([key[1:] != key[:-1] for key in keys]).any(0)
    return new


def shared_ngrams(tokens: Tensor, owner: Tensor, n: int, samples: int, members: Members) -> Sets:
    grams, owner = ngrams(tokens, owner, n, samples)
    order = grams.argsort(stable=True)  # the samples of equal ones stay in order
    order = order[members.group[owner[order]].argsort(stable=True)]
    grams, owner = grams[order], owner[order]
    group = members.group[owner]
    first = changes(group, grams)
    new = first | changes(owner)
    owner, group, first = owner[new], group[new], first[new]
    run = first.cumsum(0) - 1
    shared = run.bincount()[run] > 1
    sample, group, column = owner[shared], group[shared], first[shared].cumsum(0) - 1
    if len(column):
        lowest = torch.searchsorted(group, torch.arange(len(members.sizes), device=group.device))
        column = column - column[lowest.clamp(max=len(column) - 1)][group]
    return Sets(sample, column, owner.bincount(minlength=samples))


def similarities(sets: Sets, members: Members) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]]:
    """Some groups at a time: their samples, [M], (group, place) of each among these groups, the similarities of all
    pairs [groups, width, width] as bits, and the sizes of the groups."""
    width, groups, count = int(members.sizes.max()), len(members.sizes), len(members.order)
    step = max(1, ELEMENTS // (width * max(width, COLUMNS)))
    for begin in range(0, groups, step):
        end = min(begin + step, groups)
        last = int(members.starts[end]) if end < groups else count
        mine = members.order[int(members.starts[begin]) : last]
        slots = members.group[mine] - begin, members.place[mine]
        both = pairs_in_common(sets, members, begin, end, width).double()
        size = torch.zeros(end - begin, width, dtype=torch.float64, device=both.device)
        size[slots] = sets.sizes[mine].double()
        either = size[:, :, None] + size[:, None] - both
        jaccard = torch.where(either > 0, both / either, 1.0)  # two empty sets are equal
        yield mine, slots, jaccard.view(torch.int64), members.sizes[begin:end].contiguous()


def pairs_in_common(sets: Sets, members: Members, begin: int, end: int, width: int) -> Tensor:
    """How many n-grams each two samples share: [groups, width, width] float32, by products of 0s and 1s."""
    device = sets.sample.device
    total = torch.zeros(end - begin, width, width, device=device)
    group = members.group[sets.sample]
    chosen = (group >= begin) & (group < end)
    column, order = sets.column[chosen].sort()
    group, place = (group[chosen] - begin)[order], members.place[sets.sample[chosen]][order]
    if not len(column):
        return total
    exact = torch.float32 if device.type == "cpu" else torch.float16
    edges = torch.arange(0, int(column[-1]) + 1 + COLUMNS, COLUMNS, device=device)
    bounds = torch.searchsorted(column, edges).tolist()
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        ones = torch.zeros(end - begin, width, COLUMNS, dtype=exact, device=device)
        ones[group[first:last], place[first:last], column[first:last] - i * COLUMNS] = 1
        total += ones @ ones.mT
    return total


def greedy(similar: Tensor, sizes: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `greedy_kernel` finds, [groups, width] each."""
    shape = similar.shape[:2]
    keep = torch.zeros(shape, dtype=torch.bool, device=similar.device)
    leader, best = (torch.zeros(shape, dtype=torch.int64, device=similar.device) for _ in range(2))
    with on_device_of(similar):
        greedy_kernel[(shape[0],)](
            similar, sizes, keep, leader, best, shape[1], scalar_bits(threshold, torch.float64), BLOCK=BLOCK,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return keep, leader, best
