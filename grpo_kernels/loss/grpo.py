"""The GRPO loss from logits: one launch where the ratio is a token's, two sweeps where it is a sequence's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..advantages.group import EPS, group_advantages
from ..backends import LARGEST_FUSED_GROUP, differentiable, fuses_group_advantages, implementation, resolve
from ..config import DEFAULT, OBJECTIVES, LossConfig
from ..inputs.check import check_tensor, check_unused
from ..inputs.grouping import acc_rewards, check_ddof_eps
from ..inputs.layout import Layout, PolicyInputs, Rows, acc_dtype, check_logits, layout_of, rows_of
from ..ops import loss as ops
from ..ops.library import apply, first_order, none_for_unused_outputs
from .logps import CONSUMED_ERROR, N_ROWS, check_inplace, row_logps, unsupported_group
from .policy import N_INPUTS, Advantages, LossArguments, LossOutput, loss_from_logps, output, policy_inputs


class SinglePass(torch.autograd.Function):
    """Loss and d loss / d logits in one launch; the loss's value and metrics come from the token kernel."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, cu_seqlens: Tensor | None, validate: bool, inplace: bool, backend: str, *rest: Any
    ) -> tuple[Tensor, ...]:
        rows, inputs = rest[:N_ROWS], rest[N_ROWS:]
        if inplace:
            logps, entropy = ops.row_policy_(logits, *rows, *inputs, validate, backend)
            gradient = logits.detach()
        else:
            gradient, logps, entropy = ops.row_policy(logits, *rows, *inputs, validate, backend)
        loss, per_token, _, _, metrics = ops.token_policy(logps, entropy, rows[1], cu_seqlens, *inputs, backend)
        ctx.save_for_backward(gradient)
        ctx.inplace, ctx.consumed, ctx.backend = inplace, False, backend
        ctx.mark_non_differentiable(logps, entropy, per_token, metrics)
        none_for_unused_outputs(ctx)
        return loss, logps, entropy, per_token, metrics

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple:
        if ctx.consumed:
            raise RuntimeError(CONSUMED_ERROR)
        if g is None:
            return (None,) * (5 + N_ROWS + N_INPUTS)
        (gradient,) = ctx.saved_tensors
        ctx.consumed = ctx.inplace
        return scale_gradient(ctx, gradient, g), *[None] * (4 + N_ROWS + N_INPUTS)


def scale_gradient(ctx: Any, gradient: Tensor, g: Tensor) -> Tensor:
    """g * gradient, in its own memory where no other backward may come; there a g of 1 costs nothing."""
    if torch.compiler.is_compiling():
        return gradient.mul_(g) if ctx.inplace else gradient * g  # a 0-d g keeps its precision and the gradient's dtype
    if torch._C._autograd._get_current_graph_task_keep_graph() and not ctx.inplace:
        return gradient * g
    if g.device.type == "cpu" and g == 1:
        return gradient
    implementation(ctx.backend).scale(gradient if gradient.dim() == 3 else gradient.view(1, 1, -1), g)
    return gradient


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

    Where a token's loss needs that token alone (a token-level ratio, all objectives but ``gmpo``, ``vespo`` and
    ``*_cov``), the gradient of the logits is written in the forward launch, while each row is in the cache: one read
    and one write of the logits for loss and gradient. The others, and ``single_pass=False``, take log-probs first and
    write the gradient in the backward.

    Args:
        logits, targets, mask, temperature, logit_scale, softcap, ignore_index, validate: as in ``token_logps``; the
            targets ``[B, T]``, or ``[N]`` packed.
        advantages, old_logps, ref_logps, rollout_logps, token_weights, entropy_mask, sequence_weights, return_entropy,
            cu_seqlens, denominator, scale, config: as in ``policy_loss``.
        rewards, group_size: instead of advantages: ``[R]`` rewards of consecutive groups, normalised within the group
            with ``advantage_scale`` and ``advantage_eps`` as ``group_advantages`` does; on a GPU inside the loss's own
            launches (``[B]``, ``"group"`` or ``"none"``, groups of up to 1024).
        inplace: overwrite the logits with their gradient: no second tensor of their size. Whatever reads the logits
            afterwards reads the gradient; autograd raises where a node had saved them, and on a second backward.
            Without grad nothing is written.
        single_pass: write the gradient in the forward. A gradient of the loss other than 1 then costs one sweep more
            in the backward (and with retain_graph memory); prefer ``scale`` to dividing the loss. float16 logits take
            two sweeps nonetheless, unless ``scale`` is a tensor or above 1: their gradient would underflow before
            ``torch.amp.GradScaler`` multiplies the loss. Its ``scale=scaler.scale(torch.ones(()))`` stands for
            ``scaler.scale(loss)``, in one pass.
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        LossOutput.

    Raises:
        ValueError, TypeError: as ``token_logps`` and ``policy_loss``; for ``inplace`` on a leaf that requires grad, or
            on rows that overlap in memory; for advantages and rewards both given, or neither.
        RuntimeError: from a second backward through an ``inplace`` loss.
    """
    unsupported_group("tp_group", tp_group)
    unsupported_group("cp_group", cp_group)
    check_logits(logits)
    check_tensor("targets", targets, device=logits.device, kind="integer")
    backend = resolve(backend, logits.device, logits.dtype)
    layout = layout_of(targets.shape, cu_seqlens, targets.device)
    rows = rows_of(
        logits, targets, mask, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        ignore_index=ignore_index, layout=layout,
    )  # fmt: skip
    given = LossArguments(
        old_logps, ref_logps, rollout_logps, token_weights, entropy_mask, sequence_weights, denominator, scale
    )
    return loss_from_rows(
        FromLogits(rows, layout, validate, inplace, backend), advantages,
        Rewards(rewards, group_size, advantage_eps, advantage_scale), given, config or DEFAULT,
        single_pass=single_pass, return_entropy=return_entropy,
    )  # fmt: skip


class Rewards(NamedTuple):
    """Instead of advantages, as the caller gave them: `group_advantages` of consecutive groups."""

    values: Tensor | None
    group_size: int | None
    eps: float
    scale: str


_OF_REWARDS = ("group_size", "advantage_eps", "advantage_scale")  # the arguments that go with rewards alone


class RowSource(Protocol):
    """Where a loss gets the log-probs of its rows: from logits, or from hidden states and the lm_head."""

    rows: Rows
    layout: Layout
    backend: str
    fuses_group_advantages: bool  # whether `fused` takes rewards

    @property
    def wants_grad(self) -> bool: ...
    def fused(self, inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Loss, log-probs, entropy, per-token terms and metrics; the gradient is computed at the same time."""

    def logps(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and entropy, differentiable, and an empty tensor."""


class FromLogits:
    """Rows of logits; `inplace`: which their gradient overwrites."""

    def __init__(self, rows: Rows, layout: Layout, validate: bool, inplace: bool, backend: str) -> None:
        self.rows, self.layout, self.backend = rows, layout, backend
        self.fuses_group_advantages = fuses_group_advantages(backend)
        self._validate, self._inplace = validate, inplace

    @property
    def wants_grad(self) -> bool:
        return torch.is_grad_enabled() and self.rows.logits.requires_grad

    def fused(self, inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self._inplace:
            check_inplace(self.rows.logits)
        outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = apply(
            "grpo_loss", SinglePass, self.rows.logits, self.layout.cu_seqlens, self._validate, self._inplace,
            self.backend, *self.rows[1:], *inputs,
        )  # fmt: skip
        return outputs

    def logps(self) -> tuple[Tensor, Tensor, Tensor]:
        inplace = self._inplace and self.wants_grad
        return row_logps(
            self.rows, sum_p2=False, validate=self._validate, inplace_backward=inplace, backend=self.backend
        )


def loss_from_rows(
    source: RowSource, advantages: Tensor | None, rewards: Rewards, given: LossArguments, config: LossConfig, *,
    single_pass: bool, return_entropy: bool,
) -> LossOutput:  # fmt: skip
    """What `grpo_loss` and `linear_grpo_loss` share: everything but where the logits come from."""
    rows, layout, backend = source.rows, source.layout, source.backend
    dtype = acc_dtype(rows.logits.dtype)
    made = advantages_of(advantages, rewards, source, dtype, config)
    inputs = policy_inputs(layout, rows.active, dtype, config, made, given)
    entropy: Tensor | None
    fuses = config.form.token_local and not differentiable(backend) and source.wants_grad
    if fuses and single_pass and _holds_gradient(rows.logits.dtype, given.scale):
        loss, logps, entropy, per_token, metrics = source.fused(inputs)
    else:
        logps, entropy, _ = source.logps()
        loss, per_token, metrics = loss_from_logps(logps, entropy, rows.active, layout, inputs, config, backend)
    return output(layout, loss, logps, entropy if config.has_entropy or return_entropy else None, per_token, metrics)


def _holds_gradient(dtype: torch.dtype, scale: float | Tensor) -> bool:
    """Whether a gradient in `dtype` of the loss as it is, before any loss scale, can be trusted: of a mean over 10^5
    tokens most of it would be 0 in float16. A scale that is a tensor, or above 1, is the loss scale itself."""
    return dtype != torch.float16 or isinstance(scale, Tensor) or scale > 1


def advantages_of(
    advantages: Tensor | None, rewards: Rewards, source: RowSource, dtype: torch.dtype, config: LossConfig
) -> Advantages:
    """As given; or of the rewards, in the loss's own launches where the source takes them, else in one before."""
    if (advantages is None) == (rewards.values is None):
        raise ValueError("give either advantages or rewards (with group_size)")
    layout, (values, group_size, eps, scale) = source.layout, rewards
    if advantages is not None:
        for name, value, default in zip(_OF_REWARDS, rewards[1:], (None, EPS, "group"), strict=True):
            check_unused(name, value, default, "with advantages, which are taken as they are")
        return Advantages(advantages)
    check_tensor(
        "rewards", values, device=layout.device, shape=(layout.sequences,) if layout.knows_sequences else layout.shape
    )
    assert values is not None
    if source.fuses_group_advantages and (fused := _rewards_in_launch(rewards, layout, dtype, config)):
        return fused
    made = group_advantages(values, group_size=group_size, eps=eps, scale=scale, backend=source.backend)
    return Advantages(made.advantages)


def _rewards_in_launch(rewards: Rewards, layout: Layout, dtype: torch.dtype, config: LossConfig) -> Advantages | None:
    """None where the loss's launches cannot make these advantages, or something is wrong that a launch before names."""
    values, group_size, eps, scale = rewards
    if values is None or group_size is None or not layout.padded or acc_rewards(values).dtype != dtype:
        return None
    if not 1 <= group_size <= LARGEST_FUSED_GROUP or layout.shape[0] % group_size:
        return None
    if OBJECTIVES[config.objective].selects_tokens:  # by their advantages, before the launch
        return None
    if scale == "none" and eps == EPS:
        return Advantages(values, "centred", group_size)
    if scale == "group":
        check_ddof_eps(1, eps)
        return Advantages(values, "normalised", group_size, float(eps))
    return None


class ConfiguredLoss(torch.nn.Module):
    """A loss function as a module that holds its ``LossConfig`` and some of its keywords."""

    loss: ClassVar[Callable[..., LossOutput]]  # the function, of the subclass

    def __init__(self, config: LossConfig | None = None, **options: Any) -> None:
        """``options``: keywords of the function to hold, such as ``temperature``; a call's own go before them.

        Raises:
            TypeError: for an option that the function does not have.
        """
        super().__init__()
        known = inspect.signature(self.loss).parameters
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(map(repr, unknown))}")
        self.config, self.options = config or DEFAULT, options

    def forward(self, *args: Any, **kwargs: Any) -> LossOutput:
        return self.loss(*args, config=self.config, **{**self.options, **kwargs})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.config), *(f"{k}={v!r}" for k, v in self.options.items())])


class GRPOLoss(ConfiguredLoss):
    """A ``LossConfig`` as a module: ``GRPOLoss(config)(logits, targets, advantages, mask, ...)`` is ``grpo_loss``."""

    loss = staticmethod(grpo_loss)
