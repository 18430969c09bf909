"""Checks that no call synchronises, and that each can be captured and replayed on other inputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import grpo_kernels as gk

from . import others, rows
from .case import Case, Context
from .compare import same_bits
from .measure import milliseconds
from .protocol import Figures

Call = Callable[[Mapping[str, Any], str], Mapping[str, Tensor]]
WARM_UP = 3


class Replayed:
    """A call captured once. On a CPU, which has no graphs, a replay calls again and overwrites the first results."""

    def __init__(self, context: Context, call: Callable[[], Mapping[str, Tensor]]) -> None:
        self._call, self._graph = call, None
        if context.small:
            self.results = call()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.results = call()

    def replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for name, x in self._call().items():
            self.results[name].copy_(x)


@contextlib.contextmanager
def no_waiting(context: Context) -> Iterator[None]:
    """Raises an error at every synchronisation."""
    if context.small:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def waits(context: Context, inputs_of: Callable[..., Mapping[str, Any]], call: Call, name: str) -> Figures:
    inputs = inputs_of(context, name)
    call(inputs, context.kernels)  # the first call may synchronise
    context.synchronize()
    with no_waiting(context):
        call(inputs, context.kernels)
    return {}


def captured(context: Context, inputs_of: Callable[..., Mapping[str, Any]], call: Call, name: str) -> Figures:
    """A replay on new numbers gives the result of a call on them."""
    inputs, fresh = inputs_of(context, name), inputs_of(context, f"{name}, fresh")
    graph = Replayed(context, lambda: call(inputs, context.kernels))
    for key, x in inputs.items():
        if torch.is_tensor(x):
            x.copy_(fresh[key])
    graph.replay()
    context.synchronize()
    same_bits(call(fresh, context.kernels), graph.results, "replayed")
    return {"replay_ms": milliseconds(graph.replay, context.device, rounds=3)}


def annealed(context: Context, name: str) -> dict[str, Any]:
    """A KL coefficient on the device, which every replay reads again."""
    g = context.generator(name)
    coefficient = torch.rand((), generator=g, device=context.device)
    return {**others.token_inputs(context, name, shape=(3, 50)), "kl_coef": coefficient}


def annealed_policy(inputs: Mapping[str, Any], backend: str) -> dict[str, Tensor]:
    x = inputs["logps"].clone().requires_grad_()
    out = gk.policy_loss(
        x, inputs["advantages"], inputs["mask"], ref_logps=inputs["ref_logps"],
        config=gk.LossConfig(kl_coef=inputs["kl_coef"]), backend=backend,
    )  # fmt: skip
    return {"loss": out.loss.detach(), "gradient": torch.autograd.grad(out.loss, x)[0]}


def coefficients_on_the_device(context: Context) -> bool:
    """Whether this version of the library accepts them."""
    try:
        gk.LossConfig(kl_coef=torch.tensor(0.1, device=context.device))
    except (TypeError, ValueError):
        return False
    return True


def linear_inputs(context: Context, name: str) -> dict[str, Any]:
    g = context.generator(name)
    hidden, weight = (torch.randn(n, 64, generator=g, device=context.device) / 8 for n in (150, 1000))
    targets = torch.randint(1000, (3, 50), generator=g, device=context.device)
    tokens = others.token_inputs(context, name, shape=(3, 50))
    return {"hidden": hidden.view(3, 50, 64), "weight": weight, "targets": targets, **tokens}


def linear(inputs: Mapping[str, Any], backend: str) -> dict[str, Tensor]:
    leaves = [inputs[name].clone().requires_grad_() for name in ("hidden", "weight")]
    out = gk.linear_grpo_loss(*leaves, inputs["targets"], inputs["advantages"], inputs["mask"], backend=backend)
    gradients = torch.autograd.grad(out.loss, leaves)
    return {"loss": out.loss.detach(), "hidden": gradients[0], "weight": gradients[1]}


def calls(context: Context) -> Iterator[tuple[str, str, Any, Call]]:
    """Name, family, inputs and call of each public function."""

    def logits(context: Context, name: str) -> dict[str, Any]:
        return rows.inputs_of(rows.Rows(1024, torch.bfloat16, 8), context, name)

    tokens = functools.partial(others.token_inputs, shape=(3, 50))
    packed = functools.partial(others.token_inputs, shape=(100,), cu=(0, 20, 21, 90))
    bt_inputs = functools.partial(others.bt_inputs, shape=(3, 50))
    rewards = functools.partial(others.reward_inputs, samples=64)
    yield "grpo_loss", "rows", logits, rows.loss
    inplace = context.kernels != "reference"
    yield "grpo_loss in place", "rows", logits, functools.partial(rows.loss, inplace=inplace)
    yield "token_logps", "rows", logits, rows.logps
    yield "linear_grpo_loss", "rows", linear_inputs, linear
    for name, options in others.FORMS.items():
        yield f"policy_loss, {name}", "waits", tokens, functools.partial(others.policy, **options)
    yield "policy_loss packed", "waits", packed, functools.partial(others.policy, **others.FORMS["level sequence"])
    yield "value_loss", "plain", bt_inputs, others.value_of
    yield "whiten", "plain", bt_inputs, others.whitened
    yield "gae", "waits", bt_inputs, others.gae_of
    for size in (16, None):
        call = functools.partial(others.advantages, size=size, scale="group")
        yield f"group_advantages, size {size}", "plain", rewards, call
    ids = functools.partial(others.token_ids, samples=12, tokens=40)
    yield "group_diversity", "waits", ids, functools.partial(others.diverse, ngram=2)
    if coefficients_on_the_device(context):
        yield "policy_loss, kl_coef on the device", "waits", annealed, annealed_policy


def cases(context: Context) -> Iterator[Case]:
    for name, family, inputs, call in calls(context):
        family = "triton" if context.backend == "triton" else family
        for kind, what in (("no wait", waits), ("graph", captured)):
            run = functools.partial(what, inputs_of=inputs, call=call, name=name)
            yield Case(f"{kind}: {name}", family, run)
