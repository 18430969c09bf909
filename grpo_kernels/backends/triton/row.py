"""The row kernels: sweep a row for its softmax statistics, ask the epilogue for d loss / d logp and d loss / d entropy,
sweep it again to write the gradient.

Program axis 0 is the row. Many rows: a program each (PHASE "row"). Few: a program for each segment of a row
("segments"), and what they leave behind is merged in the order of the segments ("merge"). The sums are the same either
way: a row's result does not depend on the other rows or on their number. It does on the alignment of the logits in its
last bits: lanes that come by 16 bytes lie differently in the threads than those that come one by one.
"""

import triton
import triton.language as tl

from .group import sample_advantage
from .launch import bits_to_float, kernel
from .math import Pooled, clamp_passes_grad, token_term
from .numeric import clamp_, quotient, weighted
from .policy_inputs import Views, load_token, scalars_of
from .softmax import row_gradient, target_gradient
from .sweep import Transform, finished, merged_segments, row_stats, segment_stats, write_gradient, z_of


@triton.jit
def row_at(data, stride_b, stride_t, b, t, ALIGNED: tl.constexpr):
    row = data + (b * stride_b + t * stride_t)
    if ALIGNED:
        row = tl.multiple_of(row, 16)  # of a pointer: bytes
    return row


@triton.jit
def transform_of(scalar_bits, temperature, b, t, SWEEP: tl.constexpr):
    """`scalar_bits`: of 1 / temperature, logit_scale and softcap."""
    ACC: tl.constexpr = SWEEP.ACC
    inv_temperature, logit_scale, softcap = scalar_bits
    inv_t, scale = bits_to_float(inv_temperature, ACC), bits_to_float(logit_scale, ACC)
    cap = bits_to_float(softcap, ACC)
    address, stride_b, stride_t = temperature
    if address is not None:
        given = tl.load(address + b * stride_b + t * stride_t).to(ACC)
        inv_t = quotient(tl.full([], 1, ACC), given)  # to the bit what the host makes of the same number
    if SWEEP.SOFTCAP:
        return Transform(inv_t, scale * inv_t, quotient(scale, cap), cap)
    else:
        return Transform(scale * inv_t, scale * inv_t, scale, cap)


@triton.jit
def open_row(logits, targets, active, temperature, tokens, vocab, scalar_bits, SWEEP: tl.constexpr):
    """(row, b, t, data, is_active, target, vocab, transform) of this program; views are (address, stride over b, over
    t)."""
    data, data_b, data_t = logits
    at_target, target_b, target_t = targets
    at_active, active_b, active_t = active
    row = tl.program_id(0).to(tl.int64)  # rows * vocab passes 2^31 at 14k tokens of a 152k vocabulary
    b, t = row // tokens, row % tokens
    vocab = vocab.to(tl.int32)
    if SWEEP.ALIGNED:  # a mask that may end anywhere would split every access
        COLUMNS: tl.constexpr = 128 // data.dtype.element_ty.primitive_bitwidth
        vocab = tl.multiple_of(vocab, COLUMNS)  # whole accesses: `aligned` knows no more
    target = tl.load(at_target + b * target_b + t * target_t)
    target = tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)
    is_active = tl.load(at_active + b * active_b + t * active_t) != 0
    transform = transform_of(scalar_bits, temperature, b, t, SWEEP)
    ALIGNED: tl.constexpr = SWEEP.ALIGNED
    return row, b, t, row_at(data, data_b, data_t, b, t, ALIGNED), is_active, target, vocab, transform


@triton.jit
def target_z(data, target, is_active, transform, SWEEP: tl.constexpr):
    """NaN without a target: so is then the log-prob."""
    logit = tl.load(data + target, mask=is_active & (target >= 0), other=float("nan")).to(SWEEP.ACC)
    z, _ = z_of(logit, transform, SWEEP)
    return z


@triton.jit
def store_stats(row, stats, logps, entropies, maxima, log_sums):
    tl.store(logps + row, stats.logp)
    tl.store(entropies + row, stats.entropy)
    tl.store(maxima + row, stats.max)
    tl.store(log_sums + row, stats.log_sum)


@triton.jit
def write_row_gradient(
    data, out, begin, tiles, vocab, is_active, target, logp, entropy, max, log_sum, g_logp, g_entropy, transform,
    SWEEP: tl.constexpr,
):  # fmt: skip
    """Writes `tiles` of the gradient from column `begin`, given the derivatives in the log-prob and the entropy."""
    is_active = is_active & ((g_logp != 0) | (g_entropy != 0))  # a NaN is something
    a, b = row_gradient(g_logp, g_entropy, log_sum, entropy)
    at_target = target_gradient(g_logp, g_entropy, logp, entropy)
    write_gradient(data, out, begin, tiles, vocab, is_active, target, max, a, b, at_target, transform, SWEEP)


@kernel
def stats_kernel(
    logits, logits_b: tl.int64, logits_t: tl.int64, targets, targets_b: tl.int64, targets_t: tl.int64,
    active, active_b: tl.int64, active_t: tl.int64, temperature, temperature_b: tl.int64, temperature_t: tl.int64,
    tokens: tl.int64, vocab: tl.int64, inv_temperature: tl.int64, logit_scale: tl.int64, softcap: tl.int64,
    logps, entropy, max, log_sum, sum_p2, partials, saved_z, segments: tl.int64,
    SWEEP: tl.constexpr, PHASE: tl.constexpr, SUM_P2: tl.constexpr,
):  # fmt: skip
    """`partials` [rows, segments, 4] and `saved_z` [rows]: what the phase "segments" stores."""
    row, _, _, data, is_active, target, vocab, transform = open_row(
        (logits, logits_b, logits_t), (targets, targets_b, targets_t), (active, active_b, active_t),
        (temperature, temperature_b, temperature_t),
        tokens, vocab, (inv_temperature, logit_scale, softcap), SWEEP,
    )  # fmt: skip
    end = tl.where(is_active, vocab, 0)
    if PHASE == "segments":
        part = tl.program_id(1)
        s = segment_stats(data, part * SWEEP.SEGMENT, end, transform, SWEEP, SUM_P2)
        at = partials + 4 * (row * segments + part)
        for i in tl.static_range(4):
            tl.store(at + i, s[i])
        if part == 0:
            tl.store(saved_z + row, target_z(data, target, is_active, transform, SWEEP))
    else:
        if PHASE == "merge":
            z = tl.load(saved_z + row)
            s = merged_segments(partials + 4 * row * segments, segments, transform, SWEEP)
        else:
            z = target_z(data, target, is_active, transform, SWEEP)
            s = row_stats(data, end, transform, SWEEP, SUM_P2)
        stats = finished(s, z, transform, is_active)
        store_stats(row, stats, logps, entropy, max, log_sum)
        if SUM_P2:
            tl.store(sum_p2 + row, stats.sum_p2)


@kernel
def gradient_kernel(
    logits, logits_b: tl.int64, logits_t: tl.int64, targets, targets_b: tl.int64, targets_t: tl.int64,
    active, active_b: tl.int64, active_t: tl.int64, temperature, temperature_b: tl.int64, temperature_t: tl.int64,
    tokens: tl.int64, vocab: tl.int64, inv_temperature: tl.int64, logit_scale: tl.int64, softcap: tl.int64,
    logps, entropy, max, log_sum, g_logps, g_entropy, gradient, gradient_b: tl.int64, gradient_t: tl.int64,
    SWEEP: tl.constexpr,
):  # fmt: skip
    """The backward: one tile a program, along axis 1. `gradient` may be the logits."""
    row, b, t, data, is_active, target, vocab, transform = open_row(
        (logits, logits_b, logits_t), (targets, targets_b, targets_t), (active, active_b, active_t),
        (temperature, temperature_b, temperature_t),
        tokens, vocab, (inv_temperature, logit_scale, softcap), SWEEP,
    )  # fmt: skip
    on_entropy = tl.zeros([], SWEEP.ACC)
    if g_entropy is not None:
        on_entropy = tl.load(g_entropy + row)
    begin = tl.program_id(1) * (SWEEP.STEPS * SWEEP.LANES)
    ALIGNED: tl.constexpr = SWEEP.ALIGNED
    out = row_at(gradient, gradient_b, gradient_t, b, t, ALIGNED)
    write_row_gradient(
        data, out, begin, 1, vocab, is_active, target,
        tl.load(logps + row), tl.load(entropy + row), tl.load(max + row), tl.load(log_sum + row),
        tl.load(g_logps + row), on_entropy, transform, SWEEP,
    )  # fmt: skip


@triton.jit
def policy_gradient(logp, token, s, FORM: tl.constexpr):
    """(d loss / d logp, d loss / d entropy): the loss of a token that asks no other."""
    raw, zero = logp - token.old, tl.zeros_like(logp)
    log_ratio = clamp_(raw, -s.log_ratio_clamp, s.log_ratio_clamp)
    term = token_term(logp, log_ratio, token, Pooled(zero, zero, zero, zero, zero), s, FORM)
    d_log_ratio = tl.where(clamp_passes_grad(raw, log_ratio), term.d_log_ratio, 0.0)
    g_logp = weighted(token.weight, term.d_logp + d_log_ratio)
    return g_logp, -s.entropy_coef * token.entropy_mask * token.entropy_weight


@kernel
def policy_kernel(
    logits, logits_b: tl.int64, logits_t: tl.int64, targets, targets_b: tl.int64, targets_t: tl.int64,
    active, active_b: tl.int64, active_t: tl.int64, temperature, temperature_b: tl.int64, temperature_t: tl.int64,
    tokens: tl.int64, vocab: tl.int64, inv_temperature: tl.int64, logit_scale: tl.int64, softcap: tl.int64,
    logps, entropy, max, log_sum, partials, saved_z, segments: tl.int64,
    gradient, gradient_b: tl.int64, gradient_t: tl.int64,
    scalars, kl_coef, entropy_coef, group_size: tl.int64, advantage_eps: tl.int64,
    adv, adv_b: tl.int64, adv_t: tl.int64, weight, weight_b: tl.int64, weight_t: tl.int64,
    old, old_b: tl.int64, old_t: tl.int64, ref, ref_b: tl.int64, ref_t: tl.int64,
    rollout, rollout_b: tl.int64, rollout_t: tl.int64,
    token_weight, token_weight_b: tl.int64, token_weight_t: tl.int64,
    entropy_weight, entropy_weight_b: tl.int64, entropy_weight_t: tl.int64,
    entropy_mask, entropy_mask_b: tl.int64, entropy_mask_t: tl.int64,
    selected, selected_b: tl.int64, selected_t: tl.int64,
    pooled_weight, pooled_weight_b: tl.int64, pooled_weight_t: tl.int64,
    SWEEP: tl.constexpr, FORM: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Statistics, the loss of the row's token and the gradient: in one launch ("row"), or after `stats_kernel` stored
    its segments, one tile per program along axis 1 ("merge"). `gradient` may be the logits."""
    row, b, t, data, is_active, target, vocab, transform = open_row(
        (logits, logits_b, logits_t), (targets, targets_b, targets_t), (active, active_b, active_t),
        (temperature, temperature_b, temperature_t),
        tokens, vocab, (inv_temperature, logit_scale, softcap), SWEEP,
    )  # fmt: skip
    if PHASE == "merge":
        begin, tiles = tl.program_id(1) * (SWEEP.STEPS * SWEEP.LANES), 1
        z = tl.load(saved_z + row)  # the logit may be overwritten by now
        s = merged_segments(partials + 4 * row * segments, segments, transform, SWEEP)
    else:
        begin, tiles = 0, tl.cdiv(vocab, SWEEP.STEPS * SWEEP.LANES)
        z = target_z(data, target, is_active, transform, SWEEP)
        s = row_stats(data, tl.where(is_active, vocab, 0), transform, SWEEP, False)
        tl.debug_barrier()  # no thread may overwrite what another has yet to read
    stats = finished(s, z, transform, is_active)
    if tl.program_id(1) == 0:
        store_stats(row, stats, logps, entropy, max, log_sum)
    ACC: tl.constexpr = SWEEP.ACC
    ALIGNED: tl.constexpr = SWEEP.ALIGNED
    eps = bits_to_float(advantage_eps, ACC)
    own_adv = sample_advantage(adv, adv_b, b, is_active, group_size, eps, FORM, ACC)
    views = Views(
        (adv, adv_b, adv_t), (weight, weight_b, weight_t), (old, old_b, old_t), (ref, ref_b, ref_t),
        (rollout, rollout_b, rollout_t), (token_weight, token_weight_b, token_weight_t),
        (entropy_weight, entropy_weight_b, entropy_weight_t), (entropy_mask, entropy_mask_b, entropy_mask_t),
        (selected, selected_b, selected_t), (pooled_weight, pooled_weight_b, pooled_weight_t),
        own_adv,
    )  # fmt: skip
    token = load_token(b, t, is_active, stats.logp, views, FORM, ACC)
    scalar_values = scalars_of(scalars, kl_coef, entropy_coef, ACC)
    g_logp, g_entropy = policy_gradient(stats.logp, token, scalar_values, FORM)
    out = row_at(gradient, gradient_b, gradient_t, b, t, ALIGNED)
    write_row_gradient(
        data, out, begin, tiles, vocab, is_active, target, stats.logp, stats.entropy, stats.max, stats.log_sum, g_logp,
        g_entropy, transform, SWEEP,
    )  # fmt: skip
