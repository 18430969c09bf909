"""AReaL's loss and log-prob functions on these kernels. Nothing of AReaL is imported."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import LossConfig, policy_loss, token_details, token_logps

__all__ = ["gather_logprobs", "gather_logprobs_entropy", "ppo_actor_loss_fn"]

RELEASE = "1.0.4"  # whose arguments and results these are


def ppo_actor_loss_fn(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    eps_clip: float,
    loss_mask: Tensor,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    rejection_sampling: Any = None,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """In the place of ``areal.utils.functional.ppo_actor_loss_fn`` (1.0.4).

    Args:
        logprobs, proximal_logprobs, old_logprobs, advantages, loss_mask: ``[B, T]``, or ``[N]`` packed; the ratio is
            taken against ``proximal_logprobs``. Nothing is read of masked tokens.
        eps_clip, eps_clip_higher, c_clip: the clip range, its upper side, the dual clip above 1.
        rejection_sampling: must be None: what AReaL's ``apply_rejection_sampling`` does, ``rollout_correction`` does
            before ``policy_loss``.
        importance_sampling_level: ``"token"``, or ``"sequence"`` (GSPO, with each sequence's mean advantage).
        cu_seqlens: ``[R + 1]``, needed by ``"sequence"`` over packed tokens.

    Returns:
        The mean over tokens; and per token, as ``stats_tracker`` takes them: loss, importance_weight, approx_kl,
        clip_mask, dual_clip_mask.

    Raises:
        ValueError: for ``rejection_sampling``, and another level.
    """
    if rejection_sampling is not None:
        raise ValueError("rejection_sampling is not supported here; correct with grpo_kernels.rollout_correction")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence'; got {importance_sampling_level!r}")
    active, by_sequence = loss_mask.bool(), importance_sampling_level == "sequence"
    if by_sequence:
        advantages = _sequence_means(advantages.detach(), active, cu_seqlens)
    config = LossConfig(
        eps_low=eps_clip, eps_high=eps_clip_higher, dual_clip=c_clip, ratio_level=importance_sampling_level
    )
    arguments = dict(
        old_logps=proximal_logprobs.detach(), config=config, cu_seqlens=cu_seqlens if by_sequence else None
    )
    out = policy_loss(logprobs, advantages, active, **arguments)  # type: ignore[arg-type]
    details = token_details(logprobs, advantages, active, **arguments)  # type: ignore[arg-type]
    return out.loss, {
        "loss": out.per_token_loss,
        "importance_weight": torch.where(active, details.ratio, 0.0),
        "approx_kl": (logprobs - proximal_logprobs).detach(),
        "clip_mask": details.clip_low | details.clip_high,
        "dual_clip_mask": details.clip_cap,
    }


def _sequence_means(x: Tensor, active: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each sequence's mean over active tokens, at each of its tokens."""
    x = torch.where(active, x, 0.0)
    if x.dim() == 2:
        return (x.sum(-1) / active.sum(-1).clamp(min=1))[:, None].expand_as(x)
    if cu_seqlens is None:
        raise ValueError("importance_sampling_level='sequence' over packed tokens needs cu_seqlens; got None")
    index = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(len(x), device=x.device), right=True)
    index = index.clamp(max=max(len(cu_seqlens) - 2, 0))
    sums, counts = (x.new_zeros(len(cu_seqlens)).index_add(0, index, v.to(x.dtype)) for v in (x, active))
    return (sums / counts.clamp(min=1))[index]


def gather_logprobs(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    tp_group: Any = None,
    chunk_size: int = 1024,
) -> Tensor:
    """In the place of ``areal.utils.functional.gather_logprobs`` (1.0.4): ``token_logps``, in one launch.

    Args:
        logits, labels: ``[..., V]`` and ``[...]``.
        temperature: divides the logits.
        tp_group: a group of more than one rank raises NotImplementedError: gather the vocabulary.
        chunk_size: not needed, as nothing is materialised.

    Returns:
        ``[...]``, float32 (float64 for float64 logits).
    """
    return token_logps(logits, labels, temperature=temperature, tp_group=_several(tp_group)).logps


def gather_logprobs_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    tp_group: Any = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """``gather_logprobs``, and the entropy in nats, in the same launch."""
    found = token_logps(logits, labels, temperature=temperature, return_entropy=True, tp_group=_several(tp_group))
    assert found.entropy is not None
    return found.logps, found.entropy


def _several(group: Any) -> Any:
    return None if group is None or dist.get_world_size(group) == 1 else group
