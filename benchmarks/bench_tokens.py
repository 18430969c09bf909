"""Every loss from log-probs: the token kernel, without a vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_kernels.tools.bench.case import Case

from . import cases
from .harness import Harness


@pytest.mark.parametrize("case", cases.from_log_probs(), ids=lambda case: case.name.replace(" ", "_"))
def bench_loss_from_log_probs(benchmark: Any, harness: Harness, case: Case) -> None:
    harness.run(benchmark, case)
