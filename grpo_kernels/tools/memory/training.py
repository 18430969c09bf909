"""A whole training state in bytes: PPO with its critic and GRPO without, from the parameters of the model.

What is counted, and why:

- per trained model, its weights, gradients and optimizer state; per frozen one (the reference), its weights;
- the activations kept for the backward with full checkpointing, the least there is: one hidden state a layer and token;
- the peak of the loss step: everything from the last hidden states on (see ``predict``), at its own moment, when the
  activations are still there. The gradient of lm_head in it is the micro-batch's, next to the accumulated one.

Not counted: attention's scratch memory, the CUDA context, fragmentation, the sampler's KV cache, a reward model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..shapes import ModelShape
from .critic import critic_moments
from .predict import predict
from .profile import Holding
from .shape import LossShape

METHODS = ("grpo", "ppo")


class Bytes(NamedTuple):
    """Bytes a parameter."""

    weight: int
    gradient: int
    optimizer: int  # moments, and the float32 copy of the weights where there is one

    @property
    def trained(self) -> int:
        return sum(self)


# Mixed precision as ZeRO counts it (Rajbhandari et al. 2020, section 3.1): 2 + 2 + 12 bytes.
PRECISIONS = {
    "bf16_adam": Bytes(weight=2, gradient=2, optimizer=4 + 4 + 4),
    "bf16_only": Bytes(weight=2, gradient=2, optimizer=2 + 2),
    "fp32_adam": Bytes(weight=4, gradient=4, optimizer=4 + 4),
}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by what they are for, of one method."""

    method: str
    provider: str  # of the loss
    holdings: tuple[Holding, ...]

    @property
    def total(self) -> int:
        return sum(h.nbytes for h in self.holdings)


def training_memory(
    model: ModelShape,
    loss: LossShape,
    *,
    method: str,
    provider: str = "ours",
    reference: bool = True,
    precision: str = "bf16_adam",
    together: bool = False,
) -> TrainingMemory:
    """What one GPU holds at the peak of a step, unsharded.

    Args:
        model: whose parameters, depth and width.
        loss: the micro-batch; vocabulary and hidden size are the model's.
        method: "grpo", or "ppo": a critic of the same size with a value head instead of lm_head, trained along with it.
        provider: whose loss from hidden states: ours or "eager".
        reference: a frozen copy for the KL penalty.
        precision: of ``PRECISIONS``.
        together: actor and critic in one backward, as TRL's PPO; else in turn, as verl's, and the larger counts.

    Raises:
        ValueError: for a name that is none of those.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}; got {method!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}; got {precision!r}")
    each = PRECISIONS[precision]
    checkpoints = (model.layers + 1) * loss.hidden_states
    states = _states("actor", model.parameters, each)
    if reference:
        states.append(Holding("reference: weights", model.parameters * each.weight))
    actor_step = [
        Holding("actor: activations", checkpoints),
        Holding("actor: loss step", predict(provider, loss).peak),
    ]
    if method == "grpo":
        return TrainingMemory(method, provider, (*states, *actor_step))
    states += _states("critic", critic_parameters(model), each)
    critic_step = [
        Holding("critic: activations", checkpoints),
        Holding("critic: values, GAE, value loss", max(m.total for m in critic_moments(loss))),
    ]
    larger = max(actor_step, critic_step, key=lambda step: sum(h.nbytes for h in step))
    return TrainingMemory(method, provider, (*states, *(actor_step + critic_step if together else larger)))


def critic_parameters(model: ModelShape) -> int:
    """The actor's, with a value head for lm_head; a tied lm_head is the embedding, which the critic needs too."""
    lm_head = 0 if model.tied else model.vocab * model.hidden
    return model.parameters - lm_head + model.hidden


def _states(role: str, parameters: int, each: Bytes) -> list[Holding]:
    return [
        Holding(f"{role}: weights", parameters * each.weight),
        Holding(f"{role}: gradients", parameters * each.gradient),
        Holding(f"{role}: optimizer", parameters * each.optimizer),
    ]
