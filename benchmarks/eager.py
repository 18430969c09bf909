"""What a trainer author writes in plain PyTorch, written well: float32 log-softmax, everything else per token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .batch import Tokens

EPS = 0.2


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[..., None])[..., 0]


def token_logps_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logps = torch.log_softmax(logits, -1, dtype=torch.float32)
    return logps.gather(-1, targets[..., None])[..., 0], -(logps.exp() * logps).sum(-1)


def grpo_loss(logits: Tensor, tokens: Tokens, kl_coef: float, entropy_coef: float, level: str) -> Tensor:
    """Token level: mean over the tokens. Sequence level (GSPO): mean over the sequences."""
    mask = tokens.mask.to(torch.float32)
    if entropy_coef:
        logps, entropy = token_logps_and_entropy(logits, tokens.targets)
    else:
        logps, entropy = token_logps(logits, tokens.targets), None
    log_ratio = logps - tokens.old_logps
    lengths = mask.sum(-1, keepdim=True)
    if level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / lengths
    ratio, advantages = log_ratio.exp(), tokens.advantages[:, None]
    terms = -torch.min(ratio * advantages, ratio.clamp(1 - EPS, 1 + EPS) * advantages)
    if kl_coef:
        u = tokens.ref_logps - logps
        terms = terms + kl_coef * (u.exp() - u - 1)
    if entropy is not None:
        terms = terms - entropy_coef * entropy
    if level == "sequence":
        return (terms * mask / lengths).sum(-1).mean()
    return (terms * mask).sum() / mask.sum()


def linear_grpo_loss(
    hidden: Tensor, weight: Tensor, tokens: Tokens, kl_coef: float, entropy_coef: float, level: str
) -> Tensor:
    return grpo_loss(hidden @ weight.t(), tokens, kl_coef, entropy_coef, level)


def advantages_by_loop(rewards: Tensor, ids: Sequence[Hashable], eps: float = 1e-6) -> Tensor:
    """verl's compute_grpo_outcome_advantage: a dict of lists, one tensor a sample."""
    members, mean, std = defaultdict(list), {}, {}
    scores = rewards.clone()
    for i, group in enumerate(ids):
        members[group].append(scores[i])
    for group, values in members.items():
        stacked = torch.stack(values)
        mean[group], std[group] = stacked.mean(), stacked.std()
    for i, group in enumerate(ids):
        scores[i] = (scores[i] - mean[group]) / (std[group] + eps)
    return scores


def advantages_vectorised(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    groups = rewards.view(-1, group_size)
    return ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + eps)).view(-1)


def gae_by_loop(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """verl's compute_gae_advantage_return, not whitened: a loop over time, vectorised over the batch."""
    next_value, running, advantages = torch.zeros(()), torch.zeros(()), []
    for t in reversed(range(rewards.shape[1])):
        on = mask[:, t]
        running = torch.where(on, rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * running, running)
        next_value = torch.where(on, values[:, t], next_value)
        advantages.append(running)
    stacked = torch.stack(advantages[::-1], 1) * mask
    return stacked, stacked + values * mask


def diversity_by_sets(ids: Tensor, group_size: int, ngram: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Near-duplicates group by group: every completion's set of n-grams against those kept before it."""
    keep, similarity, leaders = [], [], []
    kept: list[tuple[int, set]] = []
    for i, tokens in enumerate(ids.tolist()):
        if i % group_size == 0:
            kept = []
        mine = set(zip(*(tokens[k:] for k in range(ngram)), strict=False))
        best, leader = max(((_jaccard(mine, other), -j) for j, other in kept), default=(0.0, -i))
        keep.append(not kept or best < threshold)
        similarity.append(best)
        if keep[-1]:
            kept.append((i, mine))
        leaders.append(i if keep[-1] else -leader)
    return torch.tensor(keep), torch.tensor(similarity), _cluster_weights(torch.tensor(leaders))


def _jaccard(a: set, b: set) -> float:
    both = len(a & b)
    return both / (len(a) + len(b) - both)


def _cluster_weights(leaders: Tensor) -> Tensor:
    return 1 / torch.bincount(leaders, minlength=len(leaders))[leaders].to(torch.float32)


def diversity_by_matrices(ids: Tensor, vocab: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Near-duplicates of one group, by token sets: all pairs at once in float32, then one at a time."""
    member = torch.zeros(len(ids), vocab).scatter_(1, ids, 1.0)
    both, size = member @ member.T, member.sum(1)
    jaccard = both.double() / (size[:, None] + size - both).double()
    keep, leaders = torch.zeros(len(ids), dtype=torch.bool), torch.arange(len(ids))
    similarity = torch.zeros(len(ids))
    for i in range(len(ids)):
        best, leader = torch.where(keep, jaccard[i], -1.0).max(0)
        keep[i] = best < threshold
        leaders[i] = i if keep[i] else leader
        similarity[i] = best.clamp(min=0)
    return keep, similarity, _cluster_weights(leaders)
