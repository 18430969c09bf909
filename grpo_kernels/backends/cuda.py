"""The CUDA C++ kernels, on torch's current stream. float64 has no kernels here: Triton has."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _cuda  # type: ignore[attr-defined]
from .native import Kernels, plain_matrix
from .scratch import GpuMemory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability: asynchronous copies


def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    if torch.version.cuda is None:
        return "this torch has no CUDA; use 'triton' (ROCm), 'cpu' or 'reference'"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; use 'cpu' or 'reference'"
    newest = max(torch.cuda.get_device_capability(d) for d in range(torch.cuda.device_count()))
    if newest < OLDEST:
        return f"its kernels need sm_80 or later and this GPU is sm_{newest[0]}{newest[1]}; use 'triton'"
    return None


def runs_on(device: torch.device, dtype: torch.dtype | None) -> bool:
    if device.type != "cuda" or not (dtype is None or dtype in DTYPES):
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST


def _launch(kernel: Callable[..., None], device: torch.device, *args: object) -> None:
    with torch.cuda.device(device):
        kernel(*args, torch.cuda.current_stream(device).cuda_stream)


new_matrix = plain_matrix
KERNELS = Kernels(_cuda, _launch, plain_matrix, GpuMemory(_cuda))
row_forward, row_backward, row_policy = KERNELS.row_forward, KERNELS.row_backward, KERNELS.row_policy
scale, token_policy, group_advantages, gae = KERNELS.scale, KERNELS.token_policy, KERNELS.group_advantages, KERNELS.gae
value_loss, masked_moments, whiten = KERNELS.value_loss, KERNELS.masked_moments, KERNELS.whiten
group_diversity = KERNELS.group_diversity
