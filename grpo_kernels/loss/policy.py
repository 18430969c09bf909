"""The policy loss from log-probs: preparing its inputs, the token kernel's autograd, and policy_loss itself."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..aggregation import aggregation_weights
from ..backends import differentiable, resolve
from ..coefficients import readable
from ..config import DEFAULT, OBJECTIVES, LossConfig, Scalars
from ..inputs.check import check_tensor
from ..inputs.layout import Layout, PolicyInputs, acc_dtype, active_tokens, layout_of
from ..ops import loss as ops
from ..ops.library import apply, first_order, none_for_unused_outputs
from ..reference import loss as reference
from .covariance import covariance_selection
from .logps import unsupported_group
from .metrics import Metrics

N_INPUTS = len(PolicyInputs._fields)


class Advantages(NamedTuple):
    """A loss's advantages; or rewards of consecutive groups, of which its own launches make them."""

    values: Tensor
    form: str = "given"  # of config.ADVANTAGES
    group_size: int = 1
    eps: float = 0.0


class LossArguments(NamedTuple):
    """What a loss takes in addition to log-probs and advantages, as the caller gave it."""

    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    rollout_logps: Tensor | None = None
    token_weights: Tensor | None = None
    entropy_mask: Tensor | None = None
    sequence_weights: Tensor | None = None
    denominator: Tensor | float | None = None
    scale: float | Tensor = 1.0


class LossOutput(NamedTuple):
    """What every loss returns. `loss` carries the gradient; everything else is detached.

    `per_token_loss` is the term before aggregation (policy + KL - entropy), 0 at masked tokens. `entropy` is None
    unless the loss has an entropy term or `return_entropy` asked for it. `metrics` are 0-d tensors on the device: no
    host sync until you read them; over N active tokens, with x = logp - old, d = logp - rollout, r the
    ratio at its level and w the weight of the policy term (token_weights times entropy_mask):

    ==================  =============================================================================
    policy_loss         the policy term's part of the loss; with the next two it adds up to the loss
    kl_loss             the KL term's part, coefficient included
    entropy_loss        the entropy term's part, coefficient and sign included
    tokens              N
    entropy             mean entropy in nats (0 where it is not computed)
    kl                  mean of the KL estimate (weighted by its gradient form), without the coefficient
    approx_kl           mean of -x, clamped by log_ratio_clamp: how far the policy has moved since `old`
    approx_kl_k3        mean of e^x - 1 - x, the same with lower variance
    ratio_mean/min/max  of r (1 when there are no tokens)
    clip_low            share of tokens with A < 0 and r below 1 - eps_low; cispo: r below cispo_low;
                        dppo and trust regions: A <= 0 and outside the region
    clip_high           share with A > 0 and r above 1 + eps_high, or delta if that is lower; cispo: A > 0 and r
                        above cispo_high; dppo and trust regions: A > 0 and outside the region
    clip_region         their sum
    clip_cap            share with A < 0 where the term is bounded from above: by dual_clip, or by the larger of
                        delta and 1 + eps_high; cispo: A <= 0 and r above cispo_high; dppo: r above ratio_cap;
                        *_cov: picked tokens
    clip_low_min        least clip_low of a sequence that has tokens
    clip_high_max       largest clip_high of a sequence
    gradient_weight     mean of g where the policy term's gradient is -g A: the ratio where no bound holds it
                        (A = 0 counts as A > 0), cispo's clamped ratio, vespo's phi, 1 for reinforce
    rejected            share of tokens with w = 0
    weight_mean/min/max of w (1 where nothing weighs); weight_ess: (sum w)^2 / (N sum w^2)
    rollout_kl          mean of -d, rollout_kl_k3 of e^d - 1 - d, rollout_abs_diff of |d|: how far the policy
                        is from the sampler; 0 without rollout_logps
    ==================  =============================================================================

    A call without active tokens reports 1 for ratios, weights and ``gradient_weight`` and 0 for the rest, which would
    spoil a minimum or maximum over ranks; ``combine_metrics`` leaves such calls out, and says how each metric combines.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    per_token_loss: Tensor
    metrics: Metrics


class TokenPolicy(torch.autograd.Function):
    """The token kernel already knows the derivatives, so the backward is a product."""

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        entropy: Tensor | None,
        active: Tensor,
        cu_seqlens: Tensor | None,
        backend: str,
        *inputs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, per_token, g_logps, g_entropy, metrics = ops.token_policy(
            logps, entropy, active, cu_seqlens, *inputs, backend
        )
        ctx.save_for_backward(g_logps, g_entropy)
        ctx.mark_non_differentiable(per_token, metrics)
        none_for_unused_outputs(ctx)
        return loss, per_token, metrics

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple:
        if g is None:
            return (None,) * (5 + N_INPUTS)
        needs = ctx.needs_input_grad[:2]
        gradients = [g * x if need else None for x, need in zip(ctx.saved_tensors, needs, strict=True)]
        return *gradients, *[None] * (3 + N_INPUTS)


def policy_inputs(
    layout: Layout, active: Tensor, dtype: torch.dtype, config: LossConfig, advantages: Advantages, given: LossArguments
) -> PolicyInputs:
    """Everything the loss reads per token, checked and brought to [B, T]."""
    _check_given(config, given, layout)
    share = functools.partial(
        aggregation_weights, layout, config=config, dtype=dtype, sequence_weights=given.sequence_weights,
        scale=given.scale,
    )  # fmt: skip
    mask = layout.tokens_or_sequences(given.entropy_mask, "entropy_mask", dtype)
    importance = layout.tokens_or_sequences(given.token_weights, "token_weights", dtype)
    objective = OBJECTIVES[config.objective]
    pooled = objective.pooling != "none"
    policy_weights = None if pooled else importance
    of_sequences = given.token_weights is not None and not layout.holds_tokens(given.token_weights)
    if importance is not None and objective.pooling == "sum" and of_sequences:
        # A sum over the sequence's tokens would count its one weight as often as it has tokens.
        importance = torch.where(layout.first_tokens(active), importance, 1.0)
    if mask is not None:
        policy_weights = mask if policy_weights is None else torch.where(mask == 0, mask, mask * policy_weights)
    bonus_mask = mask if config.has_entropy and config.entropy_mask_bonus else None
    entropy_weights = None
    if config.has_entropy and (config.entropy_aggregation is not None or bonus_mask is not None):
        kept = active if bonus_mask is None else active & (bonus_mask != 0)
        own = config.entropy_aggregation or config.aggregation
        entropy_weights = share(kept, own, denominator=None if config.entropy_aggregation else given.denominator)
    for name in ("old_logps", "ref_logps", "rollout_logps"):
        if (x := getattr(given, name)) is not None:
            layout.check(x, name, "float")
    old = given.rollout_logps if objective.ratio_against == "rollout" else given.old_logps
    kl_coef, entropy_coef, scalars = _coefficients(config, active.device, dtype)
    values = layout.tokens_or_sequences(advantages.values, "advantages", dtype)
    assert values is not None
    return PolicyInputs(
        advantages=values,
        weights=share(active, config.aggregation, denominator=given.denominator),
        old_logps=layout.tokens(old, "old_logps", dtype),
        ref_logps=layout.tokens(given.ref_logps, "ref_logps", dtype) if config.has_kl else None,
        rollout_logps=layout.tokens(given.rollout_logps, "rollout_logps", dtype),
        token_weights=policy_weights,
        entropy_weights=entropy_weights,
        entropy_mask=bonus_mask,
        selected=None,  # until the log-probs are there, in loss_from_logps
        pooled_weights=importance if pooled else None,
        group_size=advantages.group_size,
        advantage_eps=advantages.eps,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        scalars=scalars,
        form=list(config.form._replace(advantages=advantages.form)),
    )


def _coefficients(
    config: LossConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The coefficients that kernels on `device` read, None where they are numbers, and all numbers."""
    tensors: dict[str, Tensor | None] = dict.fromkeys(("kl_coef", "entropy_coef"))
    scalars = config.scalars
    for name, value in zip(tensors, config.tensors, strict=True):
        if value is None:
            continue
        tensors[name] = readable(name, value, device, dtype)
        if tensors[name] is None:
            scalars = scalars.clone()
            scalars[Scalars._fields.index(name)] = value.reshape(())
    return tensors["kl_coef"], tensors["entropy_coef"], scalars


def _check_given(config: LossConfig, given: LossArguments, layout: Layout) -> None:
    if config.has_kl and given.ref_logps is None:
        raise ValueError("kl_coef is not 0, so ref_logps must be given; got None")
    if config.has_kl and config.form.kl_gradient == "behaviour_weighted" and given.rollout_logps is None:
        raise ValueError("kl_gradient='behaviour_weighted' needs rollout_logps; got None")
    if OBJECTIVES[config.objective].ratio_against == "rollout" and given.rollout_logps is None:
        raise ValueError(f"objective={config.objective!r} takes its ratio against rollout_logps; got None")
    if config.form.pooling != "none" and not layout.knows_sequences:
        what = f"objective={config.objective!r}, ratio_level={config.ratio_level!r}"
        raise ValueError(f"{what} over flat tokens needs cu_seqlens")


def loss_from_logps(
    logps: Tensor, entropy: Tensor | None, active: Tensor, layout: Layout, inputs: PolicyInputs, config: LossConfig,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, per-token terms and metrics from [B, T] log-probs; differentiable in them and in the entropy."""
    if OBJECTIVES[config.objective].selects_tokens:
        inputs = inputs._replace(selected=covariance_selection(logps, active, inputs, config))
    if differentiable(backend):
        return reference.policy_loss(logps, entropy, active, layout, inputs, config)
    outputs: tuple[Tensor, Tensor, Tensor] = apply(
        "policy_loss", TokenPolicy, logps, entropy, active, layout.cu_seqlens, backend, *inputs
    )
    return outputs


def _own(converted: Tensor, given: Tensor) -> Tensor:
    """A copy where the conversion has made none: the caller may overwrite what was given, and what is returned."""
    return converted.detach().clone() if converted.dtype == given.dtype else converted


def output(
    layout: Layout, loss: Tensor, logps: Tensor, entropy: Tensor | None, per_token: Tensor, metrics: Tensor
) -> LossOutput:
    shape = layout.shape
    return LossOutput(
        loss,
        logps.detach().view(shape),
        None if entropy is None else entropy.detach().view(shape),
        per_token.view(shape),
        Metrics(metrics),
    )


def policy_loss(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    sequence_weights: Tensor | None = None,
    return_entropy: bool = False,
    cu_seqlens: Tensor | None = None,
    denominator: Tensor | float | None = None,
    scale: float | Tensor = 1.0,
    config: LossConfig | None = None,
    cp_group: object = None,
    backend: str = "auto",
) -> LossOutput:
    """The policy loss from log-probs: ``scale * sum(weights * terms) / denominator``.

    ``terms = policy + kl_coef * kl - entropy_coef * entropy``, the maths of ``LossConfig``, in one launch with its
    derivative. Differentiable in ``logps`` and ``entropy``; another tensor that requires grad is refused. What TRL's
    ``_compute_loss`` and verl's ``compute_policy_loss_*`` do after the log-probs.

    Args:
        logps: ``[B, T]``, or ``[N]`` packed; log-probs of the current policy, nats, float32 or float64 (others are
            computed in float32).
        advantages: ``[B]`` or ``[B, T]``; packed: ``[N]``, or ``[R]`` with ``cu_seqlens`` (where N = R, per token).
        mask: per token, any dtype, 0 masks: nothing of a masked token is read, NaN included.
        old_logps: per token, of the policy that the ratio is taken against; None: on-policy, ratio 1.
        ref_logps: per token; read only when ``config.kl_coef`` is not 0.
        rollout_logps: per token, of the sampler; what ``tv_mask`` and ``ipo`` take their ratio against (they ignore
            old_logps), read by ``kl_gradient="behaviour_weighted"`` and by the rollout metrics. A
            NaN makes those terms and the loss NaN, and the gradient NaN at that token alone; otherwise it reaches only
            the rollout metrics.
        entropy: per token, from ``token_logps``; needed when ``config.entropy_coef`` is not 0.
        token_weights: per token or sequence, multiplies the policy term only (importance correction, rejection);
            ``gmpo`` takes their geometric mean over a sequence, ``vespo`` adds their logarithms to that of its ratio,
            one per sequence once (its first token then holds it, in the metrics too).
        entropy_mask: per token, multiplies the policy term (TRL's top-entropy quantile), and the entropy term with
            ``config.entropy_mask_bonus``; ``gmpo`` leaves the tokens out of its mean.
        sequence_weights: ``[R]``, multiplies every term of a sequence, in addition to the aggregation's own weight.
        cu_seqlens: ``[R + 1]`` int, the boundaries of packed sequences, on the tokens' device; needed where a sequence
            matters. They rise from 0 to at most N. On a GPU that is not checked, as it would synchronise:
            they are taken as clamped, so that nothing is read or written elsewhere; how the tokens are shared out then
            is not promised.
        denominator: replaces the aggregation's own (tokens, sequences, or sequences * max_length), for gradient
            accumulation and data parallelism; a 0-d tensor on a GPU is used without a host sync. An entropy term with
            an ``entropy_aggregation`` of its own is divided by this call's tokens or sequences instead, as in TRL: over
            micro-batches use ``scale=1 / steps`` with it, or ``entropy_aggregation=None``, whose
            entropy term this number divides too.
        scale: multiplies the loss; ``1 / steps`` for gradient accumulation.
        config: the loss; ``LossConfig()`` when None.
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        LossOutput; ``entropy`` is the argument's, when it is asked for or part of the loss.

    Raises:
        ValueError: for shapes that do not fit, for boundaries on another device, and for a tensor that the config
            needs and that is missing.
    """
    unsupported_group("cp_group", cp_group)
    config = config or DEFAULT
    check_tensor("logps", logps, kind="float", differentiable=True)
    dtype = acc_dtype(logps.dtype)
    backend = resolve(backend, logps.device, dtype)
    layout = layout_of(logps.shape, cu_seqlens, logps.device)
    logps_bt = logps.to(dtype).reshape(layout.bt_shape)
    active = active_tokens(mask, layout, logps.device)
    if config.has_entropy and entropy is None:
        raise ValueError(
            "entropy_coef is not 0, so entropy must be given (token_logps(..., return_entropy=True)); got None"
        )
    if return_entropy and entropy is None:
        raise ValueError("return_entropy=True needs entropy (token_logps(..., return_entropy=True)); got None")
    entropy_bt = None
    if entropy is not None:
        layout.check(entropy, "entropy", "float", differentiable=True)
    if entropy is not None and (config.has_entropy or return_entropy):
        entropy_bt = entropy.to(dtype).reshape(layout.bt_shape)
    given = LossArguments(
        old_logps, ref_logps, rollout_logps, token_weights, entropy_mask, sequence_weights, denominator, scale
    )
    inputs = policy_inputs(layout, active, dtype, config, Advantages(advantages), given)
    loss, per_token, metrics = loss_from_logps(logps_bt, entropy_bt, active, layout, inputs, config, backend)
    own_entropy = None if entropy_bt is None or entropy is None else _own(entropy_bt, entropy)
    return output(layout, loss, _own(logps_bt, logps), own_entropy, per_token, metrics)
