"""Log-probs of the targets without and with entropy: one read of the logits is half of a copy."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_kernels.tools.bench.case import Case

from . import cases
from .harness import Harness


@pytest.mark.parametrize("case", cases.log_probs(), ids=lambda case: case.name.replace(" ", "_"))
def bench_log_probs(benchmark: Any, harness: Harness, case: Case) -> None:
    harness.run(benchmark, case)
