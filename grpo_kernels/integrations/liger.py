"""Liger's two GRPO losses, with its signatures and return values, computed by this library.

`LigerFusedLinearGRPOLoss` (from hidden states; what ms-swift calls with ``use_liger_kernel``) is `linear_grpo_loss`,
and `triton_grpo_loss` (from logits) is `grpo_loss`. Both run on any device and import nothing of Liger's;
`patch_liger` puts them in the place of Liger's own.

Where liger-kernel 0.8.5 is wrong, these are right:

==========================================  ==========================================================================
Liger 0.8.5                                 here
==========================================  ==========================================================================
``luspo`` averages per-token terms over     the sum over a sequence's own tokens, averaged over sequences (TRL's)
padded positions too, scaled by the
sequence's length
``vllm_is_ratio`` of ``vespo`` is also      masked positions are not read
summed over masked positions
NaN or infinity at a masked position        masked positions are not read
becomes a NaN loss
``use_ref_model=False`` drops reference     ValueError
log-probs that are given
``delta`` with ``cispo``, ``sapo``,         ValueError at construction
``vespo`` is dropped by the class
``loss_type``, ``max_completion_length``,   ValueError at construction
``importance_sampling_level`` are first
looked at in the forward
``advantages`` ``[B, T]`` broadcast to      advantages per token
``[B, B, T]``
==========================================  ==========================================================================
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import LossConfig
from ..correction.kl import kl_divergence
from ..loss.grpo import grpo_loss
from ..loss.linear import linear_grpo_loss, linear_token_logps
from ..loss.logps import token_logps
from ..loss.policy import LossArguments
from ._checks import expect, require
from ._liger_terms import clipped_tokens, denominator, loss_config, metrics_of, per_token_terms, ratio_of

RELEASE = "0.8.5"


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """Liger's class of this name (0.8.5), computed by `linear_grpo_loss`: a drop-in, also for ms-swift 4.6.0.

    ``cispo`` and ``sapo`` also take ``importance_sampling_level="sequence"``, which Liger refuses.

    Args:
        beta: coefficient of the k3 KL to the reference.
        compiled: accepted; nothing here is compiled by torch.compile.
        use_ref_model: whether there is a reference. Without one the KL is taken to the policy itself: 0, as in Liger.
        chunk_size: accepted; memory is bounded by ``chunk_rows``.
        epsilon_low, epsilon_high: clip range; ``epsilon_high`` of ``cispo`` is the cap itself.
        loss_type: ``"grpo"``, ``"bnpo"``, ``"dr_grpo"``, ``"dapo"``, ``"cispo"``, ``"sapo"``, ``"luspo"`` or
            ``"vespo"``.
        max_completion_length: tokens, of ``dr_grpo``.
        importance_sampling_level: ``"token"`` or ``"sequence"`` (GSPO).
        sapo_temperature_pos, sapo_temperature_neg, temperature, delta, use_bias_correction_kl, vespo_k_pos,
            vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: as Liger's.
        chunk_rows, backend: as in `linear_grpo_loss`; not in Liger's signature.

    Raises:
        ValueError: for an option that cannot be honoured, by name.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        chunk_rows: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.beta, self.compiled, self.use_ref_model, self.chunk_size = beta, compiled, use_ref_model, chunk_size
        self.epsilon_low, self.epsilon_high, self.loss_type = epsilon_low, epsilon_high, loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.temperature, self.delta, self.use_bias_correction_kl = temperature, delta, use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        self.chunk_rows, self.backend = chunk_rows, backend
        self.config  # noqa: B018  # raises for options that do not go together

    @property
    def config(self) -> LossConfig:
        """What the attributes mean now; a trainer may change them between calls."""
        return loss_config(
            self.loss_type, self.importance_sampling_level, self.max_completion_length,
            self.beta if self.use_ref_model else 0.0, self.epsilon_low, self.epsilon_high, self.delta,
            self.use_bias_correction_kl, self.sapo_temperature_pos, self.sapo_temperature_neg,
            (self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg),
        )  # fmt: skip

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and its metrics. On a GPU it synchronises where `linear_grpo_loss` does.

        Args:
            _input: ``[B, T, H]`` hidden states of the completions' positions.
            lin_weight: ``[V, H]`` of the lm_head, cast to the hidden states' dtype where it differs.
            selected_token_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, of the completions, any dtype.
            advantages: ``[B]`` (or ``[B, T]``).
            bias: ``[V]``, ``ref_bias`` likewise.
            ref_per_token_logps, old_per_token_logps: ``[B, T]``, nats; without the old ones the ratio is 1.
            ref_input, ref_weight: ``[B, T, H]`` and ``[V, H]`` instead of the reference's log-probs.
            vllm_is_ratio: ``[B]``, ``[B, 1]`` or ``[B, T]``.
            num_items_in_batch: tokens of all ranks and micro-batches of the step, for ``dapo``, ``cispo``, ``vespo``.

        Returns:
            The loss (0-d) and ``(kl, clip_ratio)``, or ``(clip_ratio,)`` where ``beta`` is 0.

        Raises:
            ValueError: where a reference is needed and not given, or given and not used; for shapes that do not fit.
        """
        config, mask = self.config, attention_mask
        if not self.use_ref_model and not (ref_per_token_logps is None and ref_input is None):
            raise ValueError("use_ref_model=False, so a reference would not be read; pass neither log-probs nor input")
        if config.has_kl and ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError("use_ref_model=True and beta is not 0: give ref_per_token_logps, or ref_input")
            with torch.no_grad():
                ref_per_token_logps = linear_token_logps(
                    ref_input, ref_weight, selected_token_ids, bias=ref_bias, mask=mask, temperature=self.temperature,
                    chunk_rows=self.chunk_rows, backend=self.backend,
                ).logps  # fmt: skip
        elif config.has_kl and ref_input is not None:
            warnings.warn("ref_per_token_logps are used, ref_input is not read", stacklevel=2)
        if not torch.is_autocast_enabled(_input.device.type):
            lin_weight, bias = lin_weight.to(_input.dtype), None if bias is None else bias.to(_input.dtype)
        out = linear_grpo_loss(
            _input, lin_weight, selected_token_ids, advantages, mask, bias=bias, chunk_rows=self.chunk_rows,
            old_logps=old_per_token_logps, ref_logps=ref_per_token_logps if config.has_kl else None,
            token_weights=vllm_is_ratio, denominator=denominator(self.loss_type, mask, num_items_in_batch),
            config=config, temperature=self.temperature, backend=self.backend,
        )  # fmt: skip
        flags = functools.partial(clipped_tokens, config, out.logps, old_per_token_logps, mask, advantages)
        return out.loss, tuple(metrics_of(out, config, flags, kl=self.beta != 0))

    def extra_repr(self) -> str:
        return f"{self.config!r}, temperature={self.temperature}"


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    *,
    backend: str = "auto",
) -> Any:
    """Liger's function of this name (0.8.5), computed by `grpo_loss`, and on any device.

    With ``reduce=True`` and a ratio per token, loss and gradient take one pass over the logits. With
    ``reduce=False`` the log-probs come first, and the logits' gradient is written in the backward.

    Args:
        logits: ``[B, T + 1, V]`` (or ``[B, T, V]``), of any strides.
        old_logp, ref_logp: ``[B, T]``, nats; without the old ones the ratio is 1; the reference's where ``beta`` is
            not 0.
        completion_ids, completion_mask: ``[B, T]``.
        advantages: ``[B]`` (or ``[B, T]``).
        inplace: overwrite the logits with their gradient. Ours does so in the forward if it takes a single pass, and
            raises where that cannot be: on a leaf, and on a second backward.
        max_completion_length: of ``dr_grpo``; None: T.
        reduce: whether to aggregate the tokens.
        all others: as in `LigerFusedLinearGRPOLoss`.

    Returns:
        ``reduce=True``: the loss and ``[kl, clip_ratio]``, or ``[clip_ratio]`` where ``beta`` is 0. ``reduce=False``:
        ``(per_token_loss, per_token_kl, is_clipped)``, each ``[B, T]`` and 0 at masked tokens, the first
        differentiable, the second None where ``beta`` is 0.

    Raises:
        ValueError: for an option that cannot be honoured, by name; for shapes that do not fit.
    """
    mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
    if loss_type == "dr_grpo" and max_completion_length is None:
        max_completion_length = completion_ids.shape[1]
    config = loss_config(
        loss_type, importance_sampling_level, max_completion_length, beta, eps_low, eps_high, delta,
        use_bias_correction_kl, sapo_temperature_pos, sapo_temperature_neg,
        (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
    )  # fmt: skip
    flags = functools.partial(clipped_tokens, config, old_logps=old_logp, mask=mask, advantages=advantages)
    ref_logp = ref_logp if config.has_kl else None
    if reduce:
        out = grpo_loss(
            logits, completion_ids, advantages, mask, old_logps=old_logp, ref_logps=ref_logp,
            token_weights=vllm_is_ratio, denominator=denominator(loss_type, mask, num_items_in_batch), config=config,
            temperature=temperature, inplace=inplace, backend=backend,
        )  # fmt: skip
        return out.loss, metrics_of(out, config, functools.partial(flags, logps=out.logps), kl=beta != 0)
    logps = token_logps(
        logits, completion_ids, mask=mask, temperature=temperature, inplace_backward=inplace and logits.requires_grad,
        backend=backend,
    ).logps  # fmt: skip
    given = LossArguments(old_logps=old_logp, ref_logps=ref_logp, token_weights=vllm_is_ratio)
    per_token, kl, fixed = per_token_terms(logps, mask, advantages, config, given, backend), None, logps.detach()
    if ref_logp is not None:
        kl = kl_divergence(fixed, ref_logp, mask=mask)
        kl = kl * ratio_of(config, fixed, old_logp, mask != 0) if use_bias_correction_kl else kl
    return per_token, kl, flags(logps=fixed).to(fixed.dtype)


def _positional(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]


def patch_liger() -> Callable[[], None]:
    """Puts `LigerFusedLinearGRPOLoss` and `triton_grpo_loss` in the place of Liger's, for what imports them from
    ``liger_kernel.chunked_loss`` and ``liger_kernel.transformers.grpo_loss`` afterwards (ms-swift does so when its
    trainer is made).

    Returns:
        A function that undoes it.

    Raises:
        ImportError: without liger-kernel.
        RuntimeError: if its signatures are not those of the release that this was written for.
    """
    require("liger_kernel", "liger-kernel", RELEASE)
    classes: Any = importlib.import_module("liger_kernel.chunked_loss")
    functions: Any = importlib.import_module("liger_kernel.transformers.grpo_loss")
    before = classes.LigerFusedLinearGRPOLoss, functions.triton_grpo_loss
    if before[0] is LigerFusedLinearGRPOLoss:
        return lambda: None
    ours = LigerFusedLinearGRPOLoss
    for theirs, mine in (
        (before[0].__init__, ours.__init__),
        (before[0].forward, ours.forward),
        (before[1], triton_grpo_loss),
    ):
        expect(theirs, _positional(mine), "liger-kernel", RELEASE)
    classes.LigerFusedLinearGRPOLoss, functions.triton_grpo_loss = LigerFusedLinearGRPOLoss, triton_grpo_loss

    def undo() -> None:
        classes.LigerFusedLinearGRPOLoss, functions.triton_grpo_loss = before

    return undo
