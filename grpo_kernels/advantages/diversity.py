"""Near-duplicate completions inside a group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from ..inputs.check import check_tensor
from ..inputs.grouping import check_groups
from ..inputs.layout import layout_of
from ..ops import advantages as ops

LARGEST = 2**40  # tokens: 8 TiB of them, and as much again for their n-grams


class GroupDiversity(NamedTuple):
    """Per sample, [S]: whether it is kept, its highest similarity to an earlier kept sample of its group, and one over
    the size of its cluster."""

    keep: Tensor
    similarity: Tensor
    weights: Tensor


def group_diversity(
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    threshold: float = 0.9,
    ngram: int = 1,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> GroupDiversity:
    """Which completions of a group repeat an earlier one: ``J(A, B) = |A & B| / |A | B|`` of n-gram sets (Jaccard).

    In the order of position, a sample is dropped if its similarity to an earlier kept sample of its group reaches
    `threshold`, and joins the cluster of the most similar one (the first of equals). Every pair is compared exactly, on
    any number of threads; the CPU kernels tell n-grams of two or more tokens apart by 64-bit hashes, where a collision
    among 16 million has a chance of 1e-5. Time grows with S^2 in a group and memory as the token ids'. The backend
    "triton" synchronises with the GPU for the numbers of tokens and n-grams; "cuda" does not.

    A loss without the repetitions reads ``mask & keep[:, None]``, and ``group_advantages(valid=keep)`` leaves their
    rewards out. Or every cluster counts as one sample: pass ``sequence_weights=weights``, and ``weights.sum()``, the
    number of clusters, as the denominator of a mean over sequences.

    Args:
        token_ids: ``[S, T]`` integers, or flat ``[N]`` with cu_seqlens.
        mask: of the same shape and any dtype; a token whose mask is 0 is not read, and n-grams run on over it.
        group_size: consecutive samples form a group; must divide S. Or
        group_ids: ``[S]`` integers, any values in any order; groups may differ in size.
        threshold: from 0 to 1; at 1 only equal sets are dropped.
        ngram: tokens of an n-gram, at least 1. A shorter completion is one n-gram, itself; an empty one equals other
            empty ones (similarity 1) and shares nothing with the rest.
        cu_seqlens: ``[S + 1]``, the boundaries of flat samples; on a GPU not checked, see ``policy_loss``.

    Returns:
        GroupDiversity(keep, similarity, weights), each ``[S]``: bool; float32, 0 for the first of a group (the decision
        is made in float64); float32, one over the number of samples in the cluster.

    Raises:
        ValueError: unless exactly one of group_size and group_ids is given and fits; for shapes that do not agree, a
            threshold outside [0, 1], an ngram below 1 or more than 2^40 tokens.
        TypeError: if token_ids are not integers.
    """
    check_tensor("token_ids", token_ids, kind="integer")
    layout = layout_of(token_ids.shape, cu_seqlens, token_ids.device)
    if not layout.knows_sequences:
        raise ValueError(f"flat token_ids need cu_seqlens; got shape {tuple(token_ids.shape)} and none")
    if token_ids.numel() > LARGEST:  # an expanded tensor may claim any shape
        raise ValueError(f"token_ids must have at most {LARGEST} tokens; got shape {tuple(token_ids.shape)}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be from 0 to 1; got {threshold!r}")
    if not isinstance(ngram, int) or ngram < 1:
        raise ValueError(f"ngram must be an integer of at least 1; got {ngram!r}")
    check_groups(layout.sequences, group_size, group_ids, token_ids.device)
    mask = layout.tokens(mask, "mask", torch.bool)
    ids = None if group_ids is None else group_ids.to(torch.int64)
    if token_ids.dtype not in (torch.int32, torch.int64):
        token_ids = token_ids.to(torch.int64)
    outputs = ops.group_diversity(
        token_ids.reshape(layout.bt_shape), mask, layout.cu_seqlens, ids, group_size or 1, ngram, float(threshold),
        resolve(backend, token_ids.device),
    )  # fmt: skip
    return GroupDiversity(*outputs)
