"""Loss and the gradient of the logits; and forward, backward and no_grad alone."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_kernels.tools.bench.case import Case

from . import cases
from .harness import Harness


@pytest.mark.parametrize("case", cases.from_logits(), ids=lambda case: case.name.replace(" ", "_"))
def bench_loss_from_logits(benchmark: Any, harness: Harness, case: Case) -> None:
    harness.run(benchmark, case)
