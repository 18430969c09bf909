"""Milliseconds, each with those of a copy of the input. `kernel_ms` is measured between events behind a sleep kernel,
which hides the host; `host_ms` is the time of Python and the launches."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.tools.providers import Task, both, providers
from grpo_kernels.tools.providers.batch import Batch, logits_batch, produced, rewards_batch, tokens_batch, values_batch

from .case import Case, Context
from .measure import host_milliseconds, milliseconds
from .protocol import Figures

VOCABULARIES = (151936, 32000, 50257, 128256, 262144)  # the most important first, since time may run out
LOGITS = 1 << 28  # approximate number: half a gigabyte in bfloat16, ten times the L2
BT_SHAPES = ((64, 1024), (512, 4096))
TUNED = 151936


def rows_batch(context: Context, vocab: int) -> Batch:
    if context.small:
        return logits_batch((2, 3), 1031, torch.bfloat16)
    return logits_batch((8, LOGITS // vocab // 8), vocab, torch.bfloat16, device=context.device)


def copy_milliseconds(context: Context, read: Tensor) -> float:
    target = torch.empty_like(read)
    return milliseconds(lambda: target.copy_(read), context.device)


def figures(context: Context, call: Callable[[], object], read: Tensor) -> Figures:
    """`read` is the input that the unit copies."""
    copy = copy_milliseconds(context, read)
    kernel = milliseconds(call, context.device)
    return {
        "kernel_ms": kernel, "copy_ms": copy, "copies": round(kernel / copy, 3),
        "host_ms": host_milliseconds(call, context.device, 3 if context.small else 20),
    }  # fmt: skip


def forward(context: Context, vocab: int) -> Figures:
    batch = rows_batch(context, vocab)
    t = batch.tokens

    @torch.no_grad()
    def call() -> object:
        return gk.token_logps(batch.source, t.targets, mask=t.mask, backend=context.kernels)

    return figures(context, call, batch.source)


def loss(context: Context, vocab: int, inplace: bool) -> Figures:
    """Loss and gradient. In place, the second call reads the first one's gradient, which takes the same time."""
    batch = rows_batch(context, vocab)
    t = batch.tokens
    config = gk.LossConfig(kl_coef=0.04)

    def call() -> object:
        x = produced(batch.source) if inplace else batch.source.detach().requires_grad_()
        out = gk.grpo_loss(
            x, t.targets, t.advantages, t.mask, old_logps=t.old_logps, ref_logps=t.ref_logps, config=config,
            inplace=inplace, backend=context.kernels,
        )  # fmt: skip
        return torch.autograd.grad(out.loss, x)

    return figures(context, call, batch.source)


def policy(context: Context, bt_shape: tuple[int, int], **config: Any) -> Figures:
    t = tokens_batch((2, 9) if context.small else bt_shape, device=context.device).tokens
    chosen = gk.LossConfig(kl_coef=0.04, **config)

    def call() -> object:
        x = t.logps.detach().requires_grad_()
        out = gk.policy_loss(
            x, t.advantages, t.mask, old_logps=t.old_logps, ref_logps=t.ref_logps, config=chosen,
            backend=context.kernels,
        )  # fmt: skip
        return torch.autograd.grad(out.loss, x)

    return figures(context, call, t.logps)


def groups(context: Context) -> Figures:
    rewards = rewards_batch(64 if context.small else 16384, 16, device=context.device).source
    return figures(context, lambda: gk.group_advantages(rewards, group_size=16, backend=context.kernels), rewards)


def returns(context: Context) -> Figures:
    b = values_batch((2, 9) if context.small else (512, 4096), device=context.device)
    mask = b.tokens.mask
    return figures(
        context, lambda: gk.gae(b.rewards, b.values, mask, gamma=0.99, lam=0.95, backend=context.kernels), b.source
    )


def cases(context: Context) -> Iterator[Case]:
    triton = context.backend == "triton"

    def family(vocab: int) -> str:
        return "triton" if triton else "clusters" if vocab > 110_000 else "rows"

    first, waits = VOCABULARIES[0], "triton" if triton else "waits"
    inplace = functools.partial(loss, inplace=True)
    yield Case(f"loss in place {first}", family(first), functools.partial(inplace, vocab=first))
    yield Case(f"log-probs {first}", family(first), functools.partial(forward, vocab=first))
    for bt_shape in BT_SHAPES:
        yield Case(f"tokens {bt_shape[0]} x {bt_shape[1]}", waits, functools.partial(policy, bt_shape=bt_shape))
    yield Case("16384 rewards in groups of 16", "triton" if triton else "plain", groups)
    yield Case("gae 512 x 4096", waits, returns)
    for vocab in VOCABULARIES[1:]:
        yield Case(f"loss in place {vocab}", family(vocab), functools.partial(inplace, vocab=vocab))
        yield Case(f"log-probs {vocab}", family(vocab), functools.partial(forward, vocab=vocab))
    yield Case(f"loss {first}", family(first), functools.partial(loss, vocab=first, inplace=False))


# ---- peers, launch configurations, traffic ----


def peer(context: Context, name: str) -> Figures:
    batch, task = rows_batch(context, VOCABULARIES[0]), Task()
    provider = next(p for p in providers(context.device) if p.name == name)
    run = provider.build(task, batch)

    def call() -> object:
        if run.restore is not None:
            run.restore()
        return both(run)

    return {**figures(context, call, batch.source), "restored": run.restore is not None}


def peers(context: Context) -> Iterator[Case]:
    """The installed providers, without those that compile, which would take longer than everything else."""
    ours = [p.name for p in providers(context.device) if p.name.startswith("ours")]
    for provider in providers(context.device):
        here = provider.missing(context.device) is None and provider.unsupported(Task()) is None
        if here and not provider.compiles and provider.name not in ours:
            yield Case(f"peer {provider.name}", "peers", functools.partial(peer, name=provider.name))


def candidate(context: Context, config: Any) -> Figures:
    """A launch configuration instead of the table's."""
    from triton.runtime.errors import OutOfResources

    from grpo_kernels.backends.triton import tuning

    with mock.patch.object(tuning, "config_of", lambda *_: config):
        try:
            kinds = {"log-probs": forward(context, TUNED), "loss": loss(context, TUNED, inplace=False)}
        except OutOfResources as error:
            return {"unfit": str(error)}
    return {kind: {name: x[name] for name in ("kernel_ms", "copies")} for kind, x in kinds.items()}


def tuning(context: Context) -> Iterator[Case]:
    """One case per configuration, since each compiles."""
    from grpo_kernels.backends.triton import tuning

    for config in tuning.CANDIDATES[: 2 if context.small else None]:
        run = functools.partial(candidate, config=config)
        yield Case(f"candidate {', '.join(map(str, config))}", "triton", run)


def moved(context: Context, kind: str) -> Figures:
    """One launch of each kind on logits of a realistic vocabulary, for a profiler to count its bytes."""
    batch = rows_batch(context, TUNED)
    t, x = batch.tokens, batch.source
    if kind == "log-probs":
        with torch.no_grad():
            gk.token_logps(x, t.targets, mask=t.mask, backend=context.kernels)
    else:
        inplace = kind == "loss in place"
        x = produced(x) if inplace else x.requires_grad_()
        out = gk.grpo_loss(x, t.targets, t.advantages, t.mask, inplace=inplace, backend=context.kernels)
        torch.autograd.grad(out.loss, x)
    context.synchronize()
    print(json.dumps({"logits": batch.source.numel()}), flush=True)
    return {}


def traffic(context: Context) -> Iterator[Case]:
    family = "triton" if context.backend == "triton" else "clusters"
    for kind in ("log-probs", "loss", "loss in place"):
        yield Case(f"bytes of {kind}", family, functools.partial(moved, kind=kind))
