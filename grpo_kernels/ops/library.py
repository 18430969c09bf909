"""How an operator is registered, and what every autograd.Function over one asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("grpo_kernels", "DEF")


def define(schema: str, run: Callable, fake: Callable) -> Any:
    """Registers `run` for every device; `fake` gives the shapes. The returned overload skips the name lookup."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grpo_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.grpo_kernels, name).default


def none_for_unused_outputs(ctx: Any) -> None:
    """An output whose gradient nobody asks for gives the backward None, not zeros that a launch has filled."""
    if not torch.compiler.is_compiling():  # dynamo does not know the method, and drops such zeros itself
        ctx.set_materialize_grads(False)
