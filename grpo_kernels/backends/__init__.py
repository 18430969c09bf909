"""A backend is a module with the functions of `Backend` below, on [B, T] tensors; imported when it is first used."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol

import torch
from torch import Tensor

from ..inputs.grouping import AdvantageForm, Samples
from ..inputs.layout import PolicyInputs, Rows, RowStats
from .gpu import index_of

NAMES = ("cuda", "triton", "cpu", "reference")
# Where a launch costs more than to read a group's rewards again for each row, up to groups of this size.
GROUPS_IN_LAUNCH = ("cuda", "triton", "emulated")
LARGEST_GROUP_IN_LAUNCH = 1024
TESTS_ONLY = ("emulated",)  # the CUDA kernels on CPU tensors, where a test has built them
NOT_IMPORTED = {
    "cpu": "its native module does not load ({error}); "
    "build it with `pip install .` (or `python setup.py build_ext --inplace`) where a C++ compiler is",
    "cuda": "its native module does not load ({error}); build it with `pip install .` where nvcc is "
    "(GRPO_KERNELS_CUDA=1 shows why it fails), or use 'triton'",
    "triton": "Triton does not import ({error}); install it with `pip install 'grpo-kernels[triton]'`",
}


class Backend(Protocol):
    """Tensors have been checked; outputs are dense, and `gradient` may be the logits themselves."""

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


@functools.cache
def implementation(name: str) -> Backend:
    """The module of a backend.

    Raises:
        ValueError: for a name that is none of `NAMES`.
        BackendUnavailable: if it cannot run here.
    """
    if name not in NAMES + TESTS_ONLY:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}; got {name!r}")
    try:
        module: Any = importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        raise BackendUnavailable(name, NOT_IMPORTED.get(name, "{error}").format(error=error)) from error
    if name in ("cuda", "triton") and (reason := module.missing()):
        raise BackendUnavailable(name, reason)
    return module


def resolve(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """'auto' to the name of the backend that runs `dtype` (None: any) on `device`; another name is checked to do so.

    A CUDA tensor gets 'cuda' where its module is built, the GPU is new enough and the dtype has kernels there, and
    'triton' otherwise.
    """
    if backend == "auto":
        backend = (
            _of_gpu(device.index, dtype) if device.type == "cuda" else "cpu" if device.type == "cpu" else "reference"
        )
    if not torch.compiler.is_compiling():  # a compiled graph finds out when it calls the operator
        _check_runs_on(implementation(backend), backend, device, dtype)
    if backend in ("cpu", "emulated") and device.type != "cpu":
        raise ValueError(f"backend {backend!r} needs CPU tensors; got {device}")
    return backend


def _of_gpu(index: int | None, dtype: torch.dtype | None) -> str:
    try:
        module: Any = implementation("cuda")
    except BackendUnavailable:
        return "triton"
    return "cuda" if module.runs_on(torch.device("cuda" if index is None else f"cuda:{index}"), dtype) else "triton"


# What torch.compiler.assume_constant_result does, but for the import of torch._dynamo, which takes longer than torch's.
_of_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_runs_on(module: Any, backend: str, device: torch.device, dtype: torch.dtype | None) -> None:
    if backend == "triton" and not module.runs_on(device):
        _check_gpu(module, backend, device)
        raise ValueError(
            f"backend 'triton' needs tensors on a GPU, or Triton's interpreter (TRITON_INTERPRET=1, set before "
            f"Triton is imported); got {device}"
        )
    if backend == "cuda" and not module.runs_on(device, None):
        _check_gpu(module, backend, device)
        raise ValueError(f"backend 'cuda' needs tensors on an NVIDIA GPU of sm_80 or later; got {device}")
    if backend in ("cuda", "emulated") and dtype == torch.float64:
        raise DtypeUnsupported(f"backend {backend!r} has no float64; 'triton' and 'cpu' have")


def _check_gpu(module: Any, backend: str, device: torch.device) -> None:
    if device.type == "cuda" and (reason := module.refusal(index_of(device))):
        raise ValueError(f"backend {backend!r} does not run on {device}: {reason}")


def available_backends() -> dict[str, str]:
    """Every backend's name, with "ok" or the reason why it cannot run here."""
    found = {}
    for name in NAMES:
        try:
            implementation(name)
            found[name] = "ok"
        except BackendUnavailable as error:
            found[name] = error.reason
    return found
