"""torchtitan's reinforcement-learning losses from hidden states, without a chunk's logits in float32.

`KernelsLoss` takes the place of ``ChunkedLossWrapper.Config(loss_fn=DAPOLoss.Config(...))`` (or ``GRPOLoss``) in a
trainer's config: torchtitan 0.3.0 gives a ``ChunkedLossWrapper`` the model's lm_head and the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import LossConfig
from ..loss.linear import linear_grpo_loss
from ..loss.policy import LossOutput
from ._checks import expect, require
from .forward import in_forward

RELEASE = "0.3.0"
MAX_LOG_RATIO = 10.0  # DAPOLoss clamps log-ratios to this before it takes their exponential
ChunkedLossWrapper: Any = require("torchtitan.components.loss", "torchtitan", RELEASE).ChunkedLossWrapper
expect(
    ChunkedLossWrapper.__call__, ("self", "pred", "labels", "global_valid_tokens", "loss_inputs"), "torchtitan", RELEASE
)


class KernelsLoss(ChunkedLossWrapper):
    """DAPO's (with equal bounds, GRPO's) loss of torchtitan 0.3.0, by `linear_grpo_loss` in the lm_head's forward.

    Tokens whose generator log-prob is not finite are masked, as torchtitan does. The metrics are those of ours that
    torchtitan's trainer can sum over ranks: each is this call's share, over ``global_valid_tokens``.

    FSDP2 gathers the lm_head for the call. Tensor parallelism is refused: hidden states or an lm_head that are DTensors
    even then raise the loss's TypeError, which names the tensor.
    """

    @dataclass(kw_only=True)
    class Config(ChunkedLossWrapper.Config):  # type: ignore[misc, name-defined]
        """``num_chunks`` and ``loss_fn`` are not used; ``chunk_rows`` as in `linear_grpo_loss`."""

        ratio_clip_low: float = 0.2
        ratio_clip_high: float = 0.2
        chunk_rows: int | None = None

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        self.lm_head: torch.nn.Module | None = None
        self.chunk_rows = config.chunk_rows
        self.config = LossConfig(
            eps_low=config.ratio_clip_low, eps_high=config.ratio_clip_high, log_ratio_clamp=MAX_LOG_RATIO
        )

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | float | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics.

        Args:
            pred: ``[B, L, H]`` hidden states, of a model with ``_skip_lm_head``.
            labels: ``[B, L]`` target ids, already shifted.
            global_valid_tokens: tokens of all ranks and micro-batches, the denominator; None: 1.
            generator_logprobs, advantages: ``[B, L]``; loss_mask: ``[B, L]`` bool.

        Raises:
            ValueError: before ``set_lm_head``.
            TypeError: for DTensors.
        """
        if self.lm_head is None:
            raise ValueError("KernelsLoss needs the lm_head: call set_lm_head first")
        if global_valid_tokens is None:
            denominator: Tensor | float = 1.0
        elif isinstance(global_valid_tokens, Tensor):
            denominator = global_valid_tokens.clamp(min=1)
        else:
            denominator = max(float(global_valid_tokens), 1.0)
        mask = loss_mask & torch.isfinite(generator_logprobs)

        def loss(lm_head: Any) -> LossOutput:
            return linear_grpo_loss(
                pred, lm_head.weight, labels, advantages, mask, bias=getattr(lm_head, "bias", None),
                old_logps=generator_logprobs, denominator=denominator, chunk_rows=self.chunk_rows, config=self.config,
                return_entropy=True,
            )  # fmt: skip

        out = in_forward(self.lm_head, self.lm_head, loss)
        share = out.metrics["tokens"] / denominator
        return out.loss, {
            "loss/mean": out.loss.detach(),
            "loss/ratio_mean": out.metrics["ratio_mean"] * share,
            "loss/ratio_clipped_frac": out.metrics["clip_region"] * share,
            "bit_wise/logprob_diff/mean": -out.metrics["approx_kl"] * share,
            "trainer/entropy/mean": out.metrics["entropy"] * share,
        }
