"""Group-normalised advantages of 16,384 rewards; GAE over 512 sequences of 4096 tokens, whitened."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_kernels.tools.bench.case import Case

from . import cases
from .harness import Harness


@pytest.mark.parametrize("case", cases.advantages(), ids=lambda case: case.name.replace(" ", "_"))
def bench_advantages(benchmark: Any, harness: Harness, case: Case) -> None:
    harness.run(benchmark, case)
