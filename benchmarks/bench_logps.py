"""Log-probs of the targets without and with entropy, forward only: one read of the logits, half of a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels as gk

from . import eager
from .bench_losses import DTYPES, GRIDS, logits_batch
from .harness import Case, Harness, compiled

KINDS = ("logps", "logps 60% filled", "logps+entropy")
PARAMETERS = [
    (shape, dtype, kind)
    for shape in GRIDS
    for dtype in DTYPES
    for kind in KINDS
    if dtype == "bf16" or "filled" not in kind
]


def build(shape: str, dtype: str, kind: str, harness: Harness) -> Case:
    batch = logits_batch(shape, dtype, False, harness.full)
    batch = batch.filled(0.6) if "filled" in kind else batch
    targets, mask, entropy = batch.tokens.targets, batch.tokens.mask, "entropy" in kind

    @torch.no_grad()
    def ours() -> tuple[Tensor, ...]:
        found = gk.token_logps(batch.logits, targets, mask=mask, return_entropy=entropy, backend="cpu")
        return (found.logps, found.entropy) if found.entropy is not None else (found.logps,)

    @torch.no_grad()
    def baseline(function: Any) -> tuple[Tensor, ...]:
        found = function(batch.logits, targets)
        return tuple(x * mask for x in (found if entropy else (found,)))

    function = eager.token_logps_and_entropy if entropy else eager.token_logps
    graph = compiled(function, (shape, dtype, entropy)) if harness.full else None
    return Case(
        name=f"{shape} {dtype} {kind}",
        ours={"forward": ours},
        eager=lambda: baseline(function),
        compiled=None if graph is None else lambda: baseline(graph),
        unit=("copy", lambda: batch.out.copy_(batch.logits)),
        tolerance=1e-5,
    )


@pytest.mark.parametrize(("shape", "dtype", "kind"), PARAMETERS, ids=lambda x: x.replace(" ", "_"))
def bench_logps(benchmark: Any, harness: Harness, shape: str, dtype: str, kind: str) -> None:
    harness.run(benchmark, ("logps", shape, dtype, kind), "forward", lambda: build(shape, dtype, kind, harness))
