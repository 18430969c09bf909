"""How an operator is registered, and what every autograd.Function over one asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

SECOND_DERIVATIVE_ERROR = (
    "the kernels compute first derivatives only, so create_graph=True would give second derivatives of 0; "
    "pass create_graph=False, or backend='reference', which is differentiable any number of times"
)
LIBRARY = torch.library.Library("grpo_kernels", "DEF")


def define(schema: str, run: Callable, fake: Callable) -> Any:
    """Registers `run` for every device; `fake` gives the shapes. The returned overload skips the name lookup."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grpo_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.grpo_kernels, name).default


def first_order(backward: Callable) -> Callable:
    """For the backward of an autograd.Function over these operators, whose gradients have no derivative of their own.

    torch's `once_differentiable` notices a second derivative only where the upstream gradient requires grad; of the
    constant one of ``loss.backward(create_graph=True)`` it would be 0, without a word."""
    once: Callable = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # AOTAutograd refuses it by itself
            raise RuntimeError(SECOND_DERIVATIVE_ERROR)
        return once(ctx, *gradients)

    return checked


def none_for_unused_outputs(ctx: Any) -> None:
    """An output whose gradient nobody asks for gives the backward None, not zeros that a launch has filled."""
    if not torch.compiler.is_compiling():  # dynamo does not know the method, and drops such zeros itself
        ctx.set_materialize_grads(False)
