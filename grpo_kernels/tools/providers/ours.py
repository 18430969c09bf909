"""This library, a provider for each backend and way of calling it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import grpo_kernels as gk

from .base import ADVANTAGE_EPS, GAMMA, LAM, PATHS, Provider, Run, Task, given, run_in_place, run_of
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
        tokens, rewards, values, backend = batch.tokens, batch.rewards, batch.values, self.backend
        options: dict[str, Any] = {
            "old_logps": tokens.old_logps, "ref_logps": tokens.ref_logps if task.kl_coef else None,
            "config": task.config, "backend": backend,
        }  # fmt: skip
        inplace = self.way != "out-of-place"
        on_rows = {**options, "single_pass": self.way != "two-pass"}

        def from_hidden(hidden: Tensor, weight: Tensor) -> Tensor:
            return gk.linear_grpo_loss(hidden, weight, *tokens.arguments, **on_rows).loss

        def from_logits(logits: Tensor) -> Tensor:
            return gk.grpo_loss(logits, *tokens.arguments, inplace=inplace, **on_rows).loss

        def from_logps(logps: Tensor) -> Tensor:
            return gk.policy_loss(logps, tokens.advantages, tokens.mask, **options).loss

        def logps(logits: Tensor) -> tuple[Tensor, ...]:
            entropy = bool(task.entropy_coef)
            found = gk.token_logps(logits, tokens.targets, mask=tokens.mask, return_entropy=entropy, backend=backend)
            return (found.logps,) if found.entropy is None else (found.logps, found.entropy)

        def of_groups() -> Tensor:
            found = gk.group_advantages(given(rewards), group_size=batch.group_size, eps=ADVANTAGE_EPS, backend=backend)
            return found.advantages

        def of_critic() -> tuple[Tensor, ...]:
            found, returns = gk.gae(given(rewards), given(values), tokens.mask, gamma=GAMMA, lam=LAM, backend=backend)
            return gk.whiten(found, tokens.mask, backend=backend), returns

        if task.path == "logits" and inplace:
            return run_in_place(from_logits, batch.logits)
        if task.path == "logits":
            return run_of(from_logits, batch.logits, enter=produced)
        calls: dict[str, Callable[..., Any]] = {
            "linear": from_hidden, "tokens": from_logps, "logps": logps, "advantages": of_groups, "gae": of_critic
        }  # fmt: skip
        return run_of(calls[task.path], *batch.sources(task.path))
