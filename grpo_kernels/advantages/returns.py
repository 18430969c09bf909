"""Advantages from the rewards that follow a token: GAE, REINFORCE++, ReMax."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from ..inputs.check import check_number, check_tensor, check_unused
from ..inputs.layout import Layout, acc_dtype, active_tokens, layout_of
from ..ops import advantages as ops
from .critic import check_whitening, whitened_grid
from .group import group_advantages


class TokenAdvantages(NamedTuple):
    """Per token, of the caller's shape; both 0 at masked tokens."""

    advantages: Tensor
    returns: Tensor


class Tokens(NamedTuple):
    """The arguments that every function here has, at [B, T]."""

    layout: Layout
    active: Tensor
    dtype: torch.dtype
    backend: str

    def per_token(self, values: Tensor, name: str) -> Tensor:
        x = self.layout.tokens(values, name, self.dtype)
        assert x is not None
        return x

    def returns(self, rewards: Tensor, gamma: float) -> Tensor:
        """Discounted sums of [B, T] rewards over the active tokens from each on."""
        return ops.gae(rewards, None, self.active, self.layout.cu_seqlens, gamma, 1.0, self.backend)[0]

    def rewards(self, rewards: Tensor) -> Tensor:
        """[B, T]; one reward per sequence is put on its last active token."""
        check_tensor("rewards", rewards, device=self.layout.device)
        if rewards.shape == self.layout.shape:
            return self.per_token(rewards, "rewards")
        spread = self.layout.tokens_or_sequences(rewards, "rewards", self.dtype)
        assert spread is not None
        remaining = self.returns(spread.new_ones(spread.shape), 1.0)
        return torch.where(remaining == 1, spread, 0.0)

    def output(self, advantages: Tensor, returns: Tensor) -> TokenAdvantages:
        return TokenAdvantages(*(x.to(self.dtype).view(self.layout.shape) for x in (advantages, returns)))


def tokens_of(
    like: Tensor, name: str, mask: Tensor | None, cu_seqlens: Tensor | None, backend: str, per_token: bool = True
) -> Tokens:
    """The mask gives the shape where `like` need not be per token: it may have one value per sequence."""
    check_tensor(name, like)
    if mask is not None:
        check_tensor("mask", mask, device=like.device)
    layout = layout_of(like.shape if per_token or mask is None else mask.shape, cu_seqlens, like.device)
    if not layout.knows_sequences:
        raise ValueError(f"flat tokens need cu_seqlens; got {name} of shape {tuple(like.shape)} without")
    active = active_tokens(mask, layout, like.device)
    return Tokens(layout, active, acc_dtype(like.dtype), resolve(backend, like.device, acc_dtype(like.dtype)))


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float,
    lam: float,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> TokenAdvantages:
    """Generalised advantage estimation, ``A_t = r_t + gamma V_next - V_t + gamma lam A_next`` (arXiv:1506.02438): a
    reverse scan of every sequence in one launch, in float64 (on a GPU in the accumulation dtype).

    ``next`` is the following active token of the sequence: masked ones (a tool's output) are passed over, and read
    neither for rewards nor for values. Behind the last one everything is 0. Not whitened: see ``whiten``.

    Args:
        rewards: ``[B, T]``, or ``[N]`` packed; or one per sequence, ``[B]`` or ``[R]``, for its last active token. A
            reward on a masked token is not read: give outcome rewards one per sequence.
        values: per token, of the critic.
        mask: per token, any dtype, 0 masks.
        gamma, lam: in [0, 1]. Factors of a sum, not of the zero rule: 0 times a value that is NaN or infinite is NaN.
        cu_seqlens: ``[R + 1]`` int, the boundaries of packed sequences; on a GPU not checked, see ``policy_loss``.
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        TokenAdvantages(advantages, returns), returns = advantages + values; both 0 at masked tokens. float32, float64
        for float64 values.

    Raises:
        ValueError: for shapes that do not fit, flat tokens without cu_seqlens, or gamma and lam out of range.
    """
    check_number("gamma", gamma, lambda x: 0 <= x <= 1, "in [0, 1]")
    check_number("lam", lam, lambda x: 0 <= x <= 1, "in [0, 1]")
    tokens = tokens_of(values, "values", mask, cu_seqlens, backend)
    outputs = ops.gae(
        tokens.rewards(rewards), tokens.per_token(values, "values"), None if mask is None else tokens.active,
        tokens.layout.cu_seqlens, float(gamma), float(lam), tokens.backend,
    )  # fmt: skip
    return tokens.output(*outputs)


def _minus_kl(tokens: Tokens, rewards: Tensor, kl: Tensor | None, kl_coef: float) -> Tensor:
    if kl is None:
        check_unused("kl_coef", kl_coef, 0.0, "without kl")
        return rewards
    if kl_coef == 0:
        raise ValueError(f"kl needs a kl_coef other than 0; got {kl_coef!r}")
    return rewards - kl_coef * tokens.per_token(kl, "kl")


def _whitened(tokens: Tokens, values: Tensor, group: Any, **options: Any) -> TokenAdvantages:
    check_whitening(**options)
    return tokens.output(whitened_grid(values, tokens.active, tokens.backend, group, **options), values)


def reinforce_plus_plus(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    ddof: int = 1,
    eps: float = 1e-8,
    eps_mode: str = "variance",
    cu_seqlens: Tensor | None = None,
    dp_group: Any = None,
    backend: str = "auto",
) -> TokenAdvantages:
    """REINFORCE++ (arXiv:2501.03262): discounted returns ``G_t = r_t + gamma G_next``, whitened over all tokens.

    Masked tokens are passed over as in ``gae``. The defaults are verl's; OpenRLHF: ``ddof=0, eps_mode="floor"``.

    Args:
        rewards: ``[B, T]``, or ``[N]`` packed; or one per sequence (then ``mask`` gives the tokens), for its last
            active one. A reward on a masked token is not read: give outcome rewards one per sequence.
        mask: per token, any dtype, 0 masks.
        gamma: in [0, 1].
        kl: per token, e.g. a log-ratio to the reference: ``kl_coef * kl`` is taken off each token's reward.
        ddof, eps, eps_mode, dp_group: of the whitening, as in ``whiten``.
        cu_seqlens: ``[R + 1]`` int, the boundaries of packed sequences.

    Returns:
        TokenAdvantages(advantages, returns): the whitened returns and the returns.

    Raises:
        ValueError: for shapes that do not fit, and for one of kl and kl_coef without the other.
    """
    check_number("gamma", gamma, lambda x: 0 <= x <= 1, "in [0, 1]")
    tokens = tokens_of(rewards, "rewards", mask, cu_seqlens, backend, per_token=False)
    shaped = _minus_kl(tokens, tokens.rewards(rewards), kl, kl_coef)
    return _whitened(tokens, tokens.returns(shaped, float(gamma)), dp_group, ddof=ddof, eps=eps, eps_mode=eps_mode)


def reinforce_plus_plus_baseline(
    rewards: Tensor,
    mask: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    single: str = "zero",
    valid: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    ddof: int = 1,
    eps: float = 1e-8,
    eps_mode: str = "variance",
    cu_seqlens: Tensor | None = None,
    dp_group: Any = None,
    backend: str = "auto",
) -> TokenAdvantages:
    """REINFORCE++-baseline (arXiv:2501.03262): ``R - mean of the group [- kl_coef kl_t]`` at every token, whitened.

    verl: ``single="raw"``; OpenRLHF's reinforce_baseline and NeMo-RL: ``ddof=0, eps_mode="floor"``.

    Args:
        rewards: ``[S]``, one per sequence; NaN as in ``group_advantages``, as are group_size, group_ids, single, valid.
        mask: ``[S, T]``, or ``[N]`` packed with cu_seqlens; any dtype, 0 masks.
        kl, kl_coef, ddof, eps, eps_mode, cu_seqlens, dp_group: as in ``reinforce_plus_plus``.

    Returns:
        TokenAdvantages(advantages, returns): whitened, and before that. A sequence without a reward counts with 0.

    Raises:
        ValueError: as ``group_advantages`` and ``reinforce_plus_plus``.
    """
    tokens = tokens_of(rewards, "rewards", mask, cu_seqlens, backend, per_token=False)
    centred = group_advantages(
        rewards, group_size=group_size, group_ids=group_ids, scale="none", single=single, valid=valid,
        dp_group=dp_group, backend=backend,
    ).advantages  # fmt: skip
    if centred.shape != (tokens.layout.sequences,):
        raise ValueError(f"rewards must be one per sequence, {(tokens.layout.sequences,)}; got {tuple(rewards.shape)}")
    shaped = _minus_kl(tokens, tokens.layout.of_sequences(centred), kl, kl_coef)
    shaped = torch.where(tokens.active, shaped, 0.0)
    return _whitened(tokens, shaped, dp_group, ddof=ddof, eps=eps, eps_mode=eps_mode)


def remax(
    rewards: Tensor,
    baselines: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> TokenAdvantages:
    """ReMax (arXiv:2310.10505): the return from each token on, minus the reward of the greedy response.

    Args:
        rewards: ``[B, T]``, or ``[N]`` packed; or one per sequence (then ``mask`` gives the tokens), for its last
            active one. A reward on a masked token is not read: give outcome rewards one per sequence.
        baselines: ``[B]`` (packed: ``[R]``), the greedy responses' rewards.
        mask: per token, any dtype, 0 masks.
        cu_seqlens: ``[R + 1]`` int, the boundaries of packed sequences.

    Returns:
        TokenAdvantages(advantages, returns), 0 at masked tokens.

    Raises:
        ValueError: for shapes that do not fit.
    """
    tokens = tokens_of(rewards, "rewards", mask, cu_seqlens, backend, per_token=False)
    check_tensor("baselines", baselines, device=rewards.device, shape=(tokens.layout.sequences,))
    returns = tokens.returns(tokens.rewards(rewards), 1.0)
    spread = tokens.layout.of_sequences(baselines.detach().to(tokens.dtype))
    return tokens.output(torch.where(tokens.active, returns - spread, 0.0), returns)
