"""A backend is an object with the functions of `Backend` below, on [B, T] tensors; it is loaded when first used."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..inputs.grouping import AdvantageForm, Samples
from ..inputs.layout import PolicyInputs, Rows, RowStats

_Function = TypeVar("_Function", bound=Callable)
NAMES = ("cuda", "triton", "cpu", "reference")
LARGEST_FUSED_GROUP = 1024  # samples: a fused launch reads a group's rewards again for each row
NOT_IMPORTED = {
    "cpu": "its native module does not load ({error}); "
    "build it with `pip install .` (or `python setup.py build_ext --inplace`) where a C++ compiler is",
    "cuda": "its native module does not load ({error}); build it with `pip install .` where nvcc is "
    "(GRPO_KERNELS_CUDA=1 shows why it fails), or use 'triton'",
    "triton": "Triton does not import ({error}); install it with `pip install 'grpo-kernels[triton]'`",
}


class Backend(Protocol):
    """Tensors have been checked; outputs are dense, and `gradient` may be the logits themselves."""

    name: str
    fuses_group_advantages: bool  # `row_policy` and `token_policy` take rewards and make advantages of them
    differentiable: bool  # autograd goes through plain torch code: there are no row and policy kernels

    def unavailable(self) -> str | None: ...  # why it cannot run on this machine
    def rejects(self, device: torch.device, dtype: torch.dtype | None) -> str | None: ...  # why not these tensors
    def new_matrix(
        self, like: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor: ...
    def row_forward(self, rows: Rows, sum_p2: bool) -> tuple[RowStats, Tensor]: ...
    def row_backward(
        self, rows: Rows, saved: RowStats, g_logps: Tensor, g_entropy: Tensor | None, gradient: Tensor
    ) -> None: ...
    def row_policy(self, rows: Rows, inputs: PolicyInputs, gradient: Tensor) -> RowStats: ...
    def scale(self, matrix: Tensor, factor: Tensor) -> None: ...  # [B, T, V] in place; not touched where it is 1
    def token_policy(
        self, logps: Tensor, entropy: Tensor | None, active: Tensor, cu_seqlens: Tensor | None, inputs: PolicyInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...
    def group_advantages(self, samples: Samples, form: AdvantageForm) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def gae(
        self, rewards: Tensor, values: Tensor | None, active: Tensor | None, cu_seqlens: Tensor | None, gamma: float,
        lam: float,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def value_loss(
        self, values: Tensor, old_values: Tensor | None, returns: Tensor, weights: Tensor, active: Tensor, clip: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def masked_moments(self, values: Tensor, active: Tensor) -> Tensor: ...
    def whiten(self, values: Tensor, active: Tensor, coefficients: Tensor) -> Tensor: ...
    def group_diversity(
        self, token_ids: Tensor, active: Tensor | None, cu_seqlens: Tensor | None, group_ids: Tensor | None,
        group_size: int, ngram: int, threshold: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


class BackendUnavailable(RuntimeError):
    """Asked for a backend that is not here; the reason says how to get it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"backend {name!r} is not here: {reason}")
        self.reason = reason


class DtypeUnsupported(TypeError):
    """Asked for a backend that has no kernels for this dtype."""


def _built_in(name: str) -> Backend:
    try:
        module: Any = importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        raise BackendUnavailable(name, NOT_IMPORTED.get(name, "{error}").format(error=error)) from error
    backend: Backend = module.BACKEND
    return backend


_LOADERS: dict[str, Callable[[], Backend]] = {name: functools.partial(_built_in, name) for name in NAMES}


def register(name: str, load: Callable[[], Backend]) -> None:
    """Adds a backend, or replaces one of this name. `load` is called when it is first asked for; it may raise
    `BackendUnavailable`."""
    _LOADERS[name] = load
    implementation.cache_clear()


@functools.cache
def implementation(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: for a name that is not registered.
        BackendUnavailable: if it cannot run here.
    """
    if name not in _LOADERS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, _LOADERS))}; got {name!r}")
    backend = _LOADERS[name]()
    if reason := backend.unavailable():
        raise BackendUnavailable(name, reason)
    return backend


def _constant_in_graphs(function: _Function) -> _Function:
    """torch.compile calls it while it traces and keeps what it returned. What torch.compiler.assume_constant_result
    does, but for the import of torch._dynamo, which takes longer than torch's."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def resolve(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """'auto' to the name of the backend that runs `dtype` (None: any) on `device`; another name is checked to do so.

    A CUDA tensor gets 'cuda' where its module is built, the GPU is new enough and the dtype has kernels there, and
    'triton' otherwise.
    """
    if backend == "auto":
        backend = (
            _of_gpu(device.index, dtype) if device.type == "cuda" else "cpu" if device.type == "cpu" else "reference"
        )
    if reason := _rejected(backend, device.type, device.index, None):
        raise ValueError(reason)
    if dtype is not None and (reason := _rejected(backend, device.type, device.index, dtype)):
        raise DtypeUnsupported(reason)
    return backend


@_constant_in_graphs
def _of_gpu(index: int | None, dtype: torch.dtype | None) -> str:
    try:
        cuda = implementation("cuda")
    except BackendUnavailable:
        return "triton"
    return "triton" if cuda.rejects(_device("cuda", index), dtype) else "cuda"


@_constant_in_graphs
def _rejected(name: str, device_type: str, index: int | None, dtype: torch.dtype | None) -> str | None:
    return implementation(name).rejects(_device(device_type, index), dtype)


@_constant_in_graphs
def fuses_group_advantages(name: str) -> bool:
    """Whether this backend's losses take rewards; see `Backend`."""
    return implementation(name).fuses_group_advantages


@_constant_in_graphs
def differentiable(name: str) -> bool:
    """Whether this backend is plain torch code, through which autograd goes; see `Backend`."""
    return implementation(name).differentiable


def _device(kind: str, index: int | None) -> torch.device:
    return torch.device(kind if index is None else f"{kind}:{index}")


def available_backends() -> dict[str, str]:
    """Every backend's name, with "ok" or the reason why it cannot run here."""
    states = {}
    for name in _LOADERS:
        try:
            implementation(name)
            states[name] = "ok"
        except BackendUnavailable as error:
            states[name] = error.reason
    return states
