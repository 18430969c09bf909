"""Where tokens and sequences lie: every public function brings its arguments to [B, T] here, without copying them.

Padded tensors are [B, T]; flat packed ones, [N], become one batch row [1, N] and find their sequences in `cu_seqlens`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .check import check_positive, check_tensor

OVERWRITTEN_ERROR = (
    "these logits hold their gradient, which a loss in place has written over them: so in a second loss of the same "
    "logits, or in torch.utils.checkpoint around a loss of logits from outside of it; pass inplace=False"
)
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype, in which everything per token is: float64 for float64 logits, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def filled(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor, made there: a copy from the host would be waited for. In a graph by a product, since that is what
    torch.compile can take another number for without compiling again."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


class Layout(NamedTuple):
    """The shape of the caller's per-token tensors, [B, T] or [N], and the sequence boundaries of the latter."""

    shape: torch.Size
    cu_seqlens: Tensor | None = None  # [R + 1]; tokens past the last boundary belong to no sequence
    device: torch.device | None = None  # None: any

    @property
    def padded(self) -> bool:
        return len(self.shape) == 2

    @property
    def bt_shape(self) -> tuple[int, int]:
        return (self.shape[0], self.shape[1]) if self.padded else (1, self.shape[0])

    @property
    def knows_sequences(self) -> bool:
        return self.padded or self.cu_seqlens is not None

    @property
    def sequences(self) -> int:
        return self.shape[0] if self.padded else self.cu_seqlens.numel() - 1  # type: ignore[union-attr]

    def sequence_index(self, device: torch.device) -> Tensor:
        """The sequence of each flat token, [N]; R for tokens past the last boundary."""
        positions = torch.arange(self.shape[0], device=device)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), positions, right=True)  # type: ignore[index]

    def of_sequences(self, values: Tensor) -> Tensor:
        """[R] values as a [B, T] view or gather, each token with its sequence's."""
        if self.padded:
            return values[:, None].expand(self.bt_shape)
        index = self.sequence_index(values.device).clamp(max=max(self.sequences - 1, 0))
        return values[index][None] if self.sequences else values.new_zeros(self.bt_shape)

    def sequence_sums(self, tokens: Tensor) -> Tensor:
        """int64 sums over each sequence, [R], of [B, T] integers or bools."""
        if self.padded:
            return tokens.sum(-1)
        bounds = self.cu_seqlens.clamp(0, tokens.shape[1])  # type: ignore[union-attr]  # a GPU's are not checked
        ends = torch.nn.functional.pad(tokens[0].cumsum(0), (1, 0))[bounds]
        return ends[1:] - ends[:-1]

    def first_tokens(self, active: Tensor) -> Tensor:
        """Whether a token is the first active one of its sequence, bool [B, T]."""
        count = active.cumsum(-1)
        if self.padded:
            return active & (count == 1)
        before = torch.nn.functional.pad(count[0], (1, 0))[self.cu_seqlens[:-1].clamp(0, active.shape[1])]  # type: ignore[index]
        return active & (count - self.of_sequences(before) == 1)

    def holds_tokens(self, values: Tensor) -> bool:
        """Whether it is one value per token, and not per sequence."""
        return values.shape == self.shape

    def check(self, values: Tensor, name: str, kind: str = "number", differentiable: bool = False) -> None:
        """Raises unless it is a per-token tensor of the caller's shape."""
        check_tensor(name, values, device=self.device, kind=kind, differentiable=differentiable)
        if values.shape != self.shape:
            raise ValueError(
                f"{name} must have the shape of the tokens, {tuple(self.shape)}; got {tuple(values.shape)}"
            )

    def tokens(self, values: Tensor | None, name: str, dtype: torch.dtype, kind: str = "number") -> Tensor | None:
        """A per-token tensor of the caller's shape, detached, as [B, T]."""
        if values is None:
            return None
        self.check(values, name, kind)
        return values.detach().to(dtype).reshape(self.bt_shape)

    def tokens_or_sequences(self, values: Tensor | None, name: str, dtype: torch.dtype) -> Tensor | None:
        """The same for a tensor that may also hold one value per sequence: [R], or [B, 1] when padded."""
        if values is None:
            return None
        check_tensor(name, values, device=self.device)
        values = values.detach().to(dtype)
        if self.holds_tokens(values):
            return values.reshape(self.bt_shape)
        if self.padded and values.shape == (self.shape[0], 1):
            return values.expand(self.bt_shape)
        if values.dim() == 1 and self.knows_sequences and values.numel() == self.sequences:
            return self.of_sequences(values)
        hint = "" if self.knows_sequences else "; flat tokens with one value per sequence need cu_seqlens"
        per_sequence = f" or ({self.sequences},)" if self.knows_sequences else ""
        raise ValueError(f"{name} must have shape {tuple(self.shape)}{per_sequence}; got {tuple(values.shape)}{hint}")


def layout_of(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device | None = None) -> Layout:
    """`device`: the tokens', where every other tensor must be too, or each call would copy it there and synchronise."""
    if len(shape) not in (1, 2):
        raise ValueError(f"per-token tensors must be [B, T] or flat [N]; got shape {tuple(shape)}")
    if cu_seqlens is None:
        return Layout(shape, None, device)
    if len(shape) == 2:
        raise ValueError(f"cu_seqlens goes with flat [N] tokens; got padded ones of shape {tuple(shape)}")
    check_tensor("cu_seqlens", cu_seqlens, device=device)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64; got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must be [R + 1]; got shape {tuple(cu_seqlens.shape)}")
    if not torch.compiler.is_compiling():
        check_boundaries(cu_seqlens, shape[0])
    return Layout(shape, cu_seqlens.to(torch.int64), device)


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """On the CPU; elsewhere reading the answer would synchronise."""
    if cu_seqlens.device.type != "cpu":
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to at most the {tokens} tokens; got {cu_seqlens.tolist()[:16]}")


def within_sequences(active: Tensor, layout: Layout) -> Tensor:
    """Tokens past the last boundary of cu_seqlens are masked."""
    if layout.cu_seqlens is None:
        return active
    return active & (torch.arange(active.shape[1], device=active.device) < layout.cu_seqlens[-1])


def active_tokens(mask: Tensor | None, layout: Layout, device: torch.device) -> Tensor:
    """bool [B, T]; tokens past the last boundary of cu_seqlens are masked."""
    active = layout.tokens(mask, "mask", torch.bool)
    if active is None:
        active = torch.ones(layout.bt_shape, dtype=torch.bool, device=device)
    return within_sequences(active, layout)


class Rows(NamedTuple):
    """What a row kernel reads, [B, T] throughout; `logits` may have positions past T, which are ignored."""

    logits: Tensor  # [B, T', V], T' >= T
    targets: Tensor  # int64
    active: Tensor  # bool
    temperature: float
    temperatures: Tensor | None  # acc dtype; replaces temperature
    logit_scale: float
    softcap: float  # 0: none


class Head(NamedTuple):
    """What makes logits of hidden states: their product with weight + lora_scale * lora_b @ lora_a, plus the bias."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    lora_a: Tensor | None = None  # [r, H]; both or neither
    lora_b: Tensor | None = None  # [V, r]
    lora_scale: float = 1.0

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """What may need a gradient."""
        return self[:4]


class RowStats(NamedTuple):
    """What is kept of each row, [B, T]: log p(target), entropy, the softmax's maximum and log-sum relative to it."""

    logps: Tensor
    entropy: Tensor
    max: Tensor
    log_sum: Tensor


def _owner(logits: Tensor) -> Tensor:
    """What the caller holds where the logits are a view of all of it."""
    base = logits._base
    return logits if base is None or base.numel() != logits.numel() else base


def note_overwritten(logits: Tensor) -> None:
    """Remembers that they now hold their gradient, until somebody writes to them."""
    if not logits.is_inference():
        torch.autograd.graph.increment_version(logits)
        _owner(logits)._gradient_since = logits._version  # type: ignore[attr-defined]


def check_not_overwritten(logits: Tensor) -> None:
    if torch.compiler.is_compiling() or logits.is_inference():
        return
    if getattr(_owner(logits), "_gradient_since", None) == logits._version:
        raise RuntimeError(OVERWRITTEN_ERROR)


def check_rows_apart(logits: Tensor) -> None:
    """Rows of [B, T', V] that share memory cannot be overwritten by their gradients. Exact."""
    (batch, tokens, vocab), (batch_stride, token_stride, _) = logits.shape, logits.stride()
    if not logits.numel():
        return
    dims = sorted((stride, size) for stride, size in ((batch_stride, batch), (token_stride, tokens)) if size > 1)
    extent = vocab  # of what the smaller strides reach
    for stride, size in dims:
        if stride < extent:
            break
        extent += stride * (size - 1)
    else:
        return
    if len(dims) == 2 and _interlaced(dims, vocab):
        return
    raise ValueError(
        f"in place, rows of logits must not share memory: strides {logits.stride()} of shape {tuple(logits.shape)} "
        "make them overlap (as after expand); pass inplace=False, or logits that are a copy of their own"
    )


def _interlaced(dims: list[tuple[int, int]], vocab: int) -> bool:
    """Whether rows of two dimensions, (stride, size) each, the smaller stride first, lie between each other and apart,
    as no view of torch's but as_strided has it: no other row begins within `vocab` of the first."""
    (small, many), (large, few) = dims
    if small < vocab:
        return False
    for i in range(1, few):
        below = i * large // small
        if any(j < many and abs(i * large - j * small) < vocab for j in (below, below + 1)):
            return False
    return True


class PolicyInputs(NamedTuple):
    """What the loss reads per token in addition to log-probs: [B, T] views in acc_dtype, None where absent."""

    advantages: Tensor  # the rewards, where form.advantages is not "given"
    weights: Tensor  # of the aggregation
    old_logps: Tensor | None
    ref_logps: Tensor | None
    rollout_logps: Tensor | None
    token_weights: Tensor | None  # multiplies the policy term only; gmpo's means are over it
    entropy_weights: Tensor | None  # None: weights
    entropy_mask: Tensor | None  # multiplies the entropy term; None: 1
    selected: Tensor | None  # not 0: picked for its covariance
    pooled_weights: Tensor | None  # importance weights that enter a sequence's own instead of multiplying a term
    group_size: int  # batch rows of a group, and what is added to its deviation; read with rewards only
    advantage_eps: float
    kl_coef: Tensor | None  # acc dtype, 0-d, read when the kernel runs; None: the number in scalars
    entropy_coef: Tensor | None
    scalars: Tensor  # float64 on the CPU
    form: list[str]


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Raises unless they are a dense tensor of a dtype that has kernels."""
    check_tensor(name, logits, differentiable=True)
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, LOGITS_DTYPES))}; got {logits.dtype}")


def _check_targets(logits: Tensor, targets: Tensor, name: str) -> None:
    lead, wanted = logits.shape[:-1], targets.shape
    one_more = len(wanted) >= 2 and lead == (*wanted[:-1], wanted[-1] + 1)
    if logits.dim() < 1 or (lead != wanted and not one_more):
        raise ValueError(
            f"{name} must be [..., V] over the shape of targets, {tuple(wanted)}, or with one position more; "
            f"got {tuple(logits.shape)}"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} has an empty last dimension: {tuple(logits.shape)}")


def rows_of(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    *,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    layout: Layout | None = None,
    name: str = "logits",
) -> Rows:
    """Checks what a row kernel needs and brings it to [B, T]. `logits` may be hidden states (the linear path); with a
    `layout`, tokens past its last boundary are masked."""
    _check_targets(logits, targets, name)
    check_not_overwritten(logits)
    if name == "logits" and logits.stride(-1) != 1 and logits.shape[-1] > 1 and logits.numel():
        raise ValueError(f"logits must be dense in the vocabulary; got strides {logits.stride()}")
    check_positive("logit_scale", logit_scale)
    if softcap is not None:
        check_positive("softcap", softcap)
    bt_shape = (1, targets.numel()) if targets.dim() < 2 else (math.prod(targets.shape[:-1]), targets.shape[-1])
    if targets.dim() < 2:
        logits = logits.reshape(1, *logits.shape) if targets.dim() == 1 else logits.reshape(1, 1, -1)
    elif targets.dim() > 2:
        logits = logits.flatten(0, -3)
    targets = targets.to(torch.int64)
    active = targets != ignore_index
    if mask is not None:
        check_tensor("mask", mask, device=targets.device, shape=targets.shape)
        active = torch.logical_and(active, mask)  # one operation for a mask of any dtype
    active = active.reshape(bt_shape)
    if layout is not None:
        active = within_sequences(active, layout)
    number, tensor = _temperature(temperature, targets, acc_dtype(logits.dtype), bt_shape)
    return Rows(logits, targets.reshape(bt_shape), active, number, tensor, float(logit_scale), float(softcap or 0))


def _temperature(
    temperature: float | Tensor, targets: Tensor, dtype: torch.dtype, bt_shape: tuple[int, int]
) -> tuple[float, Tensor | None]:
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        if not torch.compiler.is_compiling() or temperature == 1:
            return float(temperature), None
        # An operator's number would be a constant of the graph.
        return 1.0, filled(temperature, dtype, targets.device).expand(bt_shape)
    check_tensor("temperature", temperature)
    t = temperature.detach().to(targets.device, dtype)
    if t.dim() == 1 and targets.dim() >= 2 and t.shape[0] == targets.shape[0]:  # one per row
        t = t.reshape(-1, *[1] * (targets.dim() - 1))
    try:
        return 1.0, t.expand(targets.shape).reshape(bt_shape)
    except RuntimeError:
        raise ValueError(
            f"temperature must be a number or a tensor per row or per token of {tuple(targets.shape)}; "
            f"got shape {tuple(temperature.shape)}"
        ) from None
