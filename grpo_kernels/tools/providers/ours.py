"""This library, a provider for each backend and way of calling it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpo_kernels as gk

from .base import ADVANTAGE_EPS, GAMMA, LAM, PATHS, Provider, Result, Run, Task, given, leaf
from .batch import Batch, produced

BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # by device; an interpreter is no benchmark
WAYS: dict[str, tuple[str, frozenset[str]]] = {
    "": ("in place where there are logits", frozenset(PATHS)),
    "out-of-place": ("a gradient in memory of its own", frozenset({"logits"})),
    "two-pass": ("log-probs first, the gradient in the backward", frozenset({"logits", "linear"})),
}


@dataclass(frozen=True)
class Ours(Provider):
    backend: str
    way: str = ""

    distribution = "grpo-kernels"

    @property
    def name(self) -> str:  # type: ignore[override]
        return "-".join(part for part in ("ours", self.backend, self.way) if part)

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"this library, backend {self.backend}, {WAYS[self.way][0]}"

    @property
    def paths(self) -> frozenset[str]:  # type: ignore[override]
        return WAYS[self.way][1]

    @property
    def version(self) -> str:
        return gk.__version__

    def missing(self, device: str) -> str | None:
        if self.backend not in BACKENDS[device]:
            return f"runs on {', '.join(d for d, names in BACKENDS.items() if self.backend in names)} only"
        state = gk.available_backends().get(self.backend, "not part of this version")
        return None if state == "ok" else state

    def build(self, task: Task, batch: Batch) -> Run:
        tokens, config = batch.tokens, task.config
        arguments: dict[str, Any] = {
            "old_logps": tokens.old_logps, "ref_logps": tokens.ref_logps if task.kl_coef else None, "config": config,
            "backend": self.backend,
        }  # fmt: skip
        single_pass = self.way != "two-pass"
        if task.path == "linear":

            def linear() -> Result:
                inputs = leaf(batch.hidden), leaf(batch.weight)
                output = gk.linear_grpo_loss(*inputs, *tokens.arguments, single_pass=single_pass, **arguments)
                return Result((output.loss,), inputs)

            return Run(linear)
        if task.path == "tokens":

            def loss_of_tokens() -> Result:
                logps = leaf(tokens.logps)
                output = gk.policy_loss(logps, tokens.advantages, tokens.mask, **arguments)
                return Result((output.loss,), (logps,))

            return Run(loss_of_tokens)
        if task.path in ("advantages", "gae"):
            return self._advantages(task, batch)
        if task.path == "logps":
            return self._logps(task, batch)
        return self._loss(batch, arguments, single_pass)

    def _advantages(self, task: Task, batch: Batch) -> Run:
        rewards, mask = given(batch.rewards), batch.tokens.mask
        if task.path == "advantages":

            def of_groups() -> Result:
                found = gk.group_advantages(
                    rewards, group_size=batch.group_size, eps=ADVANTAGE_EPS, backend=self.backend
                )
                return Result((found.advantages,), ())

            return Run(of_groups)
        values = given(batch.values)

        def of_critic() -> Result:
            advantages, returns = gk.gae(rewards, values, mask, gamma=GAMMA, lam=LAM, backend=self.backend)
            return Result((gk.whiten(advantages, mask, backend=self.backend), returns), ())

        return Run(of_critic)

    def _logps(self, task: Task, batch: Batch) -> Run:
        entropy = bool(task.entropy_coef)

        def logps() -> Result:
            logits = leaf(batch.logits)
            found = gk.token_logps(
                logits, batch.tokens.targets, mask=batch.tokens.mask, return_entropy=entropy, backend=self.backend
            )
            return Result((found.logps, found.entropy) if found.entropy is not None else (found.logps,), (logits,))

        return Run(logps)

    def _loss(self, batch: Batch, arguments: dict[str, Any], single_pass: bool) -> Run:
        original = given(batch.logits)
        inplace = self.way != "out-of-place"
        source = original.clone() if inplace else original

        def loss() -> Result:
            logits = produced(source)
            output = gk.grpo_loss(
                logits, *batch.tokens.arguments, inplace=inplace, single_pass=single_pass, **arguments
            )
            return Result((output.loss,), (logits,))

        return Run(loss, (lambda: source.copy_(original)) if inplace else None)
