"""The token kernel: ratio, objective, KL, weights, reduction and every metric, with the derivative, from log-probs.

One launch. A program takes a sequence, or part of one where no token needs its sequence, and leaves its sums
behind; the program that arrives last adds them up, in the order of the programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from ...config import METRICS, Form
from ...inputs.layout import PolicyInputs
from .group import sample_advantage
from .launch import ACC_TYPES, INTERPRETED, bits_to_float, kernel, on_device_of
from .math import GMPO_WEIGHT_FLOOR, Pooled, clamp_passes_grad, pooled_count, pooled_limit, pooled_term, token_term
from .numeric import clamp_, max_, quotient, weighted
from .packed import first_of_tail, sequence_bounds
from .policy_inputs import Views, load_token, policy_args, read, scalars_of, view_args
from .token_sums import SUMS, empty_sums, merge, reduce_programs, store_partials, token_sums

# One token per thread: two dozen sums stay in registers from the first block to the last, without spills.
BLOCK = 512
PROGRAMS = 512  # that long sequences are cut for; a constant, so that the sums are the same on every device


@triton.jit
def load_tokens(b, t, end, logps, active, views, FORM: tl.constexpr, ACC: tl.constexpr):
    """Which of the tokens (b, t) count, their log-probs and their inputs. Of the others nothing is read."""
    at, stride_b, stride_t = active
    is_active = tl.load(at + b * stride_b + t * stride_t, mask=t < end, other=0) != 0
    logp = read(logps, b, t, is_active, 0.0, ACC)
    return is_active, logp, load_token(b, t, is_active, logp, views, FORM, ACC)


@triton.jit
def pool(
    b, begin, end, logps, active, views, s,
    FORM: tl.constexpr, POOLING: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    zeros = tl.zeros([BLOCK], ACC)
    total, counted, tokens, advs, log_weights = zeros, zeros, zeros, zeros, zeros
    for start in range(begin, end, BLOCK):
        is_active, logp, token = load_tokens(b, start + tl.arange(0, BLOCK), end, logps, active, views, FORM, ACC)
        count = pooled_count(token.token_weight, FORM)
        value, _ = pooled_term(logp - token.old, token.adv, token.pooled_weight, s, FORM)
        total += tl.where(is_active, weighted(count, value), 0.0)
        counted += tl.where(is_active, count, 0.0)
        tokens += tl.where(is_active, 1.0, 0.0)
        advs += tl.where(is_active, token.adv, 0.0)
        log_weights += tl.where(is_active, tl.log(token.pooled_weight + GMPO_WEIGHT_FLOOR), 0.0)
    n, one = max_(tl.sum(tokens, 0), 1.0), tl.sum(zeros, 0) + 1
    share = one if POOLING == "sum" else quotient(one, max_(tl.sum(counted, 0), 1.0))
    raw = tl.sum(total, 0) * share
    log_ratio = pooled_limit(raw, s, FORM)
    weight = one if views.pooled_weight[0] is None else tl.exp(quotient(tl.sum(log_weights, 0), n))
    passes_grad = tl.where(clamp_passes_grad(raw, log_ratio), one, 0.0)
    return Pooled(log_ratio, quotient(tl.sum(advs, 0), n), weight, share, passes_grad)


@triton.jit
def scatter_pooled_grad(
    b, begin, end, logps, active, views, s, g_logps, tokens, d_pooled,
    FORM: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The derivative in the pooled log-ratio, back to each token that passes it."""
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        is_active, logp, token = load_tokens(b, t, end, logps, active, views, FORM, ACC)
        _, passes_grad = pooled_term(logp - token.old, token.adv, token.pooled_weight, s, FORM)
        at = g_logps + b * tokens + t
        tl.store(
            at,
            tl.load(at, is_active, 0.0) + weighted(pooled_count(token.token_weight, FORM), d_pooled),
            is_active & passes_grad,
        )


@triton.jit
def segment(program, pieces, cu_seqlens, tokens, sequences, BLOCK: tl.constexpr):
    """The batch row and the tokens [begin, end) of it that a program takes, a multiple of blocks; none past the
    last."""
    sequence, piece = program // pieces, program % pieces
    here = sequence < sequences
    if cu_seqlens is None:
        b, begin, end = sequence, tokens * 0, tl.where(here, tokens, 0)
    else:
        b = sequence * 0
        begin, end = sequence_bounds(cu_seqlens, sequence, here, tokens)
    part = tl.cdiv(tl.cdiv(end - begin, pieces), BLOCK) * BLOCK
    begin += piece * part
    return b, begin, tl.minimum(begin + part, end)


@triton.jit
def store_block(per_token, g_logps, g_entropy, at, mask, value, g_logp, g_bonus):
    tl.store(per_token + at, value, mask)
    tl.store(g_logps + at, g_logp, mask)
    if g_entropy is not None:
        tl.store(g_entropy + at, g_bonus, mask)


@triton.jit
def token_block(
    b, begin_t, end, tokens, logps, active, entropies, views, shared, s, per_token, g_logps, g_entropy,
    FORM: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores a block of tokens' results; returns what they add to the sums and to the derivative in the sequence's
    pooled log-ratio."""
    t = begin_t + tl.arange(0, BLOCK)
    is_active, logp, token = load_tokens(b, t, end, logps, active, views, FORM, ACC)
    zero = tl.zeros_like(logp)
    entropy = read(entropies, b, t, is_active, zero, ACC)
    raw = logp - token.old
    pooled = Pooled(zero + shared.log_ratio, zero + shared.adv, zero + shared.weight, shared.share, shared.passes_grad)
    moved = clamp_(raw, -s.log_ratio_clamp, s.log_ratio_clamp)
    log_ratio, own = moved, clamp_passes_grad(raw, moved)
    if FORM.ratio_level != "token":
        log_ratio, own = pooled.log_ratio, zero + shared.passes_grad != 0
    term = token_term(logp, log_ratio, token, pooled, s, FORM)
    d_own, d_pooled = tl.where(own, term.d_log_ratio, 0.0), term.d_pooled
    if FORM.ratio_level == "sequence" or FORM.ratio_level == "sequence_product":
        d_own, d_pooled = zero, d_pooled + term.d_log_ratio
    bonus = s.entropy_coef * token.entropy_mask
    value = term.policy + weighted(s.kl_coef, term.kl) - weighted(bonus, entropy)
    g_logp = weighted(token.weight, term.d_logp + d_own)
    store_block(
        per_token, g_logps, g_entropy, b * tokens + t, t < end, tl.where(is_active, value, 0.0),
        tl.where(is_active, g_logp, 0.0), tl.where(is_active, -bonus * token.entropy_weight, 0.0),
    )  # fmt: skip
    d_pooled = tl.where(is_active, weighted(token.weight, d_pooled), 0.0)
    return token_sums(is_active, logp, moved, entropy, log_ratio, token, term, s), d_pooled


@kernel
def token_kernel(
    logps, logps_b: tl.int64, logps_t: tl.int64, entropies, entropies_b: tl.int64, entropies_t: tl.int64,
    active, active_b: tl.int64, active_t: tl.int64, cu_seqlens,
    scalars, kl_coef, entropy_coef, group_size: tl.int64, advantage_eps: tl.int64,
    adv, adv_b: tl.int64, adv_t: tl.int64, weight, weight_b: tl.int64, weight_t: tl.int64,
    old, old_b: tl.int64, old_t: tl.int64, ref, ref_b: tl.int64, ref_t: tl.int64,
    rollout, rollout_b: tl.int64, rollout_t: tl.int64,
    token_weight, token_weight_b: tl.int64, token_weight_t: tl.int64,
    entropy_weight, entropy_weight_b: tl.int64, entropy_weight_t: tl.int64,
    entropy_mask, entropy_mask_b: tl.int64, entropy_mask_t: tl.int64,
    selected, selected_b: tl.int64, selected_t: tl.int64,
    pooled_weight, pooled_weight_b: tl.int64, pooled_weight_t: tl.int64,
    loss, per_token, g_logps, g_entropy, metrics, sums_ptr, counts_ptr,
    tokens: tl.int64, sequences: tl.int64, pieces: tl.int64,
    FORM: tl.constexpr, POOLING: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts: int32, zeros; how many programs are done, then each sequence's tokens, low and high clips."""
    logps, active = (logps, logps_b, logps_t), (active, active_b, active_t)
    entropies = (entropies, entropies_b, entropies_t)
    program, s = tl.program_id(0).to(tl.int64), scalars_of(scalars, kl_coef, entropy_coef, ACC)
    b, begin, end = segment(program, pieces, cu_seqlens, tokens, sequences, BLOCK)
    eps = bits_to_float(advantage_eps, ACC)
    own_adv = sample_advantage(adv, adv_b, b, begin < end, group_size, eps, FORM, ACC)
    views = Views(
        (adv, adv_b, adv_t), (weight, weight_b, weight_t), (old, old_b, old_t), (ref, ref_b, ref_t),
        (rollout, rollout_b, rollout_t), (token_weight, token_weight_b, token_weight_t),
        (entropy_weight, entropy_weight_b, entropy_weight_t), (entropy_mask, entropy_mask_b, entropy_mask_t),
        (selected, selected_b, selected_t), (pooled_weight, pooled_weight_b, pooled_weight_t),
        own_adv,
    )  # fmt: skip
    shared = Pooled(0.0, 0.0, 1.0, 1.0, 1.0)
    if POOLING != "none":
        shared = pool(b, begin, end, logps, active, views, s, FORM, POOLING, ACC, BLOCK)
    sums, d_pooled = empty_sums(BLOCK, ACC), tl.zeros([BLOCK], ACC)
    for start in range(begin, end, BLOCK):
        of_block, d_pooled_of_block = token_block(
            b, start, end, tokens, logps, active, entropies, views, shared, s, per_token, g_logps, g_entropy,
            FORM, ACC, BLOCK,
        )  # fmt: skip
        sums, d_pooled = merge(sums, of_block), d_pooled + d_pooled_of_block
    if POOLING != "none":
        d_pooled_sum = tl.where(shared.passes_grad != 0, tl.sum(d_pooled, 0), 0.0)
        if d_pooled_sum != 0:  # a NaN is something
            tl.debug_barrier()  # before this thread adds to what another has stored
            to_each = shared.share * d_pooled_sum
            scatter_pooled_grad(b, begin, end, logps, active, views, s, g_logps, tokens, to_each, FORM, ACC, BLOCK)
    last = store_partials(sums, sums_ptr, counts_ptr, program // pieces, sequences)
    if last:
        reduce_programs(sums_ptr, counts_ptr + 1, sequences, metrics, loss, ACC, BLOCK)
    if cu_seqlens is not None:
        zeros = tl.zeros([BLOCK], ACC)
        for start in range(
            first_of_tail(cu_seqlens, sequences, tokens, BLOCK), tokens, tl.num_programs(0).to(tl.int64) * BLOCK
        ):
            t = start + tl.arange(0, BLOCK)
            store_block(per_token, g_logps, g_entropy, t, t < tokens, zeros, zeros, zeros)


def warps(threads: int) -> int:
    return 1 if INTERPRETED else threads // driver.active.get_current_target().warp_size


def token_policy(
    logps: Tensor, entropy: Tensor | None, active: Tensor, cu_seqlens: Tensor | None, inputs: PolicyInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    form, tokens = Form(*inputs.form), logps.shape[1]
    sequences = logps.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    block = BLOCK if logps.dtype == torch.float32 else BLOCK // 2  # one token per thread: twice as wide, half as many
    pieces = 1
    if form.pooling == "none":
        pieces = max(1, min(triton.cdiv(PROGRAMS, max(sequences, 1)), triton.cdiv(tokens, block)))
    programs = max(sequences, 1) * pieces
    loss, metrics, sums = logps.new_empty(()), logps.new_empty(len(METRICS)), logps.new_empty(SUMS.value, programs)
    per_token, g_logps = (torch.empty_like(logps, memory_format=torch.contiguous_format) for _ in range(2))
    g_entropy = logps.new_empty(logps.shape if entropy is not None else (0,))
    counts = torch.zeros(1 + 3 * sequences, dtype=torch.int32, device=logps.device)
    with on_device_of(logps):
        token_kernel[(programs,)](
            *view_args(logps), *view_args(entropy), *view_args(active),
            None if cu_seqlens is None else cu_seqlens.contiguous(), *policy_args(inputs),
            loss, per_token, g_logps, None if entropy is None else g_entropy, metrics, sums, counts,
            tokens, sequences, pieces,
            FORM=form, POOLING=form.pooling, ACC=ACC_TYPES[logps.dtype], BLOCK=block, num_warps=warps(block),
            enable_fp_fusion=False,
        )  # fmt: skip
    return loss, per_token, g_logps, g_entropy, metrics
