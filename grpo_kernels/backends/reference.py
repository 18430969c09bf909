"""Plain torch, for any device and as the kernels' specification: the losses differentiate ../reference/loss.py and
../reference/advantages.py by autograd.

Advantages, returns, whitening and diversity carry no gradient and are taken from there as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from ..reference import advantages, diversity


class ReferenceBackend:
    name = "reference"
    fuses_group_advantages = False
    differentiable = True
    group_advantages = staticmethod(advantages.group_advantages)
    gae = staticmethod(advantages.gae)
    masked_moments = staticmethod(advantages.masked_moments)
    whiten = staticmethod(advantages.whiten)
    group_diversity = staticmethod(diversity.group_diversity)

    def unavailable(self) -> str | None:
        return None

    def rejects(self, device: torch.device, dtype: torch.dtype | None) -> str | None:
        return None


BACKEND: Any = ReferenceBackend()  # its losses are no functions of a backend, but plain torch code: `differentiable`
