"""A loss inside the forward of a wrapped model, where DDP and FSDP can see it.

``DistributedDataParallel`` and FSDP work in the wrapper's ``forward``: there DDP prepares its reducer, and FSDP gathers
the parameters. What calls ``ddp.module`` or the lm_head's weight directly passes them by, and under DDP nothing says
so: each rank keeps its own gradients. `in_forward` runs a function of the model through the wrapper instead, and
`check_synchronised` notices a bypass after the first backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

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


def check_synchronised(model: torch.nn.Module, group: Any = None, *, parameters: int = 8) -> None:
    """Raises where a data-parallel wrapper was bypassed: its ranks then hold different gradients, or none.

    Call it on every rank after the first backward of an optimizer step, outside ``no_sync``, of a model under DDP (or
    whatever leaves whole gradients on every rank). Without a process group it does nothing. Checksums of the gradients
    of a few parameters, spread over the model, are gathered: one collective, and one wait for the device.

    Args:
        model: the model, wrapped or not.
        group: the data-parallel process group; None: the default one.
        parameters: how many parameters are compared; those of sharded models (DTensor) are not.

    Raises:
        RuntimeError: on every rank, with a parameter whose gradients differ.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and not hasattr(p, "placements")]
    named = named[:: max(1, len(named) // max(1, parameters))]
    if not named:
        return
    own = torch.stack([_checksum(p) for _, p in named])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    for rank, other in enumerate(everyone):
        differs = (other != everyone[0]) & ~(other.isnan() & everyone[0].isnan())
        if bool(differs.any()):
            name = named[int(differs.int().argmax())][0]
            raise RuntimeError(
                f"the gradients of {name} differ between rank 0 and rank {rank}: the loss has bypassed the "
                "data-parallel wrapper, and every rank trains alone. Call the model through its wrapper (in_forward), "
                "not ddp.module"
            )


def _checksum(parameter: torch.Tensor) -> torch.Tensor:
    """0-d float64 of a gradient, by its values and their order; NaN-preserving, -1 where there is no gradient."""
    gradient = parameter.grad
    if gradient is None:
        return torch.full((), -1.0, dtype=torch.float64, device=parameter.device)
    flat = gradient.detach().flatten()
    return flat.sum(dtype=torch.float64) + math.pi * flat[::2].sum(dtype=torch.float64)
