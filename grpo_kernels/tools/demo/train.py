"""GRPO from end to end: sample groups, score them by rule, standardise within the group, take a fused-loss step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor

import grpo_kernels as gk

from .policy import Batch, Policy
from .tasks import Problem, Score, Task


@dataclass(frozen=True)
class Settings:
    steps: int
    prompts: int
    group_size: int
    max_new_tokens: int
    learning_rate: float
    kl_coef: float
    rows_at_once: int  # of a batch in one forward and backward pass; the gradients add up
    inner_steps: int = 1
    evaluation_prompts: int = 16
    evaluation_copies: int = 4
    max_grad_norm: float = 1.0
    seed: int = 0

    def loss_config(self) -> gk.LossConfig:
        return gk.LossConfig(objective="clip", eps_low=0.2, kl_coef=self.kl_coef, kl_estimator="k3")

    def with_evaluation_for_steps(self) -> Settings:
        """A run of a step or two is a smoke test: it does not wait for sixteen prompts to be judged twice."""
        return replace(self, evaluation_prompts=4, evaluation_copies=2) if self.steps < 3 else self


# Resident after two steps of SmolLM2 on a CPU: 4.6 GiB with eight rows at once, 6.1 GiB with all 32.
SMOLLM = Settings(
    steps=12, prompts=4, group_size=8, max_new_tokens=12, learning_rate=2e-5, kl_coef=0.02, rows_at_once=8
)
SYNTHETIC = Settings(
    steps=100,
    prompts=32,
    group_size=8,
    max_new_tokens=6,
    learning_rate=1e-2,
    kl_coef=1e-3,
    rows_at_once=256,
    inner_steps=2,
    evaluation_copies=16,
)


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out problems, always drawn with the same random numbers."""

    reward: float
    correct: float
    form: float
    samples: int
    examples: list[tuple[str, str]]  # the first sampled answer to some of the questions


@dataclass(frozen=True)
class Step:
    step: int
    reward: float
    correct: float
    form: float
    loss: float
    kl: float
    grad_norm: float
    informative_groups: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class LossInputs:
    """Everything the loss reads, kept from the last batch that carried a signal, for the comparison afterwards."""

    batch: Batch
    advantages: Tensor
    old_logps: Tensor
    ref_logps: Tensor


@dataclass(frozen=True)
class Pass:
    """What one forward and backward over a batch gave."""

    loss: float
    kl: float  # to the reference, mean over the tokens
    logps: Tensor


@dataclass
class Run:
    settings: Settings
    before: Evaluation | None = None
    after: Evaluation | None = None
    steps: list[Step] = field(default_factory=list)
    last: LossInputs | None = None
    interrupted: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


class Listener(Protocol):
    def phase(self, name: str) -> None: ...
    def step(self, step: Step) -> None: ...


def train(policy: Policy, task: Task, settings: Settings, listener: Listener) -> Run:
    """Never raises KeyboardInterrupt: what was done until then is in the Run, `interrupted` says so."""
    run = Run(settings)
    try:
        _Trainer(policy, task, listener, run).train()
    except KeyboardInterrupt:
        run.interrupted = True
    return run


class _Trainer:
    def __init__(self, policy: Policy, task: Task, listener: Listener, run: Run):
        self.policy, self.task, self.listener, self.run = policy, task, listener, run
        self.settings = run.settings
        self.config = run.settings.loss_config()
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=self.settings.learning_rate, weight_decay=0.0)

    def train(self) -> None:
        torch.manual_seed(self.settings.seed)
        problems = self.task.training(random.Random(self.settings.seed))
        self.run.before = self._evaluate("judging the untrained policy")
        for number in range(1, self.settings.steps + 1):
            step = self._step(number, list(islice(problems, self.settings.prompts)))
            self.run.steps.append(step)
            self.listener.step(step)
        self.run.after = self._evaluate("judging the trained policy")

    def _evaluate(self, phase: str) -> Evaluation:
        self.listener.phase(phase)
        with self.run.timed("evaluation"):
            return evaluate(self.policy, self.task, self.settings)

    def _step(self, number: int, problems: Sequence[Problem]) -> Step:
        begin = time.perf_counter()
        self.listener.phase("sampling")
        with self.run.timed("sampling"):
            batch = self.policy.sample(problems, self.settings.group_size, self.settings.max_new_tokens)
            scores = score_all(self.task, batch)
        self.listener.phase("learning")
        with self.run.timed("learning"):
            rewards = torch.tensor([score.reward for score in scores])
            groups = gk.group_advantages(rewards, group_size=self.settings.group_size)
            inputs, last, grad_norm = self._update(batch, groups.advantages)
        informative = int(groups.informative.sum())
        if informative or self.run.last is None:
            self.run.last = inputs
        return Step(
            step=number,
            **means(scores),
            loss=last.loss,
            kl=last.kl,
            grad_norm=grad_norm,
            informative_groups=informative,
            tokens=int(batch.mask.sum()),
            seconds=time.perf_counter() - begin,
        )

    def _update(self, batch: Batch, advantages: Tensor) -> tuple[LossInputs, Pass, float]:
        """`inner_steps` optimiser steps on one batch; the pass and the gradient norm are the last one's."""
        frozen, frozen_weight = self.policy.hidden_and_weight(batch, reference=True)
        with torch.no_grad():
            ref_logps = gk.linear_token_logps(frozen, frozen_weight, batch.targets, mask=batch.mask).logps
        old_logps: Tensor | None = None
        for _ in range(self.settings.inner_steps):
            self.optimizer.zero_grad(set_to_none=True)
            result = self._pass(batch, advantages, old_logps, ref_logps)
            grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm)
            self.optimizer.step()
            # The first pass is on-policy, so its log-probabilities are the sampler's, as the trained model has them.
            old_logps = result.logps if old_logps is None else old_logps
        assert old_logps is not None
        return LossInputs(batch, advantages, old_logps, ref_logps), result, float(grad_norm)

    def _pass(self, batch: Batch, advantages: Tensor, old_logps: Tensor | None, ref_logps: Tensor) -> Pass:
        """Loss and gradients of the batch, a few rows at a time; every part divides by the whole batch's tokens."""
        tokens = batch.mask.sum()
        outs = []
        for start in range(0, len(batch.problems), self.settings.rows_at_once):
            rows = slice(start, start + self.settings.rows_at_once)
            hidden, weight = self.policy.hidden_and_weight(batch[rows])
            out = gk.linear_grpo_loss(
                hidden,
                weight,
                batch.targets[rows],
                advantages[rows],
                batch.mask[rows],
                old_logps=None if old_logps is None else old_logps[rows],
                ref_logps=ref_logps[rows],
                denominator=tokens,
                config=self.config,
            )
            out.loss.backward()
            outs.append(out)
        kl = sum(out.metrics["kl"] * out.metrics["tokens"] for out in outs) / tokens
        loss = sum(out.loss.detach() for out in outs)
        return Pass(loss=float(loss), kl=float(kl), logps=torch.cat([out.logps for out in outs]))


def evaluate(policy: Policy, task: Task, settings: Settings) -> Evaluation:
    with torch.random.fork_rng(devices=[]):  # training draws the same numbers, judged or not
        torch.manual_seed(settings.seed + 1)
        problems = task.held_out(settings.evaluation_prompts)
        batch = policy.sample(problems, settings.evaluation_copies, settings.max_new_tokens)
    scores = score_all(task, batch)
    firsts = range(0, len(batch.problems), settings.evaluation_copies)
    return Evaluation(
        **means(scores),
        samples=len(scores),
        examples=[(batch.problems[i].question, batch.completions[i].text) for i in islice(firsts, 3)],
    )


def score_all(task: Task, batch: Batch) -> list[Score]:
    return [task.score(*pair) for pair in zip(batch.problems, batch.completions, strict=True)]


def means(scores: Sequence[Score]) -> dict[str, float]:
    return {name: fmean(getattr(score, name) for score in scores) for name in ("reward", "correct", "form")}
