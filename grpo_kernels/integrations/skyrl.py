"""SkyRL's policy losses on these kernels: `register` adds them to its ``PolicyLossRegistry``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import LossConfig, LossOutput, policy_loss
from ._checks import expect, require

__all__ = ["register"]

RELEASE = "0.3.0"  # what this was written for
_UTILS = "skyrl.backends.skyrl_train.utils."
_SIGNATURE = ["log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"]
_CLAMP = 20.0  # of SkyRL's log-ratios
_UNBOUNDED = 1e30  # a clip range that holds nothing back

# Of AlgorithmConfig: each loss as a config. Advantages come scaled, so that every loss is a sum over tokens.
_CONFIGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "regular": lambda c: {**_bounds(c), "log_ratio_clamp": _CLAMP},
    "dual_clip": lambda c: {**_bounds(c), "log_ratio_clamp": _CLAMP, "dual_clip": c.clip_ratio_c},
    "gspo": lambda c: {**_bounds(c), "ratio_level": "sequence_token", "sequence_log_ratio_max": 10.0},
    "cispo": lambda c: {
        "objective": "cispo", "cispo_low": 1 - c.cispo.cispo_eps_clip_low, "log_ratio_clamp": _CLAMP,
        "cispo_high": 1 + c.cispo.cispo_eps_clip_high,
    },
    "sapo": lambda c: {
        "objective": "sapo", "sapo_tau_pos": c.sapo.tau_pos, "sapo_tau_neg": c.sapo.tau_neg, "log_ratio_clamp": _CLAMP,
    },
    "rollout_is": lambda c: {"objective": "cispo", "cispo_high": _UNBOUNDED, "log_ratio_clamp": _CLAMP},
    "dppo": lambda c: {"eps_low": _UNBOUNDED, "log_ratio_clamp": _CLAMP},
    "kl_cov": lambda c: {
        "objective": "kl_cov", "cov_ratio": c.kl_cov.kl_cov_frac, "cov_kl": c.kl_cov.ppo_kl_coef,
    },
    "importance_sampling": lambda c: {"eps_low": _UNBOUNDED},
    "cross_entropy": lambda c: {"objective": "reinforce"},
}  # fmt: skip
_AGAINST_ROLLOUT = ("rollout_is", "dppo")
_UNCORRECTED = ("kl_cov", "importance_sampling", "cross_entropy")


def _bounds(c: Any) -> dict[str, Any]:
    return {"eps_low": c.eps_clip_low, "eps_high": c.eps_clip_high}


@functools.lru_cache(64)
def _config(options: tuple[tuple[str, Any], ...]) -> LossConfig:
    return LossConfig(aggregation="token_sum", **dict(options))


def _ratio(log_probs: Tensor, behaviour: Tensor) -> Tensor:
    return (log_probs.detach() - behaviour).clamp(-_CLAMP, _CLAMP).exp()


def _outside_divergence(log_probs: Tensor, mu: Tensor, advantages: Tensor, dppo: Any) -> Tensor:
    """Which tokens DPPO leaves out (arXiv:2602.04879, equations 13 and 14)."""
    lp = log_probs.detach()
    p, q = lp.exp(), mu.exp()
    if dppo.dppo_type == "binary_tv":
        away, low, high = (p - q).abs(), dppo.delta_low, dppo.delta_high
    elif dppo.dppo_type == "binary_kl":
        away = q * (mu - lp) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
        low, high = dppo.delta_low, dppo.delta_high
    else:
        raise ValueError(f"dppo_type must be 'binary_tv' or 'binary_kl'; got {dppo.dppo_type!r}")
    return ((advantages > 0) & (p > q) & (away > high)) | ((advantages < 0) & (p < q) & (away > low))


def _dropped(mode: str, log_probs: Tensor, behaviour: Tensor, advantages: Tensor, config: Any) -> Tensor | None:
    """The tokens that a loss gives no weight, bool [B, T]; None where it has no such rule."""
    if mode == "dppo":
        return _outside_divergence(log_probs, behaviour, advantages, config.dppo)
    if mode == "rollout_is":
        r = _ratio(log_probs, behaviour)
        return ~((r > 1 - config.eps_clip_low) & (r < 1 + config.eps_clip_high))
    return None


def _metrics(mode: str, out: LossOutput, outside: Tensor | None, mask: Tensor | None) -> dict[str, float]:
    if mode == "importance_sampling":
        return {"importance_ratio": out.metrics["ratio_mean"].item()}
    if mode in ("sapo", "kl_cov", "cross_entropy"):
        return {"clip_ratio": 0.0}
    if outside is None:
        return {"clip_ratio": out.metrics["clip_region"].item()}
    on = torch.ones_like(outside) if mask is None else mask != 0
    return {"clip_ratio": ((outside & on).sum() / on.sum().clamp(min=1)).item()}


def _policy_loss(mode: str, correct: Callable[..., tuple]) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """`correct`: SkyRL's ``compute_off_policy_correction``."""

    def compute(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        against_rollout = mode in _AGAINST_ROLLOUT and rollout_logprobs is not None
        if mode == "rollout_is" and rollout_logprobs is None:
            raise ValueError("rollout_is needs rollout_logprobs; got None")
        behaviour = rollout_logprobs if against_rollout and rollout_logprobs is not None else old_log_probs
        options = _CONFIGS[mode](config)
        if mode == "cross_entropy":
            advantages = torch.ones_like(log_probs)
        outside = weights = _dropped(mode, log_probs, behaviour, advantages, config)
        weights = None if weights is None else (~weights).to(log_probs.dtype)
        metrics: dict[str, float] = {}
        if rollout_logprobs is not None and mode not in _UNCORRECTED:
            # A token that the correction masks keeps its place in a sequence's ratio: it is only left out of the sum.
            tis, metrics, kept = correct(old_log_probs, rollout_logprobs, loss_mask, config.off_policy_correction)
            for factor in (tis, None if kept is loss_mask else kept):
                if factor is not None:
                    factor = factor.to(log_probs.dtype).expand_as(log_probs)
                    weights = factor if weights is None else weights * factor
        out = policy_loss(
            log_probs, advantages.detach(), loss_mask, old_logps=behaviour.detach(), token_weights=weights,
            config=_config(tuple(options.items())),
        )  # fmt: skip
        if mode == "cispo":  # on either side, whatever the sign of the advantage
            r = _ratio(log_probs, behaviour)
            outside = (r < options["cispo_low"]) | (r > options["cispo_high"])
        return out.loss, {**_metrics(mode, out, outside, loss_mask), **metrics}

    compute.__name__ = f"grpo_kernels_{mode}"
    return compute


def register() -> list[str]:
    """Adds SkyRL's policy losses, computed by ``policy_loss``, to its registry as ``gk_regular``, ``gk_gspo``, ...

    To be chosen with ``trainer.algorithm.policy_loss_type``. Values, gradients and metrics are SkyRL's; off-policy
    correction is by SkyRL's own function. Left out is ``clip_cov``, which picks tokens at random. With Ray, call
    SkyRL's ``sync_registries`` afterwards, as for any loss of your own.

    Returns:
        The names.

    Raises:
        ImportError: if SkyRL is not installed.
        RuntimeError: if SkyRL calls its policy losses with other arguments than in the release that we know.
    """
    utils: Any = require(f"{_UTILS}ppo_utils", "skyrl", RELEASE)
    correct = require(f"{_UTILS}off_policy_correction_utils", "skyrl", RELEASE).compute_off_policy_correction
    expect(utils.ppo_policy_loss, _SIGNATURE, "skyrl", RELEASE)
    expect(correct, ["old_log_probs", "rollout_logprobs", "loss_mask", "off_policy_correction"], "skyrl", RELEASE)
    names = [f"gk_{mode}" for mode in _CONFIGS]
    for mode, name in zip(_CONFIGS, names, strict=True):
        utils.PolicyLossRegistry.register(name, _policy_loss(mode, correct))
    return names
