"""A kernel's results against the reference in float64, by the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.testing.compare import assert_as_accurate

from .protocol import Figures

# (inputs by name, backend) -> results by name
Call = Callable[[Mapping[str, Any], str], Mapping[str, Tensor]]


def in_dtype(inputs: Mapping[str, Any], dtype: torch.dtype, only: Sequence[str] | None = None) -> dict[str, Any]:
    """`only`: the inputs to cast, all by default. The others become float32, or float64 if `dtype` is float64."""
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def cast(name: str, x: Any) -> Any:
        if not (torch.is_tensor(x) and x.is_floating_point()):
            return x
        return x.to(dtype if only is None or name in only else acc_dtype)

    return {name: cast(name, x) for name, x in inputs.items()}


def accurate(call: Call, inputs: Mapping[str, Any], backend: str, dtype: torch.dtype, only: Sequence[str]) -> Figures:
    """Compares ours on `backend`, eager in the same dtype, and float64; returns the figures of the worst result."""
    narrow = in_dtype(inputs, dtype, only)
    ours, eager = call(narrow, backend), call(narrow, "reference")
    exact = {name: x.double() for name, x in call(in_dtype(narrow, torch.float64), "reference").items()}
    worst = 0.0
    for name in exact:
        finite = exact[name].isfinite()
        if finite.any():
            worst = max(worst, float((ours[name].double() - exact[name]).abs()[finite].max()))
        assert_as_accurate(ours[name], eager[name], exact[name], what=name)
    return {"max_error": worst}


def same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor], what: str) -> None:
    for name, x in first.items():
        y = second[name]
        different = int(((x != y) & ~((x != x) & (y != y))).sum())
        assert different == 0, f"{what}: {name} differs at {different} of {x.numel()}"
