"""OpenRLHF's ``PolicyLoss`` on these kernels. Nothing of OpenRLHF is imported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import CorrectionConfig, LossConfig, RejectionFilter, policy_loss, rollout_correction

__all__ = ["PolicyLoss"]

RELEASE = "0.11.2"  # whose arguments and results these are


class PolicyLoss(torch.nn.Module):
    """In the place of ``openrlhf.models.loss.PolicyLoss`` (0.11.2): assign it to ``ActorPPOTrainer.actor_loss_fn``.

    Arguments, results and metrics are OpenRLHF's; a masked token is never read, NaN included. The KL and entropy terms
    are added by OpenRLHF outside.

    Args:
        clip_eps_low, clip_eps_high, dual_clip: the clip range, and the bound above 1 for negative advantages.
        token_level_loss: mean over tokens; False, and for gspo always: over sequences of their means.
        policy_loss_type: ``"ppo"`` or ``"gspo"``. gspo takes its ratio against the sampler where a correction is on.
        is_correction_level: ``"off"``, ``"token"`` or ``"seq"``, of ppo.
        is_correction_mode: ``"mask"`` drops what lies outside the thresholds and weighs the rest by the ratio old /
            sampler; ``"clip"`` clamps the ratio of tokens.
        is_correction_gating: of what: ``"ratio"`` (of a sequence the geometric mean), ``"binary_kl"``, ``"tv"``.
        is_correction_threshold: low and high; a divergence has a high one alone.

    Raises:
        ValueError: for names that OpenRLHF does not know, and for a clip or a lower threshold of a divergence.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        if policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"policy_loss_type must be 'ppo' or 'gspo'; got {policy_loss_type!r}")
        bounds = dict(eps_low=clip_eps_low, eps_high=clip_eps_high, dual_clip=dual_clip)
        own = (
            {"aggregation": "token_mean" if token_level_loss else "sequence_mean"} if policy_loss_type == "ppo" else {}
        )
        self.config = LossConfig.preset(f"openrlhf_{policy_loss_type}", **bounds, **own)
        self.correction = _correction(
            is_correction_level, is_correction_mode, is_correction_gating, is_correction_threshold
        )
        self._sequences = is_correction_level == "seq"
        self._against_rollout = policy_loss_type == "gspo" and self.correction is not None

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """All log-probs, advantages and mask ``[B, T]``.

        Returns:
            The loss; the shares and means over tokens that OpenRLHF logs, 0-d: clipped tokens, mean of old - current,
            mean of sampler - old, and the share of tokens (``"seq"``: of sequences that have any) that the correction
            drops or clamps; the last two None without a correction.
        """
        by_token = self.config.aggregation == "token_mean"
        denominator = batch_num_tokens if by_token else global_batch_size
        corrects = self.correction is not None and not self._against_rollout
        if self.correction is not None and rollout_log_probs is None:
            raise ValueError("a correction needs rollout_log_probs; got None")
        weights = vllm_kl = filtered = None
        if corrects:  # what k1 is the mean of is sampler - old
            c = rollout_correction(old_log_probs, rollout_log_probs, action_mask, config=self.correction)  # type: ignore[arg-type]
            weights, vllm_kl = c.token_weights, c.metrics["k1"]
            filtered = c.metrics["rejected_rows" if self._sequences else "rejected_tokens"]
            if not self._sequences:
                filtered = filtered + c.metrics["ratio_low"] + c.metrics["ratio_high"]
        out = policy_loss(
            log_probs, advantages, action_mask, token_weights=weights, denominator=denominator,
            old_logps=rollout_log_probs if self._against_rollout else old_log_probs,
            scale=1.0 if denominator is None else float(dp_size), config=self.config,
        )  # fmt: skip
        moved = _mean(old_log_probs.detach() - log_probs.detach(), action_mask)
        return out.loss, out.metrics["clip_region"], moved, vllm_kl, filtered


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean()
    return torch.where(mask != 0, x, 0.0).sum() / (mask != 0).sum()


def _correction(level: str, mode: str, gating: str, threshold: Sequence[float]) -> CorrectionConfig | None:
    for name, value, allowed in (
        ("is_correction_level", level, ("off", "token", "seq")),
        ("is_correction_mode", mode, ("mask", "clip")),
        ("is_correction_gating", gating, ("ratio", "binary_kl", "tv")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    if mode == "clip" and (level == "seq" or gating != "ratio"):
        raise ValueError(
            "is_correction_mode='clip' needs is_correction_level='token' and is_correction_gating='ratio'; "
            f"got {level!r} and {gating!r}"
        )
    if level == "off":
        return None
    low, high = threshold
    if gating != "ratio":
        if low > 0:
            raise ValueError(f"is_correction_gating={gating!r} has an upper threshold only; got {tuple(threshold)}")
        only = RejectionFilter(gating, "mean" if level == "seq" else "token", high=high)
        return CorrectionConfig(weight="ratio", filters=(only,), log_clamp=None)
    if level == "seq":
        return CorrectionConfig(weight="ratio", filters=(RejectionFilter("ratio", "mean", low, high),), log_clamp=None)
    return CorrectionConfig(weight=mode, low=low, high=high, log_clamp=None)
