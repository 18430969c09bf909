"""A new completion length at every step: who compiles again. The first call at each length, and the same again."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_kernels.tools.bench.case import Case
from grpo_kernels.tools.bench.lengths import LENGTHS

from . import cases
from .harness import Harness

SMOKE_LENGTHS = (5, 9, 7)


@pytest.mark.parametrize("case", [cases.from_logits()[0], cases.from_hidden()[0]], ids=lambda case: case.task.path)
def bench_new_lengths(benchmark: Any, harness: Harness, case: Case) -> None:
    harness.run_lengths(benchmark, case, LENGTHS if harness.full else SMOKE_LENGTHS)
