"""What the arguments of a public function must be: every check of a tensor or a number that more than one makes.

A message names the argument, says what is allowed and shows what was seen. Only what the host knows is checked (dtype,
device, shape, layout), so nothing here synchronises.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_NUMBERS = (numbers.Real, torch.SymInt, torch.SymFloat)
# kind -> (whether a dtype is of it, what a message calls it)
KINDS: dict[str, tuple[Callable[[torch.dtype], bool], str]] = {
    "float": (lambda t: t.is_floating_point, "of a floating dtype"),
    "integer": (lambda t: not (t.is_floating_point or t.is_complex or t == torch.bool), "integers"),
    "number": (lambda t: not t.is_complex, "real numbers or bools"),
}


def check_tensor(
    name: str,
    x: Any,
    *,
    device: torch.device | None = None,
    kind: str = "number",
    shape: Sequence[int] | None = None,
    differentiable: bool = False,
) -> None:
    """Raises unless `x` is a strided tensor of this kind, on this device and of this shape (None: any), and, where
    nothing is differentiated in it, one that requires no grad: the caller would wait for it in vain."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor, which no loss here takes yet; pass {name}.full_tensor(), or compute the loss in the "
            "forward of the wrapped model, where FSDP has gathered it (grpo_kernels.integrations.forward.in_forward)"
        )
    legal, what = KINDS[kind]
    if not legal(x.dtype):
        raise TypeError(f"{name} must be {what}; got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        raise ValueError(f"{name} must be a strided tensor; got layout {x.layout}{', nested' if x.is_nested else ''}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be where the other tensors are, on {device}; got {x.device}")
    if shape is not None and x.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(x.shape)}")
    if x.requires_grad and not differentiable and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but is not differentiated here; pass {name}.detach()")


def check_factor(name: str, x: float | Tensor, device: torch.device, above_0: bool = False) -> None:
    """A number, or a tensor of one number on `device` or the CPU."""
    if isinstance(x, Tensor):
        check_tensor(name, x, device=None if x.device.type == "cpu" else device)
        if x.numel() != 1:
            raise ValueError(f"{name} must be one number; got a tensor of shape {tuple(x.shape)}")
    else:
        what = "a finite number above 0" if above_0 else "a finite number"
        check_number(name, x, lambda v: v > 0 or not above_0, what)


def check_number(name: str, value: Any, legal: Callable[[float], bool], what: str) -> None:
    """`value` must be finite and legal."""
    number = type(value) in (int, float) or (isinstance(value, _NUMBERS) and not isinstance(value, bool))
    if not (number and abs(value) < float("inf") and legal(value)):
        raise ValueError(f"{name} must be {what}; got {value!r}")


def check_positive(name: str, value: float) -> None:
    check_number(name, value, lambda v: v > 0, "a finite number above 0")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_unused(name: str, value: Any, default: Any, why: str) -> None:
    """An option that the chosen form ignores must be left alone."""
    if value is not default and value != default:
        raise ValueError(f"{name} must be {default!r} {why}; got {value!r}")
