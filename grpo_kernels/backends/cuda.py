"""The CUDA C++ kernels, on torch's current stream. float64 has no kernels here: Triton has."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from . import Backend, _cuda  # type: ignore[attr-defined]
from .gpu import index_of, refused_by_all, too_old
from .native import NativeBackend, no_float64
from .workspace import CudaWorkspace


@functools.cache
def refusal(index: int) -> str | None:
    """Why the kernels cannot run on this GPU, or None."""
    if reason := too_old(index):
        return reason
    with torch.cuda.device(index):
        error = _cuda.unusable()
    return f"the driver runs no kernel of its native module on cuda:{index} ({error}); use 'triton'" if error else None


class CudaBackend(NativeBackend):
    name = "cuda"
    fuses_group_advantages = True

    def unavailable(self) -> str | None:
        if torch.version.cuda is None:
            return "this torch has no CUDA; use 'triton' (ROCm), 'cpu' or 'reference'"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device; use 'cpu' or 'reference'"
        return refused_by_all(refusal)

    def rejects(self, device: torch.device, dtype: torch.dtype | None) -> str | None:
        if device.type != "cuda":
            return f"backend 'cuda' needs tensors on an NVIDIA GPU of sm_80 or later; got {device}"
        if reason := refusal(index_of(device)):
            return f"backend 'cuda' does not run on {device}: {reason}"
        return no_float64(self.name, dtype)

    def _launch(self, kernel: Callable[..., None], device: torch.device, *args: object) -> None:
        with torch.cuda.device(device):
            kernel(*args, torch.cuda.current_stream(device).cuda_stream)


BACKEND: Backend = CudaBackend(_cuda, CudaWorkspace(_cuda))
