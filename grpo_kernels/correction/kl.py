"""The KL divergence to a reference, token by token: for rewards, logging and losses of one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import KL_ESTIMATORS, KL_GRADIENTS, LossConfig
from ..inputs.check import check_choice, check_number, check_tensor
from ..inputs.layout import acc_dtype, layout_of
from ..reference import loss as reference


def kl_divergence(
    logps: Tensor,
    ref_logps: Tensor,
    estimator: str = "k3",
    *,
    mask: Tensor | None = None,
    gradient: str = "pathwise",
    old_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    input_clamp: float | None = None,
    output_clamp: float | None = None,
) -> Tensor:
    """KL(policy || reference) of each token, from its log-probs alone; differentiable in ``logps``.

    With ``u = ref - logp``: ``k1 = -u``, ``abs = |u|``, ``k2 = u^2 / 2``, ``k3 = e^u - 1 - u`` (Schulman,
    "Approximating KL divergence"). The penalty of the losses, without its coefficient; plain torch on any device.

    For KL in the reward, take what the trainer's default takes: verl ``"k1"``; OpenRLHF ``"k1", output_clamp=10``;
    slime ``"k1"``; NeMo-RL ``"k3", input_clamp=20, output_clamp=10``. verl's ``low_var_kl`` is ``"k3"`` with those
    clamps, and its ``"k3+"`` the same with ``gradient="straight_through"``.

    Args:
        logps: ``[B, T]``, or ``[N]`` packed; log-probs of the current policy, nats.
        ref_logps: per token, of the reference; detached, as every tensor below.
        estimator: ``"k1"``, ``"abs"``, ``"k2"`` or ``"k3"``.
        mask: per token, any dtype, 0 masks: the KL there is 0, and nothing is read, NaN included.
        gradient: ``"pathwise"``; ``"straight_through"`` (that of k2); weighted, in value and gradient, by
            ``"importance_weighted"`` ``exp(logp - old)``, ``"score_function"`` ``exp(logp - sg logp)``,
            ``"behaviour_weighted"`` ``exp(logp - rollout)``.
        old_logps: per token; read by ``"importance_weighted"``, None: on-policy, weight 1.
        rollout_logps: per token; read by ``"behaviour_weighted"``, which needs it.
        input_clamp, output_clamp: clamps on ``u`` and on the weighted estimate, no gradient outside.

    Returns:
        The KL in nats, of the shape of ``logps``; float32, float64 for float64 log-probs.

    Raises:
        ValueError: for unknown names, clamps that are not above 0, shapes that do not fit, missing rollout_logps.
    """
    check_choice("estimator", estimator, KL_ESTIMATORS[1:])
    check_choice("gradient", gradient, KL_GRADIENTS)
    for name, clamp in (("input_clamp", input_clamp), ("output_clamp", output_clamp)):
        if clamp is not None:
            check_number(name, clamp, lambda x: x > 0, "a finite number above 0, or None")
    if gradient == "behaviour_weighted" and rollout_logps is None:
        raise ValueError("gradient='behaviour_weighted' needs rollout_logps; got None")
    config = LossConfig(
        kl_coef=1.0, kl_estimator=estimator, kl_gradient=gradient, kl_input_clamp=input_clamp,
        kl_output_clamp=output_clamp,
    )  # fmt: skip
    check_tensor("logps", logps, kind="float", differentiable=True)
    layout, dtype = layout_of(logps.shape, None, logps.device), acc_dtype(logps.dtype)
    active = layout.tokens(mask, "mask", torch.bool)

    def read(x: Tensor | None, name: str) -> Tensor | None:
        x = layout.tokens(x, name, dtype, "float")
        return x if x is None or active is None else torch.where(active, x, 0.0)

    logp = logps.to(dtype).reshape(layout.bt_shape)
    logp = logp if active is None else torch.where(active, logp, 0.0)
    layout.check(ref_logps, "ref_logps", "float")
    ref = read(ref_logps, "ref_logps")
    assert ref is not None
    old, rollout = read(old_logps, "old_logps"), read(rollout_logps, "rollout_logps")
    log_ratio = logp - (logp.detach() if old is None else old)
    kl = reference.kl_penalty(config.form, logp, ref, rollout, log_ratio, config.scalar_values())
    return (kl if active is None else torch.where(active, kl, 0.0)).reshape(layout.shape)
