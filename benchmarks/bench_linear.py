"""From hidden states: loss and the gradients of hidden and lm_head. The unit is three matmuls, the least there is."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_kernels.tools.bench.case import Case

from . import cases
from .harness import Harness


@pytest.mark.parametrize("case", cases.from_hidden(), ids=lambda case: case.name.replace(" ", "_"))
def bench_loss_from_hidden(benchmark: Any, harness: Harness, case: Case) -> None:
    harness.run(benchmark, case)
