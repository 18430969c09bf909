"""The GRPO-family losses: from log-probs (policy_loss) and from logits (grpo_loss)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops, reference
from .advantages import group_advantages
from .aggregation import aggregation_weights
from .backends import PolicyInputs, resolve
from .config import METRICS, LossConfig
from .layout import Layout, Rows, layout_of, real_dtype, rows_of
from .logps import CONSUMED, check_inplace, row_logps, unsupported_group


N_INPUTS, N_ROWS = len(PolicyInputs._fields), len(Rows._fields) - 1  # arguments without a gradient


class LossOutput(NamedTuple):
    """What every loss returns. `loss` carries the gradient; everything else is detached.

    `per_token_loss` is the term before aggregation (policy + KL - entropy), 0 at masked tokens. `entropy` is None unless
    the loss has an entropy term or `return_entropy` asked for it. `metrics` are 0-d tensors on the device, read when
    you read them; over N active tokens, with x = logp - old and r the ratio at its level:

    ==================  =============================================================================
    policy_loss         the policy term's part of the loss; with the next two it adds up to the loss
    kl_loss             the KL term's part, coefficient included
    entropy_loss        the entropy term's part, coefficient and sign included
    tokens              N
    entropy             mean entropy in nats (0 where it is not computed)
    kl                  mean of the KL estimate (weighted by its gradient form), without the coefficient
    approx_kl           mean of -x: how far the policy has moved since `old`
    approx_kl_k3        mean of e^x - 1 - x, the same with lower variance
    ratio_mean/min/max  of r (1 when there are no tokens)
    clip_low            share of tokens with A < 0 and r below 1 - eps_low
    clip_high           share with A > 0 and r above 1 + eps_high
    clip_region         their sum
    clip_cap            share with A < 0 where delta or dual_clip bounds the term
    ==================  =============================================================================
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    per_token_loss: Tensor
    metrics: dict[str, Tensor]


class TokenPolicy(torch.autograd.Function):
    """The token kernel already knows the derivatives, so the backward is a product."""

    @staticmethod
    def forward(
        ctx: Any, logps: Tensor, entropy: Tensor | None, active: Tensor, cu_seqlens: Tensor | None, backend: str, *inputs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, per_token, g_logps, g_entropy, metrics = ops.token_policy(logps, entropy, active, cu_seqlens, *inputs, backend)
        ctx.save_for_backward(g_logps, g_entropy)
        ctx.mark_non_differentiable(per_token, metrics)
        return loss, per_token, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple:
        g_logps, g_entropy = ctx.saved_tensors
        return g * g_logps, g * g_entropy if ctx.needs_input_grad[1] else None, *[None] * (3 + N_INPUTS)


class SinglePass(torch.autograd.Function):
    """Loss and d loss / d logits in one launch; the loss's value and metrics come from the token kernel."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, validate: bool, inplace: bool, backend: str, *rest: Any
    ) -> tuple[Tensor, ...]:
        rows, inputs = rest[:N_ROWS], rest[N_ROWS:]
        if inplace:
            logps, entropy = ops.row_policy_(logits, *rows, *inputs, validate, backend)
            gradient = logits.detach()
        else:
            gradient, logps, entropy = ops.row_policy(logits, *rows, *inputs, validate, backend)
        loss, per_token, _, _, metrics = ops.token_policy(logps, entropy, rows[1], None, *inputs, backend)
        ctx.save_for_backward(gradient)
        ctx.inplace, ctx.consumed = inplace, False
        ctx.mark_non_differentiable(logps, entropy, per_token, metrics)
        return loss, logps, entropy, per_token, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple:
        if ctx.consumed:
            raise RuntimeError(CONSUMED)
        (gradient,) = ctx.saved_tensors
        ctx.consumed = ctx.inplace
        return scaled(gradient, g, ctx.inplace), *[None] * (3 + N_ROWS + N_INPUTS)


def scaled(gradient: Tensor, g: Tensor, inplace: bool) -> Tensor:
    """g * gradient; on the CPU, where reading g is free, a g of 1 costs nothing."""
    if g.device.type == "cpu" and not torch.compiler.is_compiling() and g == 1:
        return gradient
    g = g.to(gradient.dtype)
    return gradient.mul_(g) if inplace else gradient * g


def policy_inputs(
    layout: Layout,
    active: Tensor,
    dtype: torch.dtype,
    config: LossConfig,
    *,
    advantages: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    rollout_logps: Tensor | None,
    token_weights: Tensor | None,
    entropy_mask: Tensor | None,
    sequence_weights: Tensor | None,
    denominator: Tensor | float | None,
    scale: float | Tensor,
) -> PolicyInputs:
    """Everything the loss reads per token, checked and brought to [B, T]."""
    _check_given(config, ref_logps, rollout_logps, layout)
    mask = layout.tokens_or_sequences(entropy_mask, "entropy_mask", dtype)
    weights_of_terms = layout.tokens_or_sequences(token_weights, "token_weights", dtype)
    if mask is not None:
        weights_of_terms = mask if weights_of_terms is None else weights_of_terms * mask
    common = {"dtype": dtype, "sequence_weights": sequence_weights, "scale": scale}
    weights = aggregation_weights(layout, active, config.aggregation, config, denominator=denominator, **common)  # type: ignore[arg-type]
    bonus_mask = mask if config.entropy_mask_bonus else None
    entropy_weights = None
    if config.has_entropy and (config.entropy_aggregation is not None or bonus_mask is not None):
        kept = active if bonus_mask is None else active & (bonus_mask != 0)
        own = config.entropy_aggregation or config.aggregation
        entropy_denominator = None if config.entropy_aggregation else denominator
        entropy_weights = aggregation_weights(layout, kept, own, config, denominator=entropy_denominator, **common)  # type: ignore[arg-type]
    adv = layout.tokens_or_sequences(advantages, "advantages", dtype)
    assert adv is not None
    return PolicyInputs(
        adv,
        weights,
        layout.tokens(old_logps, "old_logps", dtype),
        layout.tokens(ref_logps, "ref_logps", dtype) if config.has_kl else None,
        layout.tokens(rollout_logps, "rollout_logps", dtype),
        weights_of_terms,
        entropy_weights,
        bonus_mask if config.has_entropy else None,
        config.scalars,
        list(config.form),
    )


def _check_given(config: LossConfig, ref_logps: Tensor | None, rollout_logps: Tensor | None, layout: Layout) -> None:
    if config.has_kl and ref_logps is None:
        raise ValueError("kl_coef is not 0, so ref_logps must be given; got None")
    if config.has_kl and config.form.kl_gradient == "behaviour_weighted" and rollout_logps is None:
        raise ValueError("kl_gradient='behaviour_weighted' needs rollout_logps; got None")
    if config.form.ratio_level != "token" and not layout.knows_sequences:
        raise ValueError(f"ratio_level={config.form.ratio_level!r} over flat tokens needs cu_seqlens")


def within_sequences(active: Tensor, layout: Layout) -> Tensor:
    """Tokens past the last boundary of cu_seqlens are masked."""
    if layout.cu_seqlens is None:
        return active
    return active & (torch.arange(active.shape[1], device=active.device) < layout.cu_seqlens[-1])


def token_loss(
    logps: Tensor, entropy: Tensor | None, active: Tensor, layout: Layout, inputs: PolicyInputs, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, per-token terms and metrics from [B, T] log-probs; differentiable in them and in the entropy."""
    if backend == "reference":
        return reference.policy_loss(logps, entropy, active, layout, inputs)
    return TokenPolicy.apply(logps, entropy, active, layout.cu_seqlens, backend, *inputs)  # type: ignore[no-any-return]


def output(layout: Layout, loss: Tensor, logps: Tensor, entropy: Tensor | None, per_token: Tensor, metrics: Tensor) -> LossOutput:
    shape = layout.shape
    return LossOutput(
        loss,
        logps.detach().view(shape),
        None if entropy is None else entropy.detach().view(shape),
        per_token.view(shape),
        dict(zip(METRICS, metrics.unbind(), strict=True)),
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
    """The policy loss from log-probs: ``scale * sum(weights * (policy + kl_coef * kl - entropy_coef * entropy)) / denominator``.

    The maths of ``LossConfig`` in one launch, with its derivative. Differentiable in ``logps`` and ``entropy``; every
    other tensor is detached. What TRL's ``_compute_loss`` and verl's ``compute_policy_loss_*`` do after the log-probs.

    Args:
        logps: ``[B, T]``, or ``[N]`` packed; log-probs of the current policy, nats, float32 or float64 (others are
            computed in float32).
        advantages: ``[B]`` or ``[B, T]``; packed: ``[N]``, or ``[R]`` with ``cu_seqlens`` (where N = R, per token).
        mask: per token, any dtype, 0 masks: nothing of a masked token is read, NaN included.
        old_logps: per token, of the policy that the ratio is taken against; None: on-policy, ratio 1.
        ref_logps: per token; read only when ``config.kl_coef`` is not 0.
        rollout_logps: per token, of the sampler; read by ``kl_gradient="behaviour_weighted"``.
        entropy: per token, from ``token_logps``; needed when ``config.entropy_coef`` is not 0.
        token_weights: per token or sequence, multiplies the policy term only (importance correction, rejection).
        entropy_mask: per token, multiplies the policy term (TRL's top-entropy quantile), and the entropy term with
            ``config.entropy_mask_bonus``.
        sequence_weights: ``[R]``, multiplies every term of a sequence, beside the aggregation's own weight.
        cu_seqlens: ``[R + 1]`` int, the boundaries of packed sequences; needed where a sequence matters.
        denominator: replaces the aggregation's own (tokens, sequences, or sequences * max_length), for gradient
            accumulation and data parallelism; a 0-d tensor is not waited for.
        scale: multiplies the loss; ``1 / steps`` for gradient accumulation.
        config: the loss; ``LossConfig()`` when None.
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        LossOutput; ``entropy`` is the argument's, when it is asked for or part of the loss.

    Raises:
        ValueError: for shapes that do not fit, and for a tensor that the config needs and that is missing.
    """
    unsupported_group("cp_group", cp_group)
    config = config or LossConfig()
    backend = resolve(backend, logps.device)
    layout = layout_of(logps.shape, cu_seqlens)
    dtype = real_dtype(logps.dtype)
    grid_logps = logps.to(dtype).reshape(layout.grid)
    active = _policy_mask(mask, grid_logps, layout)
    if config.has_entropy and entropy is None:
        raise ValueError("entropy_coef is not 0, so entropy must be given (token_logps(..., return_entropy=True)); got None")
    grid_entropy = None
    if entropy is not None and (config.has_entropy or return_entropy):
        if entropy.shape != logps.shape:
            raise ValueError(f"entropy must have the shape of logps, {tuple(logps.shape)}; got {tuple(entropy.shape)}")
        grid_entropy = entropy.to(dtype).reshape(layout.grid)
    inputs = policy_inputs(
        layout, active, dtype, config, advantages=advantages, old_logps=old_logps, ref_logps=ref_logps,
        rollout_logps=rollout_logps, token_weights=token_weights, entropy_mask=entropy_mask,
        sequence_weights=sequence_weights, denominator=denominator, scale=scale,
    )  # fmt: skip
    loss, per_token, metrics = token_loss(grid_logps, grid_entropy, active, layout, inputs, backend)
    return output(layout, loss, grid_logps, grid_entropy, per_token, metrics)


def _policy_mask(mask: Tensor | None, grid_logps: Tensor, layout: Layout) -> Tensor:
    if mask is None:
        active = torch.ones_like(grid_logps, dtype=torch.bool)
    elif mask.shape != layout.shape:
        raise ValueError(f"mask must have the shape of the tokens, {tuple(layout.shape)}; got {tuple(mask.shape)}")
    else:
        active = (mask != 0).reshape(layout.grid)
    return within_sequences(active, layout)


def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    advantage_eps: float = 1e-4,
    advantage_scale: str = "group",
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    sequence_weights: Tensor | None = None,
    return_entropy: bool = False,
    cu_seqlens: Tensor | None = None,
    denominator: Tensor | float | None = None,
    scale: float | Tensor = 1.0,
    config: LossConfig | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    validate: bool = False,
    inplace: bool = False,
    single_pass: bool = True,
    tp_group: object = None,
    cp_group: object = None,
    backend: str = "auto",
) -> LossOutput:
    """The GRPO loss from logits, ``policy_loss`` of ``token_logps``, fused.

    With a token-level ratio the gradient of the logits is written in the forward launch, while each row is in the
    cache: one read and one write of the logits for loss and gradient. Sequence-level ratios, and ``single_pass=False``,
    take log-probs first and write the gradient in the backward.

    Args:
        logits, targets, mask, temperature, logit_scale, softcap, ignore_index, validate: as in ``token_logps``; the
            targets ``[B, T]``, or ``[N]`` packed.
        advantages, old_logps, ref_logps, rollout_logps, token_weights, entropy_mask, sequence_weights, return_entropy,
            cu_seqlens, denominator, scale, config: as in ``policy_loss``.
        rewards, group_size: instead of advantages: ``[R]`` rewards of consecutive groups, normalised within the group
            with ``advantage_scale`` and ``advantage_eps`` as ``group_advantages`` does.
        inplace: overwrite the logits with their gradient: no second tensor of their size. Whatever reads the logits
            afterwards reads the gradient; autograd raises where a node had saved them, and on a second backward.
            Without grad nothing is written.
        single_pass: write the gradient in the forward. A gradient of the loss other than 1 then costs one sweep more
            in the backward; prefer ``scale`` to dividing the loss.
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        LossOutput.

    Raises:
        ValueError, TypeError: as ``token_logps`` and ``policy_loss``; for ``inplace`` on a leaf that requires grad;
            for advantages and rewards both given, or neither.
        RuntimeError: from a second backward through an ``inplace`` loss.
    """
    unsupported_group("tp_group", tp_group)
    unsupported_group("cp_group", cp_group)
    config = config or LossConfig()
    backend = resolve(backend, logits.device)
    layout = layout_of(targets.shape, cu_seqlens)
    rows = rows_of(
        logits, targets, mask, temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index
    )
    rows = rows._replace(active=within_sequences(rows.active, layout))
    inputs = policy_inputs(
        layout, rows.active, real_dtype(logits.dtype), config,
        advantages=given_advantages(advantages, rewards, group_size, advantage_eps, advantage_scale, backend),
        old_logps=old_logps, ref_logps=ref_logps, rollout_logps=rollout_logps, token_weights=token_weights,
        entropy_mask=entropy_mask, sequence_weights=sequence_weights, denominator=denominator, scale=scale,
    )  # fmt: skip
    fused = single_pass and config.form.ratio_level == "token" and backend != "reference"
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    entropy: Tensor | None
    if fused and wants_grad:
        if inplace:
            check_inplace(logits)
        loss, logps, entropy, per_token, metrics = SinglePass.apply(
            rows.logits, validate, inplace, backend, *rows[1:], *inputs
        )
    else:
        logps, entropy, _ = row_logps(
            rows, sum_p2=False, validate=validate, inplace_backward=inplace and wants_grad, backend=backend
        )
        loss, per_token, metrics = token_loss(logps, entropy, rows.active, layout, inputs, backend)
    return output(layout, loss, logps, entropy if config.has_entropy or return_entropy else None, per_token, metrics)


def given_advantages(
    advantages: Tensor | None, rewards: Tensor | None, group_size: int | None, eps: float, scale: str, backend: str
) -> Tensor:
    if (advantages is None) == (rewards is None):
        raise ValueError("give either advantages or rewards (with group_size)")
    if advantages is not None:
        if group_size is not None:
            raise ValueError(f"group_size={group_size} goes with rewards; got advantages")
        return advantages
    assert rewards is not None
    return group_advantages(rewards, group_size=group_size, eps=eps, scale=scale, backend=backend).advantages


class GRPOLoss(torch.nn.Module):
    """A ``LossConfig`` as a module: ``GRPOLoss(config)(logits, targets, advantages, mask, ...)`` is ``grpo_loss``."""

    def __init__(self, config: LossConfig | None = None, **options: Any) -> None:
        """``options``: keywords of ``grpo_loss`` to hold, such as ``temperature`` or ``inplace``."""
        super().__init__()
        self.config, self.options = config or LossConfig(), options

    def forward(self, *args: Any, **kwargs: Any) -> LossOutput:
        return grpo_loss(*args, config=self.config, **{**self.options, **kwargs})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.config), *(f"{k}={v!r}" for k, v in self.options.items())])
