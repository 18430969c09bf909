"""Coefficients of the loss that are tensors: what they must be, and where a kernel finds them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


class ComparesTensorsById:
    """Equality, hash and repr of a frozen dataclass that holds tensors, without a host sync for their values."""

    def _compared(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self) if f.compare)  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return all(
            a is b or (not (isinstance(a, Tensor) or isinstance(b, Tensor)) and a == b)
            for a, b in zip(self._compared(), other._compared(), strict=True)
        )

    def __hash__(self) -> int:
        return hash(self._compared())

    def __repr__(self) -> str:
        def shown(value: Any) -> str:
            return f"<{value.dtype} on {value.device}>" if isinstance(value, Tensor) else repr(value)

        fields = (f for f in dataclasses.fields(self) if f.repr)  # type: ignore[arg-type]
        return f"{type(self).__qualname__}({', '.join(f'{f.name}={shown(getattr(self, f.name))}' for f in fields)})"


def check_coefficient(name: str, value: Tensor) -> None:
    """Checks everything but the value, which would synchronise."""
    if value.numel() != 1 or value.dim() > 1:
        raise ValueError(f"{name} as a tensor must be 0-d or [1]; got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name} as a tensor must be of a floating dtype; got {value.dtype}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad, as no loss is differentiated in it; pass {name}.detach()")


def readable(name: str, value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The coefficient 0-d in `dtype`, for kernels on `device`; None for one that is read here and now, on the CPU."""
    check_coefficient(name, value)
    if value.device == device:
        return value.detach().to(dtype).reshape(())
    if value.device.type != "cpu":
        raise ValueError(f"{name} must be on {device}, as the tokens, or on the CPU; got a tensor on {value.device}")
    return None
