"""verl 0.9.1 on grpo_kernels: its registered policy losses and its log-prob functions.

``register()`` adds policy losses ``gk_vanilla``, ``gk_gspo``, ... (``override=True``: under verl's own names), chosen
with ``actor.policy_loss.loss_mode``. ``patch()`` replaces ``logprobs_from_logits`` and the two fused linear heads.
Workers import it through ``VERL_USE_EXTERNAL_MODULES=grpo_kernels.integrations.verl``.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo import core_algos

from .. import LossConfig, linear_token_logps, policy_loss, token_logps
from ._checks import expect

AGGREGATION = {
    "token-mean": "token_mean", "token-sum": "token_sum", "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum", "seq-mean-token-sum-norm": "fixed_length",
}  # fmt: skip
SIGNATURE = ["old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights"]


def _eps(c: Any) -> tuple[float, float]:
    low = c.clip_ratio_low if c.clip_ratio_low is not None else c.clip_ratio
    return low, c.clip_ratio_high if c.clip_ratio_high is not None else c.clip_ratio


def _bounds(c: Any) -> dict[str, Any]:
    return dict(zip(("eps_low", "eps_high"), _eps(c), strict=True))


# What each loss reads of ActorConfig, in our names.
OPTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vanilla": lambda c: {**_bounds(c), "dual_clip": c.get("clip_ratio_c", 3.0)},
    "gspo": _bounds,
    "geo_mean": _bounds,
    "cispo": lambda c: {"cispo_low": 1 - _eps(c)[0], "cispo_high": 1 + _eps(c)[1]},
    "sapo": lambda c: {"sapo_tau_pos": c.tau_pos, "sapo_tau_neg": c.tau_neg},
    "gpg": lambda c: {},
    "dppo_tv": lambda c: {**_bounds(c), "ratio_cap": c.get("clip_ratio_c", 20.0)},
    "dppo_kl": lambda c: {**_bounds(c), "ratio_cap": c.get("clip_ratio_c", 20.0)},
    "dro": lambda c: {"dro_beta": c.policy_loss.dro_beta},
    "clip_cov": lambda c: {
        **_bounds(c), "cov_ratio": c.policy_loss.clip_cov_ratio,
        "cov_low": c.policy_loss.clip_cov_lb, "cov_high": c.policy_loss.clip_cov_ub,
    },
    "kl_cov": lambda c: {"cov_ratio": c.policy_loss.kl_cov_ratio, "cov_kl": c.policy_loss.ppo_kl_coef},
}  # fmt: skip
# verl's metric names; by the documentation's table
METRICS: dict[str, tuple[str, ...]] = {
    "gpg": (), "dro": ("ppo_kl",), "kl_cov": ("ppo_kl",), "clip_cov": ("pg_clipfrac", "ppo_kl"),
}  # fmt: skip


@functools.lru_cache(64)
def _config(preset: str, changes: tuple[tuple[str, Any], ...]) -> LossConfig:
    return LossConfig.preset(preset, **dict(changes))


def _reduction(mode: str, agg: str, config: Any, mask: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the config and arguments of the loss for agg_loss(**config.global_batch_info)."""
    info = config.global_batch_info
    if mode == "geo_mean":
        return {}, {}
    if mode == "sapo":
        agg = "seq-mean-token-mean"
    dp = info.get("dp_size") or 1
    fields: dict[str, Any] = {"aggregation": AGGREGATION[agg]}
    args: dict[str, Any] = {}
    if agg == "token-mean":
        args["denominator"] = info.get("batch_num_tokens")
    elif agg != "token-sum":
        args["denominator"] = info.get("global_batch_size")
    if args.get("denominator", 0) is None and dp > 1:
        raise ValueError(f"loss_agg_mode={agg!r} with dp_size={dp} needs batch_num_tokens or global_batch_size")
    if agg == "seq-mean-token-sum-norm":
        length = info.get("loss_scale_factor") or mask.shape[-1]
        fields["max_length"] = int(length)
        if args["denominator"] is not None:
            args["denominator"] = args["denominator"] * length
    return fields, {**args, "scale": dp}


def _metrics(
    mode: str,
    m: dict[str, Tensor],
    log_prob: Tensor,
    old_log_prob: Tensor,
    response_mask: Tensor,
    adv: Tensor,
    bounds: dict[str, Any],
) -> dict[str, Any]:
    zero = m["tokens"].new_zeros(())
    region = m["clip_region"]
    x, on = (log_prob - old_log_prob).detach(), response_mask.bool()

    def mean(v: Tensor) -> Tensor:
        return torch.where(on, v, 0.0).sum() / on.sum().clamp(min=1)

    if mode == "cispo":
        region = region + m["clip_cap"]
    found = {
        "pg_clipfrac": m["clip_cap"] if mode == "clip_cov" else region,
        "ppo_kl": m["approx_kl"],
        "pg_clipfrac_lower": m["clip_cap"],
    }
    if mode in ("gspo", "sapo", "cispo"):
        found["pg_clipfrac_lower"] = zero
    if mode == "sapo":
        found["pg_clipfrac"] = zero
    if mode == "geo_mean":
        outside = (x < -bounds["eps_low"]) | (x > bounds["eps_high"])  # on either side, whatever the sign of A
        found["pg_clipfrac"], found["pg_clipfrac_lower"] = (mean((outside & (s > 0)).float()) for s in (adv, -adv))
    if mode == "kl_cov":
        found["ppo_kl"] = mean(x.abs())
    elif mode in ("vanilla", "cispo", "sapo", "dppo_tv", "dppo_kl"):
        found["ppo_kl"] = mean(-x.clamp(-20, 20))  # ours is not clamped
    names = METRICS.get(mode, ("pg_clipfrac", "ppo_kl", "pg_clipfrac_lower"))
    values = torch.stack([found[n] for n in names]).tolist() if names else []  # verl wants numbers: one wait, not three
    return {f"actor/{n}": v for n, v in zip(names, values, strict=True)}


def make(mode: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    def compute(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        fields, args = _reduction(mode, loss_agg_mode, config, response_mask)
        loss_config = _config(f"verl_{mode}", tuple({**fields, **OPTIONS[mode](config)}.items()))
        out = policy_loss(
            log_prob,
            advantages,
            response_mask,
            old_logps=old_log_prob,
            token_weights=rollout_is_weights,
            config=loss_config,
            **args,
        )
        return out.loss, _metrics(
            mode, out.metrics, log_prob, old_log_prob, response_mask, advantages, OPTIONS[mode](config)
        )

    compute.__name__ = f"grpo_kernels_{mode}"
    return compute


def register(override: bool = False) -> list[str]:
    """Every loss, after a check that verl still calls them as we are called."""
    names = []
    for mode in OPTIONS:
        native = core_algos.POLICY_LOSS_REGISTRY[mode]
        expect(native, SIGNATURE, "verl", "0.9.1")
        names.append(mode if override else f"gk_{mode}")
        core_algos.register_policy_loss(names[-1])(make(mode))
    return names


# ---- log-probs ----


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    return token_logps(logits, labels, inplace_backward=inplace_backward and not logits.is_leaf).logps


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    if reduction.lower() != "none":
        raise ValueError(f"reduction must be 'none'; got {reduction!r}")
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    found = linear_token_logps(
        hidden, weight, labels, temperature=temperature, return_entropy=True, tp_group=dist_process_group
    )
    assert found.entropy is not None
    return found.logps, found.entropy


class FusedLinearForPPO(torch.nn.Module):
    def __init__(self, chunk_size: int | None = None, impl_backend: str = "grpo_kernels") -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        found = linear_token_logps(
            hidden_states, vocab_weights, input_ids, temperature=temperature, return_entropy=True
        )
        assert found.entropy is not None
        return found.logps, found.entropy.to(hidden_states.dtype)


REPLACED = {
    ("verl.utils.torch_functional", "logprobs_from_logits"): logprobs_from_logits,
    ("verl.utils.experimental.torch_functional", "FusedLinearForPPO"): FusedLinearForPPO,
    ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"): linear_cross_entropy,
}


def patch() -> Callable[[], None]:
    """Replaces them where they are defined and where a loaded module has imported them by name; returns the undo."""
    undo = []
    for (module, name), ours in REPLACED.items():
        native = getattr(importlib.import_module(module), name)
        for other in list(sys.modules.values()):
            if getattr(other, "__name__", "").startswith("verl") and other.__dict__.get(name) is native:
                undo.append((other, name, native))
                setattr(other, name, ours)

    def restore() -> None:
        for module, name, native in undo:
            setattr(module, name, native)

    return restore
