"""PPO's part that GRPO does not have, measured: a critic's value head, GAE, and the clipped value loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...advantages.critic import value_loss, whiten
from ...advantages.returns import gae
from .shape import LossShape, Moment


def critic_step(shape: LossShape, device: str = "cpu") -> Callable[[], tuple[Tensor, ...]]:
    """A call from the critic's last hidden states to its loss and gradients, on inputs made here."""
    draw = torch.Generator().manual_seed(0)
    grid = (shape.sequences, shape.tokens)
    hidden = torch.randn(*grid, shape.hidden, generator=draw).to(device, shape.dtype).requires_grad_()
    head = torch.randn(1, shape.hidden, generator=draw).to(device, shape.dtype).requires_grad_()
    mask = torch.ones(grid, dtype=torch.bool, device=device)
    rewards = torch.zeros(grid, device=device)
    rewards[:, -1] = 1.0
    old_values = torch.randn(grid, generator=draw).to(device)

    def step() -> tuple[Tensor, ...]:
        advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=0.95)
        advantages = whiten(advantages, mask)
        values = (hidden @ head.t())[..., 0]
        loss = value_loss(values, old_values, returns, mask).loss
        return advantages, *torch.autograd.grad(loss, (hidden, head))

    return step


def critic_moments(s: LossShape) -> list[Moment]:
    # The whitened advantages wait for the policy's loss; the returns and the values are the step's own until its end.
    # Values are of the model's dtype, and in the loss of float32.
    tokens, values = 4 * s.rows, s.dtype.itemsize * s.rows
    kept = {"advantages": tokens, "returns": tokens, "values": values}
    return [
        Moment("value loss", {**kept, "weights, loss terms, derivatives": 4 * tokens}),
        Moment("backward", {**kept, "gradient of values": values, "gradient of hidden": s.hidden_states}),
    ]
