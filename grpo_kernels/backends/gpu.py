"""What is asked of a GPU before a backend's kernels run on it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

OLDEST = (8, 0)  # compute capability: asynchronous copies, bfloat16


def index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def too_old(index: int) -> str | None:
    """Why no kernel runs on this GPU, or None. An AMD one has no such number."""
    if torch.version.hip is not None or (capability := torch.cuda.get_device_capability(index)) >= OLDEST:
        return None
    return (
        f"its kernels need sm_80 or later and cuda:{index} is sm_{capability[0]}{capability[1]}; "
        "use backend='reference', which runs on any device"
    )


def refused_by_all(refusal: Callable[[int], str | None]) -> str | None:
    """The first GPU's refusal, or None where one accepts; none behind that one is asked."""
    first = None
    for index in range(torch.cuda.device_count()):
        if (reason := refusal(index)) is None:
            return None
        first = first or reason
    return first
