"""The operators that torch.compile sees: schema, shapes (fakes) and the one line that calls a backend.

Autograd lives in autograd.Functions outside (loss/). What needs the data to be
checked, such as a target outside the vocabulary, is checked here, where a graph cannot see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import implementation
from ..config import METRICS
from ..inputs.layout import (
    Head,
    PolicyInputs,
    Rows,
    RowStats,
    acc_dtype,
    check_boundaries,
    check_rows_apart,
    note_overwritten,
)
from . import linear_chunks
from .library import define

_ROWS = (
    "Tensor{} logits, Tensor targets, Tensor active, float temperature, Tensor? temperatures, "
    "float logit_scale, float softcap"
)
_POLICY = (
    "Tensor advantages, Tensor weights, Tensor? old_logps, Tensor? ref_logps, Tensor? rollout_logps, "
    "Tensor? token_weights, Tensor? entropy_weights, Tensor? entropy_mask, "
    "Tensor? selected, Tensor? pooled_weights, SymInt group_size, float advantage_eps, "
    "Tensor? kl_coef, Tensor? entropy_coef, Tensor scalars, str[] form"
)
_STATS = "Tensor logps, Tensor entropy, Tensor max, Tensor log_sum"
_OF_HEAD = "Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float lora_scale"
_N_ROWS, _N_STATS, _N_POLICY = len(Rows._fields), len(RowStats._fields), len(PolicyInputs._fields)
_N_HEAD = len(Head._fields)


def _split(args: tuple) -> tuple[Rows, tuple]:
    return Rows(*args[:_N_ROWS]), args[_N_ROWS:]


def _split_linear(args: tuple) -> tuple[Rows, Head, tuple]:
    rows, rest = _split(args)
    return rows, Head(*rest[:_N_HEAD]), rest[_N_HEAD:]


def check_targets(targets: Tensor, active: Tensor, vocab: int, validate: bool) -> None:
    """On the CPU always; elsewhere on request, as reading the answer synchronises."""
    if not validate and targets.device.type != "cpu":
        return
    bad = active & ((targets < 0) | (targets >= vocab))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"target {int(targets[at])} at position {at} is outside the vocabulary of {vocab}; "
            "mask it, or give it ignore_index"
        )


def legal_targets(rows: Rows, vocab: int, validate: bool) -> Tensor:
    """The checked targets, for the reference: in a graph an operator checks them at each run."""
    if torch.compiler.is_compiling():
        return checked_targets(rows.targets, rows.active, vocab, validate)  # type: ignore[no-any-return]
    check_targets(rows.targets, rows.active, vocab, validate)
    return rows.targets


def _checked_targets(targets: Tensor, active: Tensor, vocab: int, validate: bool) -> Tensor:
    check_targets(targets, active, vocab, validate)
    return targets.clone()


def _new_gradient(args: tuple) -> Tensor:
    logits, backend = args[0], args[-1]
    return _in_phase(logits, implementation(backend).new_matrix)


def _in_phase(logits: Tensor, new: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """A tensor like the logits, by `new(like, shape)`: each row begins as far behind a boundary of 16 bytes as theirs.

    A kernel that reads a row in whole 16 bytes can then write its gradient so. Dense where the logits are; of a slice
    such as ``logits[:, :-1]`` with an odd vocabulary fewer than 16 bytes lie between two rows, or two sequences.
    """
    batch, tokens, vocab = logits.shape
    vector = 16 // logits.element_size()
    stride_t = vocab + (logits.stride(1) - vocab) % vector
    stride_b = tokens * stride_t + (logits.stride(0) - tokens * stride_t) % vector
    first = logits.storage_offset() % vector  # torch's memory begins on a boundary
    return new(logits, (first + batch * stride_b,)).as_strided(logits.shape, (stride_b, stride_t, 1), first)


def _clear_ignored(gradient: Tensor, rows: Rows) -> None:
    """The positions past the targets', which no kernel visits."""
    gradient[:, rows.targets.shape[1] :].zero_()


def _row_forward(*args: Any) -> tuple[Tensor, ...]:
    rows, (sum_p2, validate, backend) = _split(args)
    check_targets(rows.targets, rows.active, rows.logits.shape[-1], validate)
    stats, squares = implementation(backend).row_forward(rows, sum_p2)
    return (*stats, squares)


def _row_backward(*args: Any) -> Tensor:
    gradient = _new_gradient(args)
    _row_backward_into(gradient, args)
    return gradient


def _row_backward_(*args: Any) -> None:
    check_rows_apart(args[0])
    _row_backward_into(args[0], args)
    note_overwritten(args[0])


def _row_backward_into(gradient: Tensor, args: tuple) -> None:
    rows, rest = _split(args)
    saved, (g_logps, g_entropy, backend) = RowStats(*rest[:_N_STATS]), rest[_N_STATS:]
    implementation(backend).row_backward(rows, saved, g_logps, g_entropy, gradient)
    _clear_ignored(gradient, rows)


def _row_policy(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    gradient = _new_gradient(args)
    return (gradient, *_row_policy_into(gradient, args))


def _row_policy_(*args: Any) -> tuple[Tensor, Tensor]:
    check_rows_apart(args[0])
    outputs = _row_policy_into(args[0], args)
    note_overwritten(args[0])
    return outputs


def _row_policy_into(gradient: Tensor, args: tuple) -> tuple[Tensor, Tensor]:
    rows, rest = _split(args)
    inputs, (validate, backend) = PolicyInputs(*rest[:_N_POLICY]), rest[_N_POLICY:]
    check_targets(rows.targets, rows.active, rows.logits.shape[-1], validate)
    stats = implementation(backend).row_policy(rows, inputs, gradient)
    _clear_ignored(gradient, rows)
    return stats.logps, stats.entropy


def _token_policy(
    logps: Tensor, entropy: Tensor | None, active: Tensor, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    inputs, backend = PolicyInputs(*rest[:_N_POLICY]), rest[_N_POLICY]
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, logps.shape[1])
    return implementation(backend).token_policy(logps, entropy, active, cu_seqlens, inputs)


def _linear_forward(*args: Any) -> tuple[Tensor, ...]:
    rows, head, (chunk_rows, extras, validate, backend) = _split_linear(args)
    check_targets(rows.targets, rows.active, head.weight.shape[0], validate)
    stats, found = linear_chunks.forward(implementation(backend), rows, head, chunk_rows, extras)
    return (*stats, *found)


def _linear_backward(*args: Any) -> tuple[Tensor, ...]:
    rows, head, (chunk_rows, needs, *rest) = _split_linear(args)
    saved, (g_logps, g_entropy, backend) = RowStats(*rest[:_N_STATS]), rest[_N_STATS:]
    return linear_chunks.backward(implementation(backend), rows, head, chunk_rows, needs, saved, g_logps, g_entropy)


def _linear_policy(*args: Any) -> tuple[Tensor, ...]:
    rows, head, (chunk_rows, needs, *rest) = _split_linear(args)
    inputs, (validate, backend) = PolicyInputs(*rest[:_N_POLICY]), rest[_N_POLICY:]
    check_targets(rows.targets, rows.active, head.weight.shape[0], validate)
    return linear_chunks.policy(implementation(backend), rows, head, chunk_rows, needs, inputs)


# ---- shapes ----


def _acc(like: Tensor, shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=acc_dtype(like.dtype))


def _fake_stats(logits: Tensor, targets: Tensor, sum_p2: bool) -> tuple[Tensor, ...]:
    return (*(_acc(logits, targets.shape) for _ in range(_N_STATS)), _acc(logits, targets.shape if sum_p2 else (0,)))


def _fake_linear_stats(
    hidden: Tensor, targets: Tensor, sum_p2: bool, is_top1: bool, mean_logits: bool
) -> tuple[Tensor, ...]:
    top1 = targets.new_empty(targets.shape if is_top1 else (0,), dtype=torch.bool)
    return (*_fake_stats(hidden, targets, sum_p2), top1, _acc(hidden, targets.shape if mean_logits else (0,)))


def _fake_gradients(args: tuple) -> tuple[Tensor, ...]:
    hidden, (_, head, (_, needs, *_)) = args[0], _split_linear(args)
    parts = zip((hidden, *head.parameters), needs, strict=True)
    return tuple(head.weight.new_empty(0) if not need else like.new_empty(like.shape) for like, need in parts)


def _fake_token_policy(logps: Tensor, entropy: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    g_entropy = _acc(logps, (0,) if entropy is None else logps.shape)
    return (
        _acc(logps, ()),
        _acc(logps, logps.shape),
        _acc(logps, logps.shape),
        g_entropy,
        _acc(logps, (len(METRICS),)),
    )


_HEAD = _ROWS.format("")
_HEAD_INPLACE = _ROWS.format("(a!)")
_HIDDEN = _HEAD.replace("logits,", "hidden,", 1)

checked_targets = define(
    "checked_targets(Tensor targets, Tensor active, SymInt vocab, bool validate) -> Tensor",
    _checked_targets,
    lambda targets, *_: torch.empty_like(targets),
)
row_forward = define(
    f"row_forward({_HEAD}, bool sum_p2, bool validate, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _row_forward,
    lambda logits, targets, *rest: _fake_stats(logits, targets, rest[-3]),
)
row_backward = define(
    f"row_backward({_HEAD}, {_STATS}, Tensor g_logps, Tensor? g_entropy, str backend) -> Tensor",
    _row_backward,
    lambda logits, *_: _in_phase(logits, Tensor.new_empty),
)
row_backward_ = define(
    f"row_backward_({_HEAD_INPLACE}, {_STATS}, Tensor g_logps, Tensor? g_entropy, str backend) -> ()",
    _row_backward_,
    lambda *_: None,
)
row_policy = define(
    f"row_policy({_HEAD}, {_POLICY}, bool validate, str backend) -> (Tensor, Tensor, Tensor)",
    _row_policy,
    lambda logits, targets, *_: (
        _in_phase(logits, Tensor.new_empty),
        _acc(logits, targets.shape),
        _acc(logits, targets.shape),
    ),
)
row_policy_ = define(
    f"row_policy_({_HEAD_INPLACE}, {_POLICY}, bool validate, str backend) -> (Tensor, Tensor)",
    _row_policy_,
    lambda logits, targets, *_: (_acc(logits, targets.shape), _acc(logits, targets.shape)),
)
token_policy = define(
    f"token_policy(Tensor logps, Tensor? entropy, Tensor active, Tensor? cu_seqlens, {_POLICY}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _token_policy,
    _fake_token_policy,
)
linear_forward = define(
    f"linear_forward({_HIDDEN}, {_OF_HEAD}, int chunk_rows, bool[] extras, bool validate, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_forward,
    lambda hidden, targets, *rest: _fake_linear_stats(hidden, targets, *rest[-3]),
)
linear_backward = define(
    f"linear_backward({_HIDDEN}, {_OF_HEAD}, int chunk_rows, bool[] needs, {_STATS}, Tensor g_logps, "
    "Tensor? g_entropy, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_backward,
    lambda *args: _fake_gradients(args),
)
linear_policy = define(
    f"linear_policy({_HIDDEN}, {_OF_HEAD}, int chunk_rows, bool[] needs, {_POLICY}, bool validate, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_policy,
    lambda *args: (
        *_fake_gradients(args),
        _acc(args[0], args[1].shape),
        _acc(args[0], args[1].shape),
    ),
)
