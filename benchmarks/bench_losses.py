"""Loss and the gradient of the logits, upstream gradient 1."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.testing.bench import SHAPES, produced

from . import eager
from .batch import Batch, Tokens, make_batch
from .harness import Call, Case, Harness, compiled

GRIDS = {"qwen2.5": (4, 128), "smollm2": (8, 128)}  # sequences, tokens
SMOKE_GRID, SMOKE_VOCAB = (2, 9), 1009
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCES = {"bf16": 5e-3, "fp32": 1e-4}  # a bf16 gradient is rounded once

KINDS: dict[str, tuple[float, float, str]] = {  # kl_coef, entropy_coef, ratio level
    "clip": (0.0, 0.0, "token"),
    "clip 60% filled": (0.0, 0.0, "token"),
    "kl": (0.04, 0.0, "token"),
    "entropy": (0.0, 0.01, "token"),
    "kl+entropy": (0.04, 0.01, "token"),
    "sequence": (0.0, 0.0, "sequence"),
    "clip peaked": (0.0, 0.0, "token"),
}
FEWER_KINDS = ("clip", "kl+entropy", "sequence")  # in fp32, and of torch.compile: each takes seconds to compile
SINGLE, TWO = ("in place", "out of place"), ("in place, two passes", "out of place, two passes")
PARAMETERS = [
    (shape, dtype, kind, variant)
    for shape in GRIDS
    for dtype in DTYPES
    for kind, (*_, level) in KINDS.items()
    if dtype == "bf16" or kind in FEWER_KINDS
    for variant in (TWO if level == "sequence" else SINGLE + TWO if kind in ("clip", "kl+entropy") else SINGLE)
]


@functools.lru_cache(maxsize=1)
def logits_batch(shape: str, dtype: str, peaked: bool, full: bool) -> Batch:
    grid, vocab = (GRIDS[shape], SHAPES[shape].vocab) if full else (SMOKE_GRID, SMOKE_VOCAB)
    return make_batch(grid, vocab, DTYPES[dtype], peaked=peaked)


def with_gradient(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def config_of(kind: str) -> gk.LossConfig:
    kl_coef, entropy_coef, level = KINDS[kind]
    aggregation = "token_mean" if level == "token" else "sequence_mean"
    return gk.LossConfig(
        eps_low=eager.EPS, kl_coef=kl_coef, entropy_coef=entropy_coef, ratio_level=level, aggregation=aggregation
    )


def ours(batch: Batch, tokens: Tokens, config: gk.LossConfig, *, inplace: bool, single_pass: bool) -> Call:
    # Read outside the timing, and of either memory: an in-place run may have overwritten the buffer only.
    source = batch.buffer if inplace else batch.logits

    def call() -> tuple[Tensor, ...]:
        logits = produced(source)
        output = gk.grpo_loss(
            logits, *tokens.arguments, old_logps=tokens.old_logps, ref_logps=tokens.ref_logps, config=config,
            inplace=inplace, single_pass=single_pass, backend="cpu",
        )  # fmt: skip
        return with_gradient(output.loss, logits)

    return call


def build(shape: str, dtype: str, kind: str, variants: tuple[str, ...], harness: Harness) -> Case:
    batch = logits_batch(shape, dtype, "peaked" in kind, harness.full)
    if "filled" in kind:
        batch = batch.filled(0.6)
    tokens, numbers = batch.tokens, KINDS[kind]

    def baseline(function: Any) -> tuple[Tensor, ...]:
        logits = produced(batch.logits)
        return with_gradient(function(logits, tokens, *numbers), logits)

    graph = compiled(eager.grpo_loss, (shape, dtype, numbers)) if harness.full and kind in FEWER_KINDS else None
    return Case(
        name=f"loss {shape} {dtype} {kind}",
        ours={
            name: ours(batch, tokens, config_of(kind), inplace=name.startswith("in"), single_pass="two" not in name)
            for name in variants
        },
        eager=lambda: baseline(eager.grpo_loss),
        compiled=None if graph is None else lambda: baseline(graph),
        unit=("copy", lambda: batch.out.copy_(batch.logits)),
        setup=batch.restore,
        tolerance=TOLERANCES[dtype],
    )


@pytest.mark.parametrize(("shape", "dtype", "kind", "variant"), PARAMETERS, ids=lambda x: x.replace(" ", "_"))
def bench_loss_and_gradient(benchmark: Any, harness: Harness, shape: str, dtype: str, kind: str, variant: str) -> None:
    variants = tuple(v for s, d, k, v in PARAMETERS if (s, d, k) == (shape, dtype, kind))
    key = ("loss", shape, dtype, kind)
    harness.run(benchmark, key, variant, lambda: build(shape, dtype, kind, variants, harness))
