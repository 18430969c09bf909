"""verl's policy losses and log-prob functions on these kernels: `register` and `patch`.

``register()`` adds our policy losses to verl's registry as ``gk_vanilla``, ``gk_gspo`` and so on, to be chosen with
``actor.policy_loss.loss_mode``; ``patch()`` replaces ``logprobs_from_logits`` and the two fused heads. A Ray worker
does the former by itself where ``VERL_USE_EXTERNAL_MODULES=grpo_kernels.integrations.verl`` is set.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import LossConfig, Metrics, linear_token_logps, policy_loss, token_logps
from ._checks import expect, require
from .counts import StepCounts

RELEASE = "0.9.1"  # what this was written for and is tested with
core_algos: Any = require("verl.trainer.ppo.core_algos", "verl", RELEASE)

__all__ = ["VerlPatch", "patch", "register"]

# ---- policy losses ----

_AGGREGATION = {
    "token-mean": "token_mean", "token-sum": "token_sum", "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum", "seq-mean-token-sum-norm": "fixed_length",
}  # fmt: skip
_SIGNATURE = [
    "old_log_prob",
    "log_prob",
    "advantages",
    "response_mask",
    "loss_agg_mode",
    "config",
    "rollout_is_weights",
]


def _eps(c: Any) -> tuple[float, float]:
    low = c.clip_ratio_low if c.clip_ratio_low is not None else c.clip_ratio
    return low, c.clip_ratio_high if c.clip_ratio_high is not None else c.clip_ratio


def _bounds(c: Any) -> dict[str, Any]:
    return dict(zip(("eps_low", "eps_high"), _eps(c), strict=True))


# What each loss reads of ActorConfig, in our names.
_OPTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
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
# The metrics of the losses that do not log all three.
_METRICS: dict[str, tuple[str, ...]] = {
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
    fields: dict[str, Any] = {"aggregation": _AGGREGATION[agg]}
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
    mode: str, m: Metrics, log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, adv: Tensor, options: dict[str, Any]
) -> dict[str, float]:
    """What verl logs, by its own definitions; where ours differ it is computed here."""
    x, on = (log_prob - old_log_prob).detach(), mask.bool()

    def mean(v: Tensor) -> Tensor:
        return torch.where(on, v, 0.0).sum() / on.sum().clamp(min=1)

    found = {"pg_clipfrac": m["clip_region"], "ppo_kl": m["approx_kl"], "pg_clipfrac_lower": m["clip_cap"]}
    if mode in ("gspo", "sapo", "cispo"):
        found["pg_clipfrac_lower"] = torch.zeros_like(m["clip_cap"])
    if mode == "sapo":
        found["pg_clipfrac"] = torch.zeros_like(m["clip_cap"])
    elif mode == "cispo":
        found["pg_clipfrac"] = m["clip_region"] + m["clip_cap"]
    elif mode == "clip_cov":
        found["pg_clipfrac"] = m["clip_cap"]
    elif mode == "geo_mean":
        outside = (x < -options["eps_low"]) | (x > options["eps_high"])  # on either side, whatever the sign of A
        found["pg_clipfrac"], found["pg_clipfrac_lower"] = (mean((outside & (s > 0)).float()) for s in (adv, -adv))
    if mode == "kl_cov":
        found["ppo_kl"] = mean(x.abs())
    elif mode in ("vanilla", "cispo", "sapo", "dppo_tv", "dppo_kl"):
        found["ppo_kl"] = mean(-x.clamp(-20, 20))  # clamped there whether the loss's own ratio is or not
    names = _METRICS.get(mode, tuple(found))
    values = torch.stack([found[n] for n in names]).tolist() if names else []  # verl wants numbers: one wait, not three
    return {f"actor/{n}": v for n, v in zip(names, values, strict=True)}


def _policy_loss(mode: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    def compute(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        fields, arguments = _reduction(mode, loss_agg_mode, config, response_mask)
        options = _OPTIONS[mode](config)
        out = policy_loss(
            log_prob, advantages, response_mask, old_logps=old_log_prob, token_weights=rollout_is_weights,
            config=_config(f"verl_{mode}", tuple({**fields, **options}.items())), **arguments,
        )  # fmt: skip
        return out.loss, _metrics(mode, out.metrics, log_prob, old_log_prob, response_mask, advantages, options)

    compute.__name__ = f"grpo_kernels_{mode}"
    return compute


def register(override: bool = False) -> list[str]:
    """Adds every policy loss of verl's that is a function of log-probs to verl's registry, computed by ``policy_loss``.

    Each logs verl's metrics under verl's names. ``clip_cov`` picks its tokens at random, others than verl's.

    Args:
        override: under verl's own names (``vanilla``, ...) and not ``gk_vanilla``, ..., so that no config changes.

    Returns:
        The names.

    Raises:
        RuntimeError: if verl calls its policy losses with other arguments than in the release that we know.
    """
    names = []
    for mode in _OPTIONS:
        native = core_algos.POLICY_LOSS_REGISTRY[mode]
        if not native.__name__.startswith("grpo_kernels_"):
            expect(native, _SIGNATURE, "verl", RELEASE)
        names.append(mode if override else f"gk_{mode}")
        core_algos.register_policy_loss(names[-1])(_policy_loss(mode))
    return names


# ---- log-probs ----


class VerlPatch:
    """What `patch` returns: call it, or leave its ``with`` block, to undo the patch.

    Attributes:
        step_counts: how many times log-probs were computed that need a gradient (all in two sweeps).
    """

    def __init__(self) -> None:
        self.step_counts = StepCounts()
        self._functions: list[tuple[str, Any, Any]] = []  # name, verl's, ours
        ours = {"logprobs_from_logits": self._logprobs_from_logits, "FusedLinearForPPO": self._fused_linear()}
        ours["linear_cross_entropy"] = self._linear_cross_entropy
        for name, (module, checked, parameters) in _REPLACED.items():
            where = importlib.import_module(module)
            function: Any = functools.reduce(getattr, checked.split("."), where)
            expect(function, parameters, "verl", RELEASE)
            self._functions.append((name, getattr(where, name), ours[name]))
        for name, native, replacement in self._functions:
            _swap(name, native, replacement)

    def _count(self, found: Tensor) -> None:
        self.step_counts.two_sweeps += found.requires_grad

    def _logprobs_from_logits(self, logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        logps = token_logps(logits, labels, inplace_backward=inplace_backward and not logits.is_leaf).logps
        self._count(logps)
        return logps

    def _linear_cross_entropy(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float | Tensor = 1.0,
        reduction: str = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if reduction.lower() != "none":
            raise ValueError(f"reduction must be 'none'; got {reduction!r}")
        found = linear_token_logps(
            hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature,
            return_entropy=True, tp_group=dist_process_group,
        )  # fmt: skip
        assert found.entropy is not None
        self._count(found.logps)
        return found.logps, found.entropy

    def _fused_linear(patch: VerlPatch) -> type:  # `self` is the module's, below
        class FusedLinearForPPO(torch.nn.Module):
            """verl's module of this name, whose arguments it takes; a chunk's size is chosen for each call."""

            def __init__(self, chunk_size: int | None = None, impl_backend: str = "grpo_kernels") -> None:
                super().__init__()

            def forward(
                self,
                hidden_states: Tensor,
                vocab_weights: Tensor,
                input_ids: Tensor,
                temperature: float | Tensor = 1.0,
            ) -> tuple[Tensor, Tensor]:
                found = linear_token_logps(
                    hidden_states, vocab_weights, input_ids, temperature=temperature, return_entropy=True
                )
                assert found.entropy is not None
                patch._count(found.logps)
                return found.logps, found.entropy.to(hidden_states.dtype)

        return FusedLinearForPPO

    def undo(self) -> None:
        """verl as it was, in modules too that were imported meanwhile. Undoing twice does nothing."""
        for name, native, replacement in self._functions:
            _swap(name, replacement, native)

    def __call__(self) -> None:
        self.undo()

    def __enter__(self) -> VerlPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


# Name -> where it is defined, what of it has the signature, and the signature.
_REPLACED = {
    "logprobs_from_logits": (
        "verl.utils.torch_functional", "logprobs_from_logits", ["logits", "labels", "inplace_backward"]
    ),
    "FusedLinearForPPO": (
        "verl.utils.experimental.torch_functional", "FusedLinearForPPO.forward",
        ["self", "hidden_states", "vocab_weights", "input_ids", "temperature"],
    ),
    "linear_cross_entropy": (
        "verl.utils.kernel.linear_cross_entropy", "LinearCrossEntropy.forward",
        ["ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"],
    ),
}  # fmt: skip


def _swap(name: str, old: Any, new: Any) -> None:
    """Wherever one of verl's modules has it under its name: where it is defined, and where it was imported."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("verl.") and module.__dict__.get(name) == old:
            setattr(module, name, new)


def patch() -> VerlPatch:
    """Makes verl's workers take log-probs and entropy from ``token_logps`` and ``linear_token_logps``.

    Replaces ``logprobs_from_logits``, ``FusedLinearForPPO`` and ``linear_cross_entropy`` in every module of verl's.
    Other than verl's the fused heads take a temperature per token or sequence. Log-probs are float32.

    Returns:
        VerlPatch: call it to undo the patch, or use it as a context manager.

    Raises:
        RuntimeError: if verl's functions do not have the signatures of the release that we know.
    """
    return VerlPatch()


if __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
    register()
