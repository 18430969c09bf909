"""The C++ kernels: tensors become addresses and strides here, and nothing is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import _cpu  # type: ignore[attr-defined]
from ..config import METRICS, Form
from ..grouping import BASELINES, SCALES, VALUE_METRICS, AdvantageForm, Samples
from ..layout import PolicyInputs, Rows, RowStats, real_dtype

INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_bf16")  # in the order of gk::Isa
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

HUGE_PAGE_WORTH = 4 << 20  # bytes

View = tuple[int, int, int]


def instruction_set() -> str:
    return INSTRUCTION_SETS[_cpu.isa_in_use()]


def supported_instruction_sets() -> list[str]:
    return [name for code, name in enumerate(INSTRUCTION_SETS) if _cpu.isa_supported(code)]


@contextlib.contextmanager
def forced_instruction_set(name: str) -> Iterator[None]:
    """For tests: every kernel, in every thread, runs on this instruction set inside the block."""
    if name not in supported_instruction_sets():
        raise ValueError(f"this CPU supports {', '.join(supported_instruction_sets())}; got {name!r}")
    before = _cpu.isa_in_use()
    _cpu.use_isa(INSTRUCTION_SETS.index(name))
    try:
        yield
    finally:
        _cpu.use_isa(before)


def new_matrix(like: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory that may be as large as the logits: in huge pages, as faults would cost several copies."""
    matrix = like.new_empty(shape, dtype=dtype or like.dtype)
    if matrix.nbytes >= HUGE_PAGE_WORTH:
        _cpu.prefer_huge_pages(matrix.data_ptr(), matrix.nbytes)
    return matrix


def _view(x: Tensor | None) -> View | None:
    return None if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows(r: Rows) -> _cpu.Rows:
    shape = (*r.targets.shape, r.logits.shape[-1])
    return _cpu.Rows(
        _view(r.logits), _view(r.targets), _view(r.active), _view(r.temperatures), _DTYPES.index(r.logits.dtype), shape,
        r.temperature, r.logit_scale, r.softcap, torch.get_num_threads(),
    )  # fmt: skip


def _empty(like: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=real_dtype(like.dtype))


def _new_stats(rows: Rows) -> RowStats:
    return RowStats(*(_empty(rows.logits, rows.targets.shape) for _ in RowStats._fields))


def _addresses(stats: RowStats, sum_p2: Tensor | None = None) -> list[int]:
    return [*map(_address, stats), _address(sum_p2)]


def _sequences(grid: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, int]:
    """The boundaries, dense, and how many sequences there are: one a row without."""
    return (None, grid.shape[0]) if cu_seqlens is None else (cu_seqlens.contiguous(), cu_seqlens.numel() - 1)


def _policy(p: PolicyInputs) -> tuple[list[View | None], tuple[int, float], list[int], list[float]]:
    *views, group_size, eps, scalars, form = p
    return [_view(x) for x in views], (group_size, eps), Form(*form).codes, scalars.tolist()


def row_forward(rows: Rows, sum_p2: bool) -> tuple[RowStats, Tensor]:
    stats = _new_stats(rows)
    squares = _empty(rows.logits, rows.targets.shape if sum_p2 else (0,))
    _cpu.row_forward(_rows(rows), _addresses(stats, squares if sum_p2 else None))
    return stats, squares


def row_backward(rows: Rows, saved: RowStats, g_logps: Tensor, g_entropy: Tensor | None, gradient: Tensor) -> None:
    g_logps = g_logps.contiguous()
    g_entropy = None if g_entropy is None else g_entropy.contiguous()
    saved = RowStats(*(x.contiguous() for x in saved))
    _cpu.row_backward(_rows(rows), _addresses(saved), _address(g_logps), _address(g_entropy), _view(gradient))


def row_policy(rows: Rows, inputs: PolicyInputs, gradient: Tensor) -> RowStats:
    stats = _new_stats(rows)
    _cpu.row_policy(_rows(rows), _addresses(stats), *_policy(inputs), _view(gradient))
    return stats


def scale(matrix: Tensor, factor: Tensor) -> None:
    if factor != 1:
        matrix.mul_(factor)  # of a 0-d factor, which keeps its precision and the matrix's dtype


def token_policy(
    logps: Tensor, entropy: Tensor | None, active: Tensor, cu_seqlens: Tensor | None, inputs: PolicyInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, metrics = _empty(logps, ()), _empty(logps, (len(METRICS),))
    per_token, g_logps = _empty(logps, logps.shape), _empty(logps, logps.shape)
    g_entropy = _empty(logps, logps.shape if entropy is not None else (0,))
    cu_seqlens, sequences = _sequences(logps, cu_seqlens)
    outputs = [*map(_address, (loss, per_token, g_logps, None if entropy is None else g_entropy, metrics))]
    _cpu.token_policy(
        *_policy(inputs), _view(logps), _view(entropy), _view(active), tuple(logps.shape), _address(cu_seqlens),
        sequences,
        logps.dtype == torch.float64, outputs, torch.get_num_threads(),
    )  # fmt: skip
    return loss, per_token, g_logps, g_entropy, metrics


def group_advantages(samples: Samples, form: AdvantageForm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dense = Samples(*(None if x is None else x.contiguous() for x in samples))  # type: ignore[arg-type]
    outputs = [_empty(dense.rewards, dense.rewards.shape[:1]) for _ in range(3)]
    informative = torch.empty(dense.rewards.shape[:1], dtype=torch.bool)
    _cpu.group_advantages(
        [*map(_address, dense)], tuple(dense.rewards.shape), form.group_size, BASELINES.index(form.baseline),
        SCALES.index(form.scale), form.ddof, [form.eps, form.critic_weight, form.clip_low, form.clip_high],
        form.single_raw, dense.rewards.dtype == torch.float64, [*map(_address, (*outputs, informative))],
        torch.get_num_threads(),
    )  # fmt: skip
    return outputs[0], outputs[1], outputs[2], informative


def gae(
    rewards: Tensor, values: Tensor | None, active: Tensor | None, cu_seqlens: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    dtype = real_dtype(rewards.dtype)
    advantages = new_matrix(rewards, rewards.shape, dtype)
    returns = new_matrix(rewards, (0,) if values is None else rewards.shape, dtype)
    cu_seqlens, sequences = _sequences(rewards, cu_seqlens)
    _cpu.gae(
        [*map(_view, (rewards, values, active))], tuple(rewards.shape), _address(cu_seqlens), sequences, gamma, lam,
        dtype == torch.float64, [_address(advantages), _address(None if values is None else returns)],
        torch.get_num_threads(),
    )  # fmt: skip
    return advantages, returns


def value_loss(
    values: Tensor, old_values: Tensor | None, returns: Tensor, weights: Tensor, active: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, metrics = _empty(values, ()), _empty(values, (len(VALUE_METRICS),))
    per_token, g_values = (new_matrix(values, values.shape, real_dtype(values.dtype)) for _ in range(2))
    _cpu.value_loss(
        [*map(_view, (values, old_values, returns, weights, active))], tuple(values.shape), clip,
        values.dtype == torch.float64, [*map(_address, (loss, per_token, g_values, metrics))], torch.get_num_threads(),
    )  # fmt: skip
    return loss, per_token, g_values, metrics


def masked_moments(values: Tensor, active: Tensor) -> Tensor:
    moments = torch.empty(5, dtype=torch.float64)
    _whitening(_cpu.masked_moments, values, active, [_address(moments), 0, 0])
    return moments


def whiten(values: Tensor, active: Tensor, coefficients: Tensor) -> Tensor:
    whitened, coefficients = new_matrix(values, values.shape, real_dtype(values.dtype)), coefficients.contiguous()
    _whitening(_cpu.whiten, values, active, [0, _address(coefficients), _address(whitened)])
    return whitened


def _whitening(kernel: Callable, values: Tensor, active: Tensor, data: list[int]) -> None:
    views = [_view(values), _view(active)]
    kernel(views, tuple(values.shape), values.dtype == torch.float64, data, torch.get_num_threads())


def group_diversity(
    token_ids: Tensor, active: Tensor | None, cu_seqlens: Tensor | None, group_ids: Tensor | None, group_size: int,
    ngram: int, threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    cu_seqlens, samples = _sequences(token_ids, cu_seqlens)
    group_ids = None if group_ids is None else group_ids.contiguous()
    keep = torch.empty(samples, dtype=torch.bool)
    similarity, weights = (torch.empty(samples, dtype=torch.float32) for _ in range(2))
    _cpu.group_diversity(
        _view(token_ids), _view(active), [_address(cu_seqlens), _address(group_ids)], token_ids.dtype == torch.int32,
        [samples, token_ids.shape[1], group_size, ngram], threshold, [*map(_address, (keep, similarity, weights))],
        torch.get_num_threads(),
    )  # fmt: skip
    return keep, similarity, weights
