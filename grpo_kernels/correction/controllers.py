"""Coefficients that follow what training shows: the KL's and the entropy bonus's.

A coefficient is a run-time number of the kernels, so changing it recompiles nothing. A fixed one needs no controller:
it stands in ``LossConfig(kl_coef=...)``; ``horizon=math.inf`` keeps this interface and the value. A captured CUDA graph
holds numbers as they were; ``coef_on(device)`` is a tensor that it reads anew at each replay.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..inputs.check import check_tensor
from ..inputs.data_parallel import device_of, reduced


def _check(name: str, value: float, legal: bool, what: str) -> float:
    if not legal:
        raise ValueError(f"{name} must be {what}; got {value!r}")
    return float(value)


class _Controller:
    _state: tuple[str, ...]  # attributes that training changes
    coef: Any  # what to pass to LossConfig, an attribute or a property

    def coef_on(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The coefficient as a 0-d tensor for ``LossConfig``: always the same one, which `update` and `load_state_dict`
        write the new value into, so that one config serves all steps and a replayed CUDA graph follows. Nothing waits.
        """
        tensors = self.__dict__.setdefault("_tensors", {})
        key = (torch.device(device), dtype)
        if key not in tensors:
            tensors[key] = torch.full((), self.coef, device=device, dtype=dtype)
        return tensors[key]  # type: ignore[no-any-return]

    def _publish(self) -> None:
        for tensor in self.__dict__.get("_tensors", {}).values():
            tensor.fill_(self.coef)

    def state_dict(self) -> dict[str, float]:
        """What training has changed, plain numbers (JSON holds them)."""
        return {name: getattr(self, name) for name in self._state}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes up the state of another controller.

        Raises:
            ValueError: for a state with other names.
        """
        if set(state) != set(self._state):
            raise ValueError(f"state must have {', '.join(self._state)}; got {', '.join(map(str, state)) or 'nothing'}")
        for name in self._state:
            setattr(self, name, float(state[name]))
        self._publish()


class AdaptiveKLController(_Controller):
    """Holds the KL near a target: ``coef *= 1 + clip(current / target - 1, -0.2, 0.2) * n_steps / horizon``.

    Ziegler et al., arXiv:1909.08593; what verl's and OpenRLHF's adaptive KL control does. Each step::

        out = grpo_loss(..., config=dataclasses.replace(config, kl_coef=controller.coef))
        controller.update(out.metrics["kl"], n_steps=batch_size)

    or, once, ``LossConfig(kl_coef=controller.coef_on(logits.device))``, which every update changes.

    Args:
        init: the first coefficient, at least 0.
        target: the KL to hold, in nats and in the unit of what ``update`` is given (per token, or per sequence).
        horizon: steps over which a clipped error of 0.2 changes the coefficient by a fifth.

    Attributes:
        coef: the coefficient now.
    """

    _state = ("coef",)

    def __init__(self, init: float, target: float, horizon: float) -> None:
        self.coef = _check("init", init, 0 <= init < math.inf, "a finite number, at least 0")
        self.target = _check("target", target, 0 < target < math.inf, "a finite number above 0")
        self.horizon = _check("horizon", horizon, horizon > 0, "above 0")

    def update(self, current: float | Tensor, n_steps: int = 1) -> float:
        """Takes in the KL that was measured over `n_steps` samples; returns the new coefficient.

        Reading a tensor on a GPU synchronises.

        Raises:
            ValueError: for a NaN, which would stay for ever, and negative steps.
        """
        current = float(current)
        _check("current", current, not math.isnan(current), "a number")
        _check("n_steps", n_steps, n_steps >= 0, "at least 0")
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n_steps / self.horizon
        self._publish()
        return self.coef


NOT_OBSERVED = "update needs an observe before it; got none since the last update"


class AdaptiveEntropyController(_Controller):
    """Keeps the entropy up: each optimizer step moves the coefficient by ``delta``, upwards when the entropy is at or
    below ``target``, downwards when it is above, within ``[low, high]``. While it is above, the bonus is off.

    Skywork-OR1 (arXiv:2505.22312) as TRL has it (``use_adaptive_entropy``), its defaults included. Each step::

        for batch in micro_batches:  # all with the same coefficient
            out = grpo_loss(..., return_entropy=True, config=dataclasses.replace(config, entropy_coef=controller.coef))
            controller.observe(out.entropy, mask)
        controller.update()

    or, once, ``LossConfig(entropy_coef=controller.coef_on(logits.device))``, which every update changes.

    Args:
        init: the first value of the coefficient.
        target: mean entropy per token, in nats.
        delta: change of the coefficient a step.
        low, high: its bounds.

    Attributes:
        value: the coefficient, whether it is applied or not.
        last_entropy: the mean entropy of the step before, infinite before there is one.
    """

    _state = ("value", "last_entropy")

    def __init__(
        self, init: float = 0.0, target: float = 0.2, delta: float = 0.005, low: float = 0.0, high: float = 1.0
    ) -> None:
        self.high = _check("high", high, 0 <= high < math.inf, "a finite number, at least 0")
        self.low = _check("low", low, 0 <= low <= high, f"between 0 and high, {high!r}")
        self.value = _check("init", init, low <= init <= high, f"between low, {low!r}, and high, {high!r}")
        self.target = _check("target", target, 0 <= target < math.inf, "a finite number, at least 0")
        self.delta = _check("delta", delta, 0 <= delta < math.inf, "a finite number, at least 0")
        self.last_entropy = math.inf
        self._window: Tensor | None = None  # since the last update: sum of entropies, tokens, calls of observe

    @property
    def coef(self) -> float:
        """What to pass as ``entropy_coef``: the value, 0 while the entropy is above the target."""
        return self.value if self.last_entropy <= self.target else 0.0

    def observe(self, entropy: Tensor, mask: Tensor | None = None) -> None:
        """Adds a micro-batch's entropies, of any shape, where `mask` is not 0 (TRL's is times the
        `entropy_mask`); waits for no device.

        Raises:
            ValueError: if the shapes differ.
        """
        check_tensor("entropy", entropy, kind="float", differentiable=True)
        entropy = entropy.detach()
        if mask is None:
            mask = torch.ones_like(entropy)
        check_tensor("mask", mask, device=entropy.device, shape=entropy.shape)
        active = mask.to(torch.bool)
        wide = torch.float32 if entropy.device.type == "mps" else torch.float64
        total = torch.where(active, entropy, 0.0).sum(dtype=wide)
        seen = torch.stack([total, active.sum().to(wide), torch.ones_like(total)])
        self._window = seen if self._window is None else self._window + seen

    def update(self, dp_group: Any = None) -> float:
        """Ends an optimizer step: the mean over all tokens observed since the last one, of every rank of `dp_group`,
        moves the coefficient; returns the new `coef`. Waits for the device. Call it on every rank of the group, also on
        one that has observed nothing: it takes part in the reduction, with no tokens, so that no other waits for it.

        Raises:
            ValueError: if nothing was observed on any rank, or the mean is NaN: on all ranks alike.
        """
        window, self._window = self._window, None
        if window is None and dp_group is None:
            raise ValueError(NOT_OBSERVED)
        if window is None:
            window = torch.zeros(3, dtype=torch.float64, device=device_of(dp_group))
        total, tokens, calls = reduced(window, dp_group).tolist()
        if dp_group is not None and calls == 0:
            raise ValueError(NOT_OBSERVED)
        entropy = total / max(tokens, 1.0)
        _check("the mean entropy", entropy, not math.isnan(entropy), "a number")
        step = self.delta if entropy <= self.target else -self.delta
        self.value = min(max(self.value + step, self.low), self.high)
        self.last_entropy = entropy
        self._publish()
        return self.coef
