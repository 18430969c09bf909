"""From hidden states: loss and the gradients of hidden and lm_head. The unit is three matmuls, the least there is."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.testing.bench import SHAPES

from . import eager
from .batch import Tokens, sampled_tokens
from .bench_losses import DTYPES, SMOKE_GRID, SMOKE_VOCAB, config_of, with_gradient
from .harness import Case, Harness, compiled

SHAPE, GRID, SMOKE_HIDDEN = SHAPES["smollm2"], (8, 128), 32
LOGITS_DEVIATION = 3.0
VARIANTS = ("single pass", "recompute")
ROUNDS = {"ours": 3, "copy": 3, "eager": 2, "compile": 2}  # of a second each
# Eager rounds logits and gradient to bf16 before two more matmuls; ours rounds at other places.
TOLERANCES = {"bf16": 2e-2, "fp32": 1e-4}
CASES = [("bf16", "clip"), ("bf16", "clip 60% filled"), ("fp32", "clip")]
PARAMETERS = [(*case, variant) for case in CASES for variant in VARIANTS]


@functools.lru_cache(maxsize=1)
def linear_batch(dtype: str, full: bool) -> tuple[Tensor, Tensor, Tokens]:
    grid, vocab, width = (GRID, SHAPE.vocab, SHAPE.hidden) if full else (SMOKE_GRID, SMOKE_VOCAB, SMOKE_HIDDEN)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*grid, width, generator=generator).to(DTYPES[dtype])
    weight = (torch.randn(vocab, width, generator=generator) * (LOGITS_DEVIATION * width**-0.5)).to(DTYPES[dtype])
    rows = hidden.view(-1, width)
    tokens = sampled_tokens(lambda part: rows[part] @ weight.t(), grid, seed=1)
    return hidden.requires_grad_(), weight.requires_grad_(), tokens


def build(dtype: str, kind: str, harness: Harness) -> Case:
    hidden, weight, tokens = linear_batch(dtype, harness.full)
    tokens = tokens.filled(0.6) if "filled" in kind else tokens
    config = config_of("clip")

    def ours(single_pass: bool) -> tuple[Tensor, ...]:
        output = gk.linear_grpo_loss(
            hidden, weight, *tokens.arguments, old_logps=tokens.old_logps, config=config, single_pass=single_pass,
            backend="cpu",
        )  # fmt: skip
        return with_gradient(output.loss, hidden, weight)

    def baseline(function: Any) -> tuple[Tensor, ...]:
        return with_gradient(function(hidden, weight, tokens, 0.0, 0.0, "token"), hidden, weight)

    graph = compiled(eager.linear_grpo_loss, dtype) if harness.full and kind == "clip" else None
    return Case(
        name=f"linear smollm2 {dtype} {kind}",
        ours={"single pass": lambda: ours(True), "recompute": lambda: ours(False)},
        eager=lambda: baseline(eager.linear_grpo_loss),
        compiled=None if graph is None else lambda: baseline(graph),
        unit=("3 matmuls", matmuls(hidden, weight, tokens.mask)),
        tolerance=TOLERANCES[dtype],
        rounds=ROUNDS,
    )


def matmuls(hidden: Tensor, weight: Tensor, mask: Tensor) -> Any:
    """Logits of the active rows and both gradients into mapped memory: 6 N H V operations."""
    rows, head = hidden.detach()[mask], weight.detach()
    logits = torch.zeros(rows.shape[0], head.shape[0], dtype=head.dtype)
    g_hidden, g_weight = torch.zeros_like(rows), torch.zeros_like(head)

    def run() -> None:
        torch.mm(rows, head.t(), out=logits)
        torch.mm(logits, head, out=g_hidden)
        torch.mm(logits.t(), rows, out=g_weight)

    return run


@pytest.mark.parametrize(("dtype", "kind", "variant"), PARAMETERS, ids=lambda x: x.replace(" ", "_"))
def bench_linear_loss_and_gradients(benchmark: Any, harness: Harness, dtype: str, kind: str, variant: str) -> None:
    harness.run(benchmark, ("linear", dtype, kind), variant, lambda: build(dtype, kind, harness))
