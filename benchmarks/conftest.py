"""`pytest benchmarks`: tiny inputs, once. `pytest benchmarks -o addopts= --benchmark-only --full`: the measurement.

pytest-benchmark times ours; its extra_info holds the medians of all providers taking turns, from which the ratios are.
"""

from __future__ import annotations

from typing import Any

import pytest

from grpo_kernels.testing.bench import machine_info

from .harness import Harness
from .report import comparison_table, machine_line

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
    machine_info["grpo_kernels"] = _machine()


def _machine() -> dict[str, Any]:
    return machine_info()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = config.stash[HARNESS].reports
    if reports:
        terminalreporter.section("grpo_kernels: medians of providers taking turns")
        terminalreporter.write_line(machine_line(machine_info()))
        terminalreporter.write_line(comparison_table(reports))
