"""The CUDA C++ kernels, on torch's current stream. float64 has no kernels here: Triton has."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from . import _cuda  # type: ignore[attr-defined]
from .gpu import index_of, refused_by_all, too_old
from .native import Kernels, plain_matrix
from .workspace import CudaWorkspace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    if torch.version.cuda is None:
        return "this torch has no CUDA; use 'triton' (ROCm), 'cpu' or 'reference'"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; use 'cpu' or 'reference'"
    return refused_by_all(refusal)


@functools.cache
def refusal(index: int) -> str | None:
    """Why the kernels cannot run on this GPU, or None."""
    if reason := too_old(index):
        return reason
    with torch.cuda.device(index):
        error = _cuda.unusable()
    return f"the driver runs no kernel of its native module on cuda:{index} ({error}); use 'triton'" if error else None


def runs_on(device: torch.device, dtype: torch.dtype | None) -> bool:
    return device.type == "cuda" and (dtype is None or dtype in DTYPES) and refusal(index_of(device)) is None


def _launch(kernel: Callable[..., None], device: torch.device, *args: object) -> None:
    with torch.cuda.device(device):
        kernel(*args, torch.cuda.current_stream(device).cuda_stream)


new_matrix = plain_matrix
KERNELS = Kernels(_cuda, _launch, plain_matrix, CudaWorkspace(_cuda))
row_forward, row_backward, row_policy = KERNELS.row_forward, KERNELS.row_backward, KERNELS.row_policy
scale, token_policy, group_advantages, gae = KERNELS.scale, KERNELS.token_policy, KERNELS.group_advantages, KERNELS.gae
value_loss, masked_moments, whiten = KERNELS.value_loss, KERNELS.masked_moments, KERNELS.whiten
group_diversity = KERNELS.group_diversity
