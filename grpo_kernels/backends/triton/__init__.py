"""The Triton kernels: tensors become arguments here, and a launch is chosen; nothing is computed.

Whitening is plain torch, whose own reductions are a sweep each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...config import Form
from ...inputs.layout import PolicyInputs, Rows, RowStats, acc_dtype
from ...reference.advantages import masked_moments, whiten
from .. import Backend
from ..gpu import index_of, refused_by_all, too_old
from . import tuning
from .advantages import group_advantages
from .diversity import group_diversity
from .launch import ACC_TYPES, INTERPRETED, aligned, on_device_of, scalar_bits
from .policy_inputs import policy_args, view_args
from .returns import gae, value_loss
from .row import gradient_kernel, policy_kernel, stats_kernel
from .scale import scale
from .sweep import Sweep
from .token import token_policy


def row_forward(rows: Rows, sum_p2: bool) -> tuple[RowStats, Tensor]:
    stats = _new_stats(rows)
    squares = _new_acc(rows, rows.targets.shape if sum_p2 else (0,))
    tuning.tune("row_forward", rows.logits, lambda config: _forward(rows, stats, squares if sum_p2 else None, config))
    _forward(rows, stats, squares if sum_p2 else None)
    return stats, squares


def row_backward(rows: Rows, saved: RowStats, g_logps: Tensor, g_entropy: Tensor | None, gradient: Tensor) -> None:
    g_logps = g_logps.contiguous()
    g_entropy = None if g_entropy is None else g_entropy.contiguous()
    saved = RowStats(*(x.contiguous() for x in saved))
    if tuning.asked():
        copy = torch.empty_like(gradient)
        tuning.tune("row_backward", rows.logits, lambda c: _backward(rows, saved, g_logps, g_entropy, copy, c))
    _backward(rows, saved, g_logps, g_entropy, gradient)


def row_policy(rows: Rows, inputs: PolicyInputs, gradient: Tensor) -> RowStats:
    stats = _new_stats(rows)
    if tuning.asked():
        copy = torch.empty_like(gradient)
        tuning.tune("row_policy", rows.logits, lambda config: _policy(rows, inputs, stats, copy, config))
    _policy(rows, inputs, stats, gradient)
    return stats


def _new_acc(rows: Rows, shape: torch.Size | tuple[int, ...]) -> Tensor:
    return rows.logits.new_empty(shape, dtype=acc_dtype(rows.logits.dtype))


def _new_stats(rows: Rows) -> RowStats:
    return RowStats(*(_new_acc(rows, rows.targets.shape) for _ in RowStats._fields))


class _Launch:
    """What every launch on some rows has in common."""

    def __init__(self, rows: Rows, config: tuning.Config | None, gradient: Tensor | None = None):
        r, acc = rows, acc_dtype(rows.logits.dtype)
        self.rows, self.vocab = r.targets.numel(), r.logits.shape[-1]
        self.shape = tuning.shape_for(r.logits, config)
        self.split = self.shape.splits(self.rows, self.vocab)
        self.segments = -(-self.vocab // self.shape.SEGMENT)
        self.tiles = -(-self.vocab // self.shape.tile)
        self._device_of = r.logits
        views = (r.logits, r.targets, r.active, r.temperatures)
        numbers = (1 / r.temperature, r.logit_scale, r.softcap)
        self._args = [
            *(arg for view in views for arg in view_args(view)),
            r.targets.shape[1], self.vocab, *(scalar_bits(x, acc) for x in numbers),
        ]  # fmt: skip
        self._constants: dict[str, Any] = {
            "SWEEP": Sweep(
                ACC_TYPES[acc], r.softcap > 0, aligned(*(x for x in (r.logits, gradient) if x is not None)),
                self.shape.STEPS, self.shape.LANES, self.shape.SEGMENT,
            ),
            **self.shape.options,
            # A product and a sum fused in one kernel and not in another would make two results of one row.
            "enable_fp_fusion": False,
        }  # fmt: skip
        partials = (self.rows, self.segments, 4) if self.split else (0,)
        self.partials, self.saved_z = _new_acc(rows, partials), _new_acc(rows, partials[:1])

    def __call__(self, kernel: Any, parts: int, *args: Any, **constants: Any) -> None:
        if self.rows:
            with on_device_of(self._device_of):
                kernel[(self.rows, parts)](*self._args, *args, **self._constants, **constants)

    def store_segments(self, stats: RowStats, sum_p2: Tensor | None) -> None:
        self.stats(stats, sum_p2, "segments", self.segments)

    def stats(self, stats: RowStats, sum_p2: Tensor | None, phase: str, parts: int) -> None:
        squares = stats.logps if sum_p2 is None else sum_p2  # never written
        self(
            stats_kernel, parts, *stats, squares, self.partials, self.saved_z, self.segments,
            PHASE=phase, SUM_P2=sum_p2 is not None,
        )  # fmt: skip


def _forward(rows: Rows, stats: RowStats, sum_p2: Tensor | None, config: tuning.Config | None = None) -> None:
    launch = _Launch(rows, config)
    if launch.split:
        launch.store_segments(stats, sum_p2)
    launch.stats(stats, sum_p2, "merge" if launch.split else "row", 1)


def _backward(
    rows: Rows, saved: RowStats, g_logps: Tensor, g_entropy: Tensor | None, gradient: Tensor,
    config: tuning.Config | None = None,
) -> None:  # fmt: skip
    launch = _Launch(rows, config, gradient)
    launch(gradient_kernel, launch.tiles, *saved, g_logps, g_entropy, *view_args(gradient))


def _policy(
    rows: Rows, inputs: PolicyInputs, stats: RowStats, gradient: Tensor, config: tuning.Config | None = None
) -> None:
    launch = _Launch(rows, config, gradient)
    if launch.split:
        launch.store_segments(stats, None)
    launch(
        policy_kernel, launch.tiles if launch.split else 1, *stats, launch.partials, launch.saved_z, launch.segments,
        *view_args(gradient), *policy_args(inputs), FORM=Form(*inputs.form), PHASE="merge" if launch.split else "row",
    )  # fmt: skip


class TritonBackend:
    name = "triton"
    fuses_group_advantages = True
    differentiable = False
    row_forward = staticmethod(row_forward)
    row_backward = staticmethod(row_backward)
    row_policy = staticmethod(row_policy)
    scale = staticmethod(scale)
    token_policy = staticmethod(token_policy)
    group_advantages = staticmethod(group_advantages)
    gae = staticmethod(gae)
    value_loss = staticmethod(value_loss)
    masked_moments = staticmethod(masked_moments)
    whiten = staticmethod(whiten)
    group_diversity = staticmethod(group_diversity)

    def unavailable(self) -> str | None:
        if INTERPRETED:
            return None
        if torch.cuda.is_available():
            return refused_by_all(too_old)
        return (
            "Triton is installed but torch finds no CUDA or ROCm device; use 'cpu' or 'reference', "
            "or its interpreter (TRITON_INTERPRET=1, set before Triton is imported) to try the kernels on CPU tensors"
        )

    def rejects(self, device: torch.device, dtype: torch.dtype | None) -> str | None:
        if INTERPRETED:
            return None
        if device.type != "cuda":
            return (
                f"backend 'triton' needs tensors on a GPU, or Triton's interpreter (TRITON_INTERPRET=1, set before "
                f"Triton is imported); got {device}"
            )
        reason = too_old(index_of(device))
        return reason and f"backend 'triton' does not run on {device}: {reason}"

    def new_matrix(self, like: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return like.new_empty(shape, dtype=dtype or like.dtype)


BACKEND: Backend = TritonBackend()
