"""GRPO from end to end: sample groups, score them by rule, standardise within the group, take a fused-loss step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
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


SMOLLM = Settings(steps=15, prompts=4, group_size=8, max_new_tokens=14, learning_rate=1e-5, kl_coef=0.02, inner_steps=2)
SYNTHETIC = Settings(
    steps=150, prompts=16, group_size=16, max_new_tokens=10, learning_rate=5e-3, kl_coef=1e-3, evaluation_copies=16
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
        _train(run, policy, task, listener)
    except KeyboardInterrupt:
        run.interrupted = True
    return run


def _train(run: Run, policy: Policy, task: Task, listener: Listener) -> None:
    settings = run.settings
    torch.manual_seed(settings.seed)
    problems = task.training(random.Random(settings.seed))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0)

    listener.phase("judging the untrained policy")
    with run.timed("evaluation"):
        run.before = evaluate(policy, task, settings)
    for index in range(settings.steps):
        _train_step(run, index + 1, policy, task, list(islice(problems, settings.prompts)), optimizer, listener)
    listener.phase("judging the trained policy")
    with run.timed("evaluation"):
        run.after = evaluate(policy, task, settings)


def evaluate(policy: Policy, task: Task, settings: Settings) -> Evaluation:
    with torch.random.fork_rng(devices=[]):  # training draws the same numbers, judged or not
        torch.manual_seed(settings.seed + 1)
        problems = task.held_out(settings.evaluation_prompts)
        batch = policy.sample(problems, settings.evaluation_copies, settings.max_new_tokens)
    scores = _scores(task, batch)
    firsts = range(0, len(batch.problems), settings.evaluation_copies)
    return Evaluation(
        reward=_mean(score.reward for score in scores),
        correct=_mean(score.correct for score in scores),
        form=_mean(score.form for score in scores),
        samples=len(scores),
        examples=[(batch.problems[i].question, batch.completions[i].text) for i in islice(firsts, 3)],
    )


def _train_step(
    run: Run,
    index: int,
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    optimizer: torch.optim.Optimizer,
    listener: Listener,
) -> None:
    begin = time.perf_counter()
    listener.phase("sampling")
    with run.timed("sampling"):
        batch = policy.sample(problems, run.settings.group_size, run.settings.max_new_tokens)
        scores = _scores(task, batch)
    listener.phase("learning")
    with run.timed("learning"):
        rewards = torch.tensor([score.reward for score in scores])
        groups = gk.group_advantages(rewards, group_size=run.settings.group_size)
        inputs, loss, kl, grad_norm = _update(policy, batch, groups.advantages, optimizer, run.settings)
    informative = int(groups.informative.sum())
    if informative or run.last is None:
        run.last = inputs
    step = Step(
        step=index,
        reward=rewards.mean().item(),
        correct=_mean(score.correct for score in scores),
        form=_mean(score.form for score in scores),
        loss=loss,
        kl=kl,
        grad_norm=grad_norm,
        informative_groups=informative,
        tokens=int(batch.mask.sum()),
        seconds=time.perf_counter() - begin,
    )
    run.steps.append(step)
    listener.step(step)


def _update(
    policy: Policy, batch: Batch, advantages: Tensor, optimizer: torch.optim.Optimizer, settings: Settings
) -> tuple[LossInputs, float, float, float]:
    """`inner_steps` optimiser steps on one batch; the last one's loss, KL to the reference and gradient norm."""
    frozen, frozen_weight = policy.hidden_and_weight(batch, reference=True)
    with torch.no_grad():
        ref_logps = gk.linear_token_logps(frozen, frozen_weight, batch.targets, mask=batch.mask).logps
    old_logps: Tensor | None = None
    for _ in range(settings.inner_steps):
        hidden, weight = policy.hidden_and_weight(batch)
        out = gk.linear_grpo_loss(
            hidden,
            weight,
            batch.targets,
            advantages,
            batch.mask,
            old_logps=old_logps,  # None: on-policy, the ratio is 1
            ref_logps=ref_logps,
            config=settings.loss_config(),
        )
        if old_logps is None:
            old_logps = out.logps  # what the sampler's log-probabilities were, by the model that is being trained
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
    assert old_logps is not None
    kl = _mean_kl(out.logps, ref_logps, batch.mask)
    return LossInputs(batch, advantages, old_logps, ref_logps), out.loss.item(), kl, float(grad_norm)


def _mean_kl(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> float:
    u = (ref_logps - logps)[mask]
    return (torch.expm1(u) - u).mean().item()


def _scores(task: Task, batch: Batch) -> list[Score]:
    return [task.score(*pair) for pair in zip(batch.problems, batch.completions, strict=True)]


def _mean(values: Iterator[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
