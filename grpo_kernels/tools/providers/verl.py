"""verl: its log-probs, its policy losses, and on a GPU its Triton kernels from hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .base import (
    ADVANTAGE_EPS,
    CISPO_CAP,
    EPS_HIGH,
    EPS_LOW,
    GAMMA,
    LAM,
    LOSSES,
    NO_DUAL_CLIP,
    PATHS,
    Provider,
    Run,
    Task,
    given,
    run_of,
)
from .batch import Batch


class Verl(Provider):
    name = "verl"
    title = "verl: logprobs_from_logits (or its Triton kernels from hidden states) and its policy loss"
    paths = frozenset(PATHS)
    module = distribution = "verl"
    rounded_logps = True  # on a CPU, from bf16 logits
    on_gpu = False

    def unsupported(self, task: Task) -> str | None:
        if task.entropy_coef:
            return "computes the entropy from the logits a second time; not timed"
        if task.path in ("logits", "linear", "tokens") and task.path in self.paths and LOSSES[task.loss].verl is None:
            return f"has no loss that equals {task.loss}"
        if task.path == "linear" and not self.on_gpu:
            return "its kernels from hidden states need a GPU"
        return super().unsupported(task)

    def build(self, task: Task, batch: Batch) -> Run:
        if task.path in ("advantages", "gae"):
            return _advantages(task, batch)
        from verl.utils.torch_functional import logprobs_from_logits

        targets, mask = batch.tokens.targets, batch.tokens.mask
        loss = _policy_loss(task, batch) if task.path != "logps" else lambda logps: logps * mask
        if task.path == "tokens":
            return run_of(loss, batch.tokens.logps)
        if task.path == "linear":
            log_probs = functools.partial(_linear_log_probs, targets)
            return run_of(lambda *inputs: loss(log_probs(*inputs)), *batch.sources("linear"))
        source, restore = given(batch.logits), None
        if self.on_gpu:  # with flash-attn its gradient overwrites the logits
            source = source.clone()
            restore = functools.partial(source.copy_, given(batch.logits))
        return run_of(lambda logits: loss(logprobs_from_logits(logits, targets)), source, restore=restore)


class VerlOnGPU(Verl):
    on_gpu = True


def _linear_log_probs(targets: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logps, _ = linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), 1.0, "none", None)
    return logps.view(targets.shape)


def _advantages(task: Task, batch: Batch) -> Run:
    """Its vectorised group advantages, the faster of its two; GAE is a loop over time that whitens."""
    from verl.trainer.ppo import core_algos

    rewards, values, mask = given(batch.rewards), batch.values, batch.tokens.mask.float()
    if task.path == "gae":

        def gae() -> tuple[Tensor, ...]:
            white, returns = core_algos.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)
            return white * mask, returns * mask

        return run_of(gae)
    index = (torch.arange(len(rewards)) // batch.group_size).numpy()
    by_token, ones = rewards[:, None], torch.ones_like(rewards[:, None])

    def groups() -> Tensor:
        found, _ = core_algos.compute_grpo_vectorized_outcome_advantage(by_token, ones, index, ADVANTAGE_EPS)
        return found[:, 0]

    return run_of(groups)


def _policy_loss(task: Task, batch: Batch) -> Callable[[Tensor], Tensor]:
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    tokens, named = batch.tokens, LOSSES[task.loss].verl
    assert named is not None
    mode, aggregation = named
    bounds: dict[str, Any] = {"clip_ratio_low": EPS_LOW, "clip_ratio_high": EPS_HIGH}
    if mode == "cispo":
        bounds = {"clip_ratio_low": 1.0, "clip_ratio_high": CISPO_CAP - 1.0}  # no bound below, the cap above
    config = ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=NO_DUAL_CLIP, tau_pos=1.0,
        tau_neg=1.05, **bounds,
    )  # fmt: skip
    function = core_algos.get_policy_loss_fn(mode)
    mask = tokens.mask.to(torch.float32)
    advantages = tokens.advantages[:, None].expand_as(mask).contiguous()

    def run(logps: Tensor) -> Tensor:
        loss, _ = function(tokens.old_logps, logps, advantages, mask, aggregation, config, None)
        if task.kl_coef:
            kl = core_algos.kl_penalty(cast(Any, logps), cast(Any, tokens.ref_logps), "low_var_kl")
            loss = loss + task.kl_coef * core_algos.agg_loss(kl, mask, aggregation)
        return loss

    return run
