"""Repeats kernels whose blocks wait for each other, with more blocks than fit, alone and next to other kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from .case import Case, Context
from .compare import same_bits
from .others import FORMS, bt_inputs, gae_of, policy, token_inputs
from .protocol import Figures

ROUNDS = 30
Round = Callable[[], Mapping[str, Tensor]]


def gae_round(context: Context) -> Round:
    shape = (4, 77) if context.small else (64, 65536)
    inputs = bt_inputs(context, "stress gae", shape)
    return lambda: gae_of(inputs, context.kernels)


def ratio_round(context: Context) -> Round:
    shape = (4, 77) if context.small else (512, 8192)
    inputs = token_inputs(context, "stress ratio", shape)
    return lambda: policy(inputs, context.kernels, **FORMS["level sequence"])


def repeated(context: Context, make: Callable[[Context], Round]) -> Figures:
    run = make(context)
    first = run()
    for turn in range(3 if context.small else ROUNDS):
        same_bits(first, run(), f"round {turn}")
    return {"rounds": ROUNDS}


def stream(context: Context) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if context.small else torch.cuda.stream(torch.cuda.Stream())


def together(context: Context) -> Figures:
    """Both on two streams, with a matmul on a third that occupies multiprocessors."""
    rounds = [gae_round(context), ratio_round(context)]
    first = [run() for run in rounds]
    a = torch.randn(64 if context.small else 8192, 64 if context.small else 8192, device=context.device).bfloat16()
    context.synchronize()
    streams = [stream(context) for _ in range(3)]
    for turn in range(3 if context.small else ROUNDS):
        with streams[2]:
            product = a @ a
        results = []
        for run, on in zip(rounds, streams, strict=False):
            with on:
                results.append(run())
        context.synchronize()  # before another stream reuses the results' memory
        for mine, expected in zip(results, first, strict=True):
            same_bits(expected, mine, f"round {turn}, together")
        del product
    return {"rounds": ROUNDS}


def cases(context: Context) -> Iterator[Case]:
    yield Case("gae again and again", "waits", functools.partial(repeated, make=gae_round))
    yield Case("sequence ratios again and again", "waits", functools.partial(repeated, make=ratio_round))
    yield Case("together on three streams", "waits", together)
