"""What a loss did with each token, for trainers that log it; the losses themselves report 26 numbers for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import DEFAULT, OBJECTIVES, LossConfig
from ..inputs.check import check_tensor
from ..inputs.layout import acc_dtype, active_tokens, layout_of
from ..reference import loss as reference
from .covariance import covariance_selection
from .policy import Advantages, LossArguments, policy_inputs


class TokenDetails(NamedTuple):
    """Per token, of the log-probs' shape; at masked tokens ratio, gradient_weight and weight are 1, the flags False."""

    ratio: Tensor  # r, at the config's ratio level: one value for a sequence of GSPO
    clip_low: Tensor  # bool; the flags are described with the metrics of their names, in LossOutput
    clip_high: Tensor  # bool
    clip_cap: Tensor  # bool
    gradient_weight: Tensor  # g, where the policy term's gradient is -g A
    weight: Tensor  # token_weights times entropy_mask


def token_details(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    old_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: LossConfig | None = None,
) -> TokenDetails:
    """Ratio, clip flags and weights of each token, of which a loss's metrics are the means and extremes.

    For loggers that want a histogram (AReaL's ``stats_tracker``), or the share of *sequences* that are clipped, as TRL
    logs for GSPO: ``d.clip_high.any(-1).float().mean()``. Plain PyTorch operators on ``[B, T]`` tensors, detached; no
    loss computes it.

    Args:
        logps: ``[B, T]`` or ``[N]``, of the current policy, as in ``LossOutput.logps``; no gradient passes.
        advantages, mask, old_logps, rollout_logps, token_weights, entropy_mask, cu_seqlens, config: what the loss was
            given. ``clip_cov`` picks tokens at random, others here than in its loss.

    Returns:
        TokenDetails, float32 (float64 for float64 log-probs).

    Raises:
        ValueError, TypeError: as ``policy_loss``.
    """
    config = config or DEFAULT
    check_tensor("logps", logps, kind="float", differentiable=True)
    dtype, layout = acc_dtype(logps.dtype), layout_of(logps.shape, cu_seqlens, logps.device)
    active = active_tokens(mask, layout, logps.device)
    no_reference = logps.detach() if config.has_kl else None  # the KL term is no part of the details
    given = LossArguments(old_logps, no_reference, rollout_logps, token_weights, entropy_mask, denominator=1.0)
    inputs = policy_inputs(layout, active, dtype, config, Advantages(advantages), given)
    with torch.no_grad():
        lp = torch.where(active, logps.detach().to(dtype).reshape(layout.bt_shape), 0.0)
        if OBJECTIVES[config.objective].selects_tokens:
            inputs = inputs._replace(selected=covariance_selection(lp, active, inputs, config))
        term = reference.policy_term(lp, active, layout, inputs, config.form, reference.scalars_of(config, dtype))
    ratio, gradient_weight, weight = (
        torch.where(active, x, 1.0) for x in (term.values.log_ratio.exp(), term.gradient_weight, term.weight)
    )
    low, high, cap = (flag & active for flag in term.flags)
    return TokenDetails(*(x.view(logps.shape) for x in (ratio, low, high, cap, gradient_weight, weight)))
