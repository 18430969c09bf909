"""Everything that `make bench` measures, by family: `make bench ARGS="-k from_hidden"`.

The units: for losses and log-probs from logits, a copy of the logits into mapped memory (log-probs need half of it);
for hidden states, the three matmuls that a gradient needs; elsewhere, a copy of the input.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.tools.bench.case import Case
from grpo_kernels.tools.bench.lengths import LENGTHS

from . import cases, eager
from .harness import Harness

SMOKE_LENGTHS = (5, 9, 7)
NEAR_DUPLICATES = 0.9  # the similarity above which a completion is a near-duplicate


def named(family: str, measured: list[Case]) -> list[Any]:
    return [pytest.param(case, id=f"{family}-{case.name.replace(' ', '_')}") for case in measured]


@pytest.mark.parametrize(
    "case",
    [
        *named("from_logits", cases.from_logits()),
        *named("from_hidden", cases.from_hidden()),
        *named("log_probs", cases.log_probs()),
        *named("from_log_probs", cases.from_log_probs()),
        *named("advantages", cases.advantages()),
    ],
)
def bench_case(benchmark: Any, harness: Harness, case: Case) -> None:
    harness.run(benchmark, case)


@pytest.mark.parametrize("case", [cases.from_logits()[0], cases.from_hidden()[0]], ids=lambda case: case.task.path)
def bench_new_lengths(benchmark: Any, harness: Harness, case: Case) -> None:
    """A new completion length at every step: times the first call at each length and the second. Who recompiles?"""
    harness.run_lengths(benchmark, case, LENGTHS if harness.full else SMOKE_LENGTHS)


@pytest.mark.parametrize("data", ["random", "zipf", "near"])
@pytest.mark.parametrize("group, ngram", [(16, 1), (16, 3), (0, 1)])  # 0: all in one group
def bench_diversity(benchmark: Any, harness: Harness, data: str, group: int, ngram: int) -> None:
    """The baseline for groups of 16 is a double loop over Python sets. It would need a quarter of an hour for the eight
    million pairs of one group, whose baseline is a product of membership matrices [completions, vocabulary]."""
    ids = cases.completions(data, *((4096, 4096) if harness.full else (32, 24)))
    size = group or len(ids)

    def baseline() -> tuple[Tensor, ...]:
        if group:
            return eager.diversity_by_sets(ids, size, ngram, NEAR_DUPLICATES)
        return eager.diversity_by_matrices(ids, cases.VOCAB, NEAR_DUPLICATES)

    def ours() -> tuple[Tensor, ...]:
        return tuple(gk.group_diversity(ids, group_size=size, ngram=ngram, threshold=NEAR_DUPLICATES))

    name = f"diversity {list(ids.shape)} {data}, groups of {size}, ngram {ngram}"
    harness.run_calls(benchmark, name, ours, baseline, lambda: (ids.clone(),), 1e-6)
