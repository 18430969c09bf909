"""The C++ kernels' Python side, the same for `_cpu`, `_cuda` and the tests' `_emulated`: tensors become addresses and
strides here, and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import METRICS, Form
from ..inputs.grouping import BASELINES, SCALES, VALUE_METRICS, AdvantageForm, Samples
from ..inputs.layout import PolicyInputs, Rows, RowStats, acc_dtype
from .workspace import NoWorkspace, Workspace

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

View = tuple[int, int, int]


def _view(x: Tensor | None) -> View | None:
    return None if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _empty(like: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or acc_dtype(like.dtype), device=like.device)


def _new_stats(rows: Rows) -> RowStats:
    return RowStats(*(_empty(rows.logits, rows.targets.shape) for _ in RowStats._fields))


def _addresses(stats: RowStats, sum_p2: Tensor | None = None) -> list[int]:
    return [*map(_address, stats), _address(sum_p2)]


def _sequences(tokens_bt: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, int]:
    """Dense boundaries and the number of sequences; without boundaries, each row is one sequence."""
    return (None, tokens_bt.shape[0]) if cu_seqlens is None else (cu_seqlens.contiguous(), cu_seqlens.numel() - 1)


def _policy(p: PolicyInputs) -> tuple[list[View | None], tuple[int, float], list[int], list[int], list[float]]:
    *views, group_size, eps, kl_coef, entropy_coef, scalars, form = p
    coefficients = [_address(kl_coef), _address(entropy_coef)]
    return [_view(x) for x in views], (group_size, eps), coefficients, Form(*form).codes, scalars.tolist()


def no_float64(name: str, dtype: torch.dtype | None) -> str | None:
    """Why the CUDA kernels reject this dtype, or None."""
    return f"backend {name!r} has no float64; 'triton' and 'cpu' have" if dtype == torch.float64 else None


class NativeBackend:
    """A `Backend` on one native module; a subclass says where it runs. `workspaces` allocates what GPU kernels need in
    addition to the arguments."""

    name: str
    fuses_group_advantages = False
    differentiable = False

    def __init__(self, module: Any, workspaces: NoWorkspace) -> None:
        self._module, self._workspaces = module, workspaces

    def unavailable(self) -> str | None:
        return None

    def rejects(self, device: torch.device, dtype: torch.dtype | None) -> str | None:
        raise NotImplementedError

    def new_matrix(self, like: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory that may be as large as the logits."""
        return like.new_empty(shape, dtype=dtype or like.dtype)

    def _launch(self, kernel: Callable[..., None], device: torch.device, *args: object) -> None:
        """Calls a kernel with the stream appended to its arguments; the CPU has none."""
        kernel(*args, 0)

    def _rows(self, r: Rows) -> Any:
        shape = (*r.targets.shape, r.logits.shape[-1])
        return self._module.Rows(
            _view(r.logits), _view(r.targets), _view(r.active), _view(r.temperatures), _DTYPES.index(r.logits.dtype),
            shape, r.temperature, r.logit_scale, r.softcap, torch.get_num_threads(),
        )  # fmt: skip

    def row_forward(self, rows: Rows, sum_p2: bool) -> tuple[RowStats, Tensor]:
        stats = _new_stats(rows)
        squares = _empty(rows.logits, rows.targets.shape if sum_p2 else (0,))
        self._launch(
            self._module.row_forward,
            rows.logits.device,
            self._rows(rows),
            _addresses(stats, squares if sum_p2 else None),
        )
        return stats, squares

    def row_backward(
        self, rows: Rows, saved: RowStats, g_logps: Tensor, g_entropy: Tensor | None, gradient: Tensor
    ) -> None:
        g_logps = g_logps.contiguous()
        g_entropy = None if g_entropy is None else g_entropy.contiguous()
        saved = RowStats(*(x.contiguous() for x in saved))
        self._launch(
            self._module.row_backward,
            rows.logits.device,
            self._rows(rows),
            _addresses(saved),
            _address(g_logps),
            _address(g_entropy),
            _view(gradient),
        )

    def row_policy(self, rows: Rows, inputs: PolicyInputs, gradient: Tensor) -> RowStats:
        stats = _new_stats(rows)
        self._launch(
            self._module.row_policy,
            rows.logits.device,
            self._rows(rows),
            _addresses(stats),
            *_policy(inputs),
            _view(gradient),
        )
        return stats

    def scale(self, matrix: Tensor, factor: Tensor) -> None:
        factor, dtype = factor.to(acc_dtype(matrix.dtype)), _DTYPES.index(matrix.dtype)
        self._launch(
            self._module.scale, matrix.device, _view(matrix), dtype, tuple(matrix.shape), _address(factor)
        )  # fmt: skip

    def token_policy(
        self, logps: Tensor, entropy: Tensor | None, active: Tensor, cu_seqlens: Tensor | None, inputs: PolicyInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        loss, metrics = _empty(logps, ()), _empty(logps, (len(METRICS),))
        per_token, g_logps = _empty(logps, logps.shape), _empty(logps, logps.shape)
        g_entropy = _empty(logps, logps.shape if entropy is not None else (0,))
        cu_seqlens, sequences = _sequences(logps, cu_seqlens)
        outputs = [*map(_address, (loss, per_token, g_logps, None if entropy is None else g_entropy, metrics))]
        workspace = self._workspaces.tokens(logps, cu_seqlens, sequences)
        self._launch(
            self._module.token_policy, logps.device,
            *_policy(inputs), _view(logps), _view(entropy), _view(active), tuple(logps.shape), _address(cu_seqlens),
            sequences, logps.dtype == torch.float64, outputs, torch.get_num_threads(), workspace.addresses,
        )  # fmt: skip
        return loss, per_token, g_logps, g_entropy, metrics

    def group_advantages(self, samples: Samples, form: AdvantageForm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dense = Samples(*(None if x is None else x.contiguous() for x in samples))  # type: ignore[arg-type]
        outputs = [_empty(dense.rewards, dense.rewards.shape[:1]) for _ in range(3)]
        informative = _empty(dense.rewards, dense.rewards.shape[:1], torch.bool)
        extra = self._workspaces.advantages(dense.rewards, dense.group_ids)
        self._launch(
            self._module.group_advantages, dense.rewards.device,
            [*map(_address, (*dense, *extra))], tuple(dense.rewards.shape), form.group_size,
            BASELINES.index(form.baseline), SCALES.index(form.scale), form.ddof,
            [form.eps, form.critic_weight, form.clip_low, form.clip_high], form.single_raw,
            dense.rewards.dtype == torch.float64, [*map(_address, (*outputs, informative))],
            torch.get_num_threads(),
        )  # fmt: skip
        return outputs[0], outputs[1], outputs[2], informative

    def gae(
        self,
        rewards: Tensor,
        values: Tensor | None,
        active: Tensor | None,
        cu_seqlens: Tensor | None,
        gamma: float,
        lam: float,
    ) -> tuple[Tensor, Tensor]:
        dtype = acc_dtype(rewards.dtype)
        advantages = self.new_matrix(rewards, rewards.shape, dtype)
        returns = self.new_matrix(rewards, (0,) if values is None else rewards.shape, dtype)
        cu_seqlens, sequences = _sequences(rewards, cu_seqlens)
        workspace = self._workspaces.gae(rewards, cu_seqlens)
        self._launch(
            self._module.gae, rewards.device,
            [*map(_view, (rewards, values, active))], tuple(rewards.shape), _address(cu_seqlens), sequences, gamma, lam,
            dtype == torch.float64, [_address(advantages), _address(None if values is None else returns)],
            torch.get_num_threads(), workspace.addresses,
        )  # fmt: skip
        return advantages, returns

    def value_loss(
        self, values: Tensor, old_values: Tensor | None, returns: Tensor, weights: Tensor, active: Tensor, clip: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, metrics = _empty(values, ()), _empty(values, (len(VALUE_METRICS),))
        per_token, g_values = (self.new_matrix(values, values.shape, acc_dtype(values.dtype)) for _ in range(2))
        workspace = self._workspaces.value_loss(values)
        self._launch(
            self._module.value_loss, values.device,
            [*map(_view, (values, old_values, returns, weights, active))], tuple(values.shape), clip,
            values.dtype == torch.float64, [*map(_address, (loss, per_token, g_values, metrics))],
            torch.get_num_threads(), workspace.addresses,
        )  # fmt: skip
        return loss, per_token, g_values, metrics

    def masked_moments(self, values: Tensor, active: Tensor) -> Tensor:
        moments = _empty(values, (5,), torch.float64)
        self._whitening("masked_moments", values, active, [_address(moments), 0, 0], self._workspaces.moments(values))
        return moments

    def whiten(self, values: Tensor, active: Tensor, coefficients: Tensor) -> Tensor:
        whitened, coefficients = (
            self.new_matrix(values, values.shape, acc_dtype(values.dtype)),
            coefficients.contiguous(),
        )
        self._whitening("whiten", values, active, [0, _address(coefficients), _address(whitened)], Workspace())
        return whitened

    def _whitening(self, kernel: str, values: Tensor, active: Tensor, data: list[int], workspace: Workspace) -> None:
        views = [_view(values), _view(active)]
        self._launch(
            getattr(self._module, kernel), values.device,
            views, tuple(values.shape), values.dtype == torch.float64, data, torch.get_num_threads(),
            workspace.addresses,
        )  # fmt: skip

    def group_diversity(
        self, token_ids: Tensor, active: Tensor | None, cu_seqlens: Tensor | None, group_ids: Tensor | None,
        group_size: int, ngram: int, threshold: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        cu_seqlens, samples = _sequences(token_ids, cu_seqlens)
        group_ids = None if group_ids is None else group_ids.contiguous()
        keep = _empty(token_ids, (samples,), torch.bool)
        similarity, weights = (_empty(token_ids, (samples,), torch.float32) for _ in range(2))
        extra, workspace = self._workspaces.diversity(token_ids, samples, group_ids)
        self._launch(
            self._module.group_diversity, token_ids.device,
            _view(token_ids), _view(active), [*map(_address, (cu_seqlens, group_ids, *extra))],
            token_ids.dtype == torch.int32, [samples, token_ids.shape[1], group_size, ngram], threshold,
            [*map(_address, (keep, similarity, weights))], torch.get_num_threads(), workspace.addresses,
        )  # fmt: skip
        return keep, similarity, weights
