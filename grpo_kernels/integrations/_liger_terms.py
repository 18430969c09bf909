"""What Liger's options, denominators and metrics are here, and its per-token losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import resolve
from ..config import LossConfig
from ..inputs.layout import PolicyInputs, active_tokens, layout_of
from ..loss.policy import Advantages, LossArguments, LossOutput, loss_from_logps, policy_inputs

# loss_type -> (our objective, our aggregation)
LOSSES = {
    "grpo": ("clip", "sequence_mean"), "bnpo": ("clip", "token_mean"), "dr_grpo": ("clip", "fixed_length"),
    "dapo": ("clip", "token_mean"), "luspo": ("clip", "sequence_sum"), "cispo": ("cispo", "token_mean"),
    "sapo": ("sapo", "sequence_mean"), "vespo": ("vespo", "token_mean"),
}  # fmt: skip
_ACROSS_RANKS = ("dapo", "cispo", "vespo")  # their denominator is the mean of the ranks' tokens


@functools.lru_cache(maxsize=256)
def loss_config(
    loss_type: str,
    importance_sampling_level: str,
    max_completion_length: int | None,
    beta: float,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    use_bias_correction_kl: bool,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
    vespo: tuple[float, float, float, float],
) -> LossConfig:
    """Liger's options as a `LossConfig`. An option of another ``loss_type`` (``epsilon_low`` of ``cispo``, the
    temperatures of ``sapo``) is not used, as in Liger.

    Args:
        vespo: ``vespo_k_pos``, ``vespo_lambda_pos``, ``vespo_k_neg``, ``vespo_lambda_neg``.

    Raises:
        ValueError: for an option that the loss cannot honour.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(map(repr, LOSSES))}; got {loss_type!r}")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence'; got {importance_sampling_level!r}")
    objective, aggregation = LOSSES[loss_type]
    for name, value in (("pos", sapo_temperature_pos), ("neg", sapo_temperature_neg)):
        if value <= 0:
            raise ValueError(f"sapo_temperature_{name} must be above 0; got {value}")
    if delta is not None and objective != "clip":
        raise ValueError(f"delta={delta} is not used by loss_type={loss_type!r}, which has no such bound; pass None")
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError("loss_type='dr_grpo' needs max_completion_length; got None")
    own: dict[str, dict[str, Any]] = {
        "clip": {"eps_low": epsilon_low, "eps_high": epsilon_high, "delta": delta},
        "cispo": {"cispo_high": epsilon_high},
        "sapo": {"sapo_tau_pos": sapo_temperature_pos, "sapo_tau_neg": sapo_temperature_neg},
        "vespo": dict(zip(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), vespo, strict=True)),
    }
    return LossConfig(
        objective=objective,
        aggregation=aggregation,
        ratio_level=importance_sampling_level,
        max_length=max_completion_length if aggregation == "fixed_length" else None,
        kl_coef=beta,
        kl_gradient="importance_weighted" if use_bias_correction_kl else "pathwise",
        **own[objective],
    )


def denominator(loss_type: str, mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor | float | None:
    """What ``dapo``, ``cispo`` and ``vespo`` divide by: the tokens of all ranks (or ``num_items_in_batch``) over the
    number of ranks, at least 1, so that DDP's mean of the gradients is a mean over all tokens. None: the loss's own."""
    if loss_type not in _ACROSS_RANKS:
        return None
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if isinstance(num_items_in_batch, Tensor):
        return (num_items_in_batch.detach().to(mask.device, torch.float32) / ranks).clamp(min=1)
    if num_items_in_batch is not None:
        return max(num_items_in_batch / ranks, 1.0)
    if ranks == 1:
        return None
    tokens = (mask != 0).sum().to(torch.float32)
    dist.all_reduce(tokens)
    return (tokens / ranks).clamp(min=1)


def metrics_of(out: LossOutput, config: LossConfig, clipped: Callable[[], Tensor], kl: bool) -> list[Tensor]:
    """Liger's list: the mean KL where there is one, and the share of clipped tokens."""
    share = out.metrics["clip_region"]
    if config.ratio_level != "token":  # all tokens of a clipped sequence are
        share = clipped().sum() / out.metrics["tokens"].clamp(min=1)
    return [out.metrics["kl"], share] if kl else [share]


def ratio_of(config: LossConfig, logps: Tensor, old_logps: Tensor | None, active: Tensor) -> Tensor:
    """The importance ratio, ``[B, T]`` or, of a sequence, ``[B, 1]``."""
    log_ratio = torch.zeros_like(logps) if old_logps is None else torch.where(active, logps - old_logps, 0.0)
    if config.ratio_level != "token":
        log_ratio = log_ratio.sum(-1, keepdim=True) / active.sum(-1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def clipped_tokens(
    config: LossConfig, logps: Tensor, old_logps: Tensor | None, mask: Tensor, advantages: Tensor
) -> Tensor:
    """``[B, T]`` bool: the tokens that Liger counts as clipped, by the clip range (``cispo``: by its cap)."""
    active = mask != 0
    ratio = ratio_of(config, logps, old_logps, active)
    adv = advantages if advantages.dim() == 2 else advantages[:, None]
    if config.objective == "cispo":
        return active & (ratio > config.cispo_high) & (adv > 0)
    if config.objective != "clip":
        return torch.zeros_like(active)
    high = config.eps_low if config.eps_high is None else config.eps_high
    return active & (((ratio < 1 - config.eps_low) & (adv < 0)) | ((ratio > 1 + high) & (adv > 0)))


class PerToken(torch.autograd.Function):
    """A loss's terms before aggregation, ``[B, T]``, differentiable under any gradient per token: that gradient is the
    weight of each token in a sum, and the derivative of the sum comes from the token kernel."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, terms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        ctx.terms = terms
        ctx.save_for_backward(logps)
        return terms(logps.detach(), torch.ones_like(logps))[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (logps,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            total, _ = ctx.terms(leaf, g)
        return torch.autograd.grad(total, leaf)[0], None


def per_token_terms(
    logps: Tensor, mask: Tensor, advantages: Tensor, config: LossConfig, given: LossArguments, backend: str
) -> Tensor:
    """``[B, T]`` per-token losses of ``[B, T]`` log-probs."""
    layout, backend = layout_of(logps.shape, None, logps.device), resolve(backend, logps.device, logps.dtype)
    active = active_tokens(mask, layout, logps.device)
    inputs: PolicyInputs = policy_inputs(layout, active, logps.dtype, config, Advantages(advantages), given)

    def terms(logps: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        weighted = inputs._replace(weights=weights.to(logps.dtype).contiguous())
        return loss_from_logps(logps, None, active, layout, weighted, config, backend)[:2]

    result: Tensor = PerToken.apply(logps, terms)
    return result
