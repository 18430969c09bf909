"""Baselines that differ from token to token within a group."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs.check import check_tensor
from ..inputs.grouping import Groups, groups_of
from .returns import TokenAdvantages, tokens_of


def optimal_token_baseline(
    rewards: Tensor,
    logps: Tensor,
    sum_p2: Tensor,
    mask: Tensor | None = None,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    multi_turn: bool = False,
    zero_tail: bool = True,
    eps: float = 1e-8,
    backend: str = "auto",
) -> TokenAdvantages:
    """A baseline for each position of a group, ``A_t = G_t - B_t``, ``B_t = sum_i G_it W_it / (sum_i W_it + eps)``.

    ``W_t = sum_{j <= t} (1 - 2 p_j + sum p^2)`` is the gradient energy so far (verl's ``optimal_token_baseline``).

    Args:
        rewards: ``[S, T]``; or ``[S]``, for each sequence's last active token. A reward on a masked token is not read:
            give outcome rewards one per sequence.
        logps, sum_p2: ``[S, T]`` of the policy that sampled, from ``token_logps(..., return_sum_p2=True)``.
        mask: ``[S, T]``, any dtype, 0 masks.
        group_size, group_ids: as in ``group_advantages``. A group of one has no baseline.
        token_weights: ``[S, T]``, importance weights; the energy is multiplied by their squares.
        multi_turn: positions count active tokens only, so that tool outputs do not shift the sequences against each
            other (verl's ``tir_optimal_token_baseline``), and a sequence without tokens does not count in its group.
            Otherwise it counts, as in verl, where it is decided whether the group has more than one sequence.
        zero_tail: no baseline where the group's longest sequence goes on alone.

    Returns:
        TokenAdvantages(advantages, returns), 0 at masked tokens.

    Raises:
        ValueError: for shapes that do not fit; packed tokens, which do not line up.
    """
    check_tensor("logps", logps, kind="float")
    if logps.dim() != 2:
        raise ValueError(f"logps must be padded, [S, T]; got shape {tuple(logps.shape)}")
    tokens = tokens_of(logps, "logps", mask, None, backend)
    active = tokens.active
    groups = groups_of(len(logps), group_size, group_ids, logps.device)
    returns = tokens.returns(tokens.rewards(rewards), 1.0)
    energy = 1 - 2 * tokens.per_token(logps, "logps").double().exp() + tokens.per_token(sum_p2, "sum_p2").double()
    if token_weights is not None:
        energy = energy * tokens.per_token(token_weights, "token_weights").double().square()
    energy = torch.where(active, energy, 0.0).cumsum(-1)
    baseline = _position_baseline(groups, returns.double(), energy, active, multi_turn, zero_tail, eps)
    return tokens.output(torch.where(active, returns - baseline, 0.0), returns)


def _position_baseline(
    groups: Groups, returns: Tensor, energy: Tensor, active: Tensor, multi_turn: bool, zero_tail: bool, eps: float
) -> Tensor:
    """sum(G W) / (sum(W) + eps) over the group at each position, [S, T]."""
    position = (active.cumsum(-1) - 1).clamp(min=0)  # of an active token among the active

    def aligned(x: Tensor) -> Tensor:
        x = torch.where(active, x, 0.0)
        return torch.zeros_like(x).scatter_add(1, position, x) if multi_turn else x

    baseline = groups.sums(aligned(returns * energy)) / (groups.sums(aligned(energy)) + eps)
    lengths = active.sum(-1).double()
    counted = lengths > 0 if multi_turn else torch.ones_like(lengths, dtype=torch.bool)
    baseline = torch.where(groups.sums(counted.double())[:, None] > 1, baseline, 0.0)
    if zero_tail:
        longest, _, second = groups.best_two(lengths)
        columns = torch.arange(active.shape[1], device=active.device)
        baseline = torch.where(longest[:, None] & (columns >= second[:, None]), 0.0, baseline)
    return baseline.gather(1, position) if multi_turn else baseline
