"""TRL: its own log-prob kernels and its trainer's own loss, metrics included, as a user of GRPOTrainer gets them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from .base import CISPO_CAP, EPS_HIGH, EPS_LOW, LOSSES, MAX_LENGTH, PATHS, Provider, Run, Task, run_of
from .batch import Batch


class TRL(Provider):
    name = "trl"
    title = "TRL: selective_log_softmax or ChunkedLogProbFunction, and GRPOTrainer._compute_loss"
    paths = frozenset(PATHS) - {"advantages", "gae"}  # inside its trainer
    module = distribution = "trl"
    rounded_logps = True  # on a CPU, from bf16 logits

    def build(self, task: Task, batch: Batch) -> Run:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer import utils

        tokens = batch.tokens
        targets, mask = tokens.targets, tokens.mask
        want_entropy = bool(task.entropy_coef)
        # On a GPU TRL's kernel skips masked rows, and its chunked function is given the active ones only.
        compact = batch.source.device.type != "cpu"

        def from_logits(logits: Tensor) -> tuple[Tensor, Tensor | None]:
            if want_entropy:
                return utils.selective_log_softmax_and_entropy(logits, targets, row_mask=mask)
            return utils.selective_log_softmax(logits, targets, row_mask=mask), None

        def from_hidden(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
            rows = hidden[mask] if compact else hidden.flatten(0, 1)
            labels = targets[mask] if compact else targets.flatten()
            width = min(utils._CHUNKED_LOGPROB_CHUNK_SIZE, weight.shape[0])
            wanted = ("entropy",) if want_entropy else ()
            found = ChunkedLogProbFunction.apply(rows, weight, None, labels, 1.0, width, None, 1.0, wanted)

            def whole(x: Tensor) -> Tensor:
                return x.new_zeros(mask.shape).masked_scatter(mask, x) if compact else x.view(mask.shape) * mask

            return whole(found[0]), None if found[1] is None else whole(found[1])

        loss = _trainer_loss(task, batch)

        calls: dict[str, Callable[..., Any]] = {
            "tokens": lambda logps: loss(logps, None),
            "linear": lambda hidden, weight: loss(*from_hidden(hidden, weight)),
            "logits": lambda logits: loss(*from_logits(logits)),
            "logps": lambda logits: tuple(x for x in from_logits(logits) if x is not None),
        }
        return run_of(calls[task.path], *batch.sources(task.path))


def _trainer_loss(task: Task, batch: Batch) -> Any:
    """`GRPOTrainer._compute_loss` on one process, given log-probs (and entropy, which it otherwise only logs)."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    tokens, loss = batch.tokens, LOSSES[task.loss]
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    trainer = SimpleNamespace(
        loss_type=loss.type, importance_sampling_level=loss.level, beta=task.kl_coef, epsilon_low=EPS_LOW,
        epsilon_high=CISPO_CAP if loss.type == "cispo" else EPS_HIGH, max_completion_length=MAX_LENGTH,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        current_gradient_accumulation_steps=1, use_adaptive_entropy=False, accelerator=accelerator,
        _entropy_bonus_enabled=bool(task.entropy_coef), entropy_coef=task.entropy_coef,
        model=SimpleNamespace(training=False), get_gamma_weights=GRPOTrainer.get_gamma_weights,
        args=SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1, sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        ),
    )  # fmt: skip
    mask = tokens.mask.long()
    prompt = mask[:, :1]
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask, "completion_mask": mask,
        "num_items_in_batch": mask.sum(), "advantages": tokens.advantages, "old_per_token_logps": tokens.old_logps,
        "ref_per_token_logps": tokens.ref_logps,
    }  # fmt: skip
    unused_entropy = torch.zeros_like(tokens.old_logps)

    def run(logps: Tensor, entropy: Tensor | None) -> Tensor:
        outputs = logps, unused_entropy if entropy is None else entropy, None
        trainer._metrics = defaultdict(lambda: defaultdict(list))
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: outputs
        return GRPOTrainer._compute_loss(cast(Any, trainer), None, inputs)

    return run
