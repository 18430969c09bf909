"""A loss inside the forward of a wrapped model, where DDP and FSDP can see it.

``DistributedDataParallel`` and FSDP work in the wrapper's ``forward``: there DDP prepares its reducer, and FSDP gathers
the parameters. What calls ``ddp.module`` or the lm_head's weight directly passes them by. `in_forward` runs a function
of the model through the wrapper instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

R = TypeVar("R")


class Boxed:
    """Arguments in one object that no wrapper looks into: FSDP's mixed precision would cast bare tensors to bfloat16,
    old log-probs and advantages among them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def call(self, function: Callable[..., R]) -> R:
        return function(*self.args, **self.kwargs)


def in_forward(
    wrapped: torch.nn.Module, module: torch.nn.Module, function: Callable[..., R], *args: Any, **kwargs: Any
) -> R:
    """``function(module, *args, **kwargs)``, called by ``wrapped``'s forward in place of ``module.forward``.

    Gradients are then synchronised as those of any forward: hooks of DDP, FSDP1 and FSDP2 run, sharded parameters are
    whole inside. The function may use every part of ``module``.

    Args:
        wrapped: what the trainer calls: DDP, FSDP, or the module itself.
        module: the model within it, ``wrapped.module`` of DDP and FSDP1, ``wrapped`` itself of FSDP2.
        function: takes the module and the other arguments, which reach it as they are: no wrapper casts, moves or
            copies them.

    Returns:
        What the function returns. DDP and FSDP look for tensors that require grad in tuples, lists and dicts, a
        ``LossOutput`` included.
    """
    original = module.__dict__.get("forward")
    forward = module.forward

    def once(boxed: Boxed) -> R:
        module.forward = forward  # the function may call the model
        return boxed.call(lambda *a, **k: function(module, *a, **k))

    module.forward = once
    try:
        result: R = wrapped(Boxed(*args, **kwargs))
        return result
    finally:
        if original is None:
            del module.forward
        else:
            module.forward = original
