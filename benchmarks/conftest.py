"""`pytest benchmarks`: tiny inputs, once. `pytest benchmarks -o addopts= --benchmark-only --full`: the measurement.

pytest-benchmark times ours. Its extra_info has the record of all providers, interleaved, which the report uses.
"""

from __future__ import annotations

from typing import Any

import pytest

from grpo_kernels.tools import environment
from grpo_kernels.tools.bench.results import of_this_machine
from grpo_kernels.tools.bench.table import overview_table

from .harness import Harness

HARNESS = pytest.StashKey[Harness]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: the shapes of real models, and torch.compile")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_")
    measuring = not config.getoption("benchmark_disable") or config.getoption("benchmark_enable")
    config.stash[HARNESS] = Harness(full=config.getoption("full"), measuring=measuring)


@pytest.fixture
def harness(request: pytest.FixtureRequest) -> Harness:
    return request.config.stash[HARNESS]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["grpo_kernels"] = environment.machine_info()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    records = config.stash[HARNESS].records
    if records:
        terminalreporter.section(
            "grpo_kernels: medians of interleaved runs; values below 1x mean the other implementation is faster"
        )
        terminalreporter.write_line(of_this_machine(records, "").caption)
        terminalreporter.write_line(overview_table(records).markdown())
