"""Which tokens the `*_cov` objectives pick: the one thing about a loss that needs the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LossConfig
from ..inputs.layout import PolicyInputs
from ..reference.objectives import outside_clip


def covariance_selection(logps: Tensor, active: Tensor, inputs: PolicyInputs, config: LossConfig) -> Tensor:
    """[B, T], 1 at the tokens that the ``*_cov`` objectives pick by ``(A - mean A) (logp - mean logp)``
    (arXiv:2505.22617): the top ``cov_ratio`` of them, or as many at random among unclipped ones within the bounds."""
    n = active.sum()

    def centred(x: Tensor) -> Tensor:
        x = torch.where(active, x, 0.0)
        return x - x.sum() / n

    lp, old = logps.detach(), inputs.old_logps
    cov = centred(inputs.advantages) * centred(lp)
    order, candidates = cov, active
    if config.objective == "clip_cov":
        s = config.scalar_values()
        ratio = (lp - (lp if old is None else old)).clamp(-s.log_ratio_clamp, s.log_ratio_clamp).exp()
        low, high = outside_clip(ratio, inputs.advantages, s)
        candidates = active & ~(low | high) & (cov > config.cov_low) & (cov < config.cov_high)
        order = torch.rand(cov.shape, device=cov.device)  # float32: the same picks in every dtype
    order = torch.where(candidates, order.to(cov.dtype), -torch.inf).flatten()
    rank = torch.empty_like(order, dtype=torch.int64)
    rank[order.argsort(descending=True, stable=True)] = torch.arange(order.numel(), device=order.device)
    wanted = (n * config.cov_ratio).floor().clamp(min=1)  # a tensor: no host sync for N
    return ((rank.view_as(cov) < wanted) & candidates).to(cov.dtype)
