"""The benchmarks run, on tiny inputs and without torch.compile; what they are built of is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_kernels.testing import bench

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="installed without the benchmarks")


def python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_benchmark_runs_and_agrees_with_eager() -> None:
    output = python("-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-o", "addopts=--benchmark-disable")
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) >= 60
    assert not re.search(r"failed|skipped|error", output)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    file = tmp_path_factory.mktemp("benchmarks") / "results.json"
    chosen = "advantages or (smollm2 and bf16 and kl and not entropy)"
    output = python(
        "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--benchmark-only",
        f"--benchmark-json={file}", "-k", chosen,
    )  # fmt: skip
    return output, file


def test_a_measurement_ends_with_a_table_and_stores_the_ratios(measured: tuple[str, Path]) -> None:
    output, file = measured
    content = json.loads(file.read_text())
    assert content["machine_info"]["grpo_kernels"]["torch"] == torch.__version__
    by_case = {b["extra_info"]["case"]: b["extra_info"] for b in content["benchmarks"]}
    info = by_case["loss smollm2 bf16 kl, in place"]
    assert set(info["seconds"]) == {"ours", "eager", "copy"}
    for provider, ratio in info["ratios"].items():
        assert ratio == pytest.approx(info["seconds"][provider] / info["seconds"]["ours"])
    assert 0 < info["peak_bytes"]["ours"] < info["peak_bytes"]["eager"]
    assert "| loss smollm2 bf16 kl, in place" in output


def test_the_report_repeats_that_table(measured: tuple[str, Path]) -> None:
    output, file = measured
    report = python("-m", "benchmarks.report", str(file))
    lines = [line for line in report.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5
    assert all(line in output for line in lines)


# ---- grpo_kernels.testing.bench ----


def test_providers_take_turns_in_their_numbers() -> None:
    calls: list[str] = []
    providers = {name: lambda name=name: calls.append(name) for name in ("often", "rarely")}
    seconds = bench.measure_interleaved(providers, {"often": 6, "rarely": 2}, setup=lambda: calls.append("setup"))
    assert {name: len(values) for name, values in seconds.items()} == {"often": 6, "rarely": 2}
    assert calls[::2] == ["setup"] * 10
    measured = calls[1::2][2:]  # after one untimed call each
    assert sorted(measured[:4]) == ["often", "often", "often", "rarely"]
    assert bench.medians({"x": [1.0, 9.0, 2.0]}) == {"x": 2.0}


def test_the_setup_is_not_timed() -> None:
    def slow() -> None:
        torch.randn(1 << 21)

    seconds = bench.measure_interleaved({"nothing": lambda: None}, 3, setup=slow)["nothing"]
    assert min(seconds) < 1e-3


def test_produced_logits_share_memory_and_are_no_leaf() -> None:
    logits = torch.randn(2, 3, 5)
    head = bench.produced(logits)
    assert head.requires_grad and not head.is_leaf and head.data_ptr() == logits.data_ptr()
    (gradient,) = torch.autograd.grad(head.sum(), head)
    assert gradient.shape == logits.shape and not logits.requires_grad


def test_machine_info_names_what_a_figure_depends_on() -> None:
    info = bench.machine_info()
    assert info["cpu"] and info["cores"] >= 1 and info["torch_threads"] == torch.get_num_threads()
    assert info["instruction_set"] in ("generic", "avx2", "avx512", "avx512_bf16")


def test_shapes_are_the_models_own() -> None:
    assert {name: shape.vocab for name, shape in bench.SHAPES.items()} == {
        "smollm2": 49152, "llama3": 128256, "qwen2.5": 151936, "qwen3": 151936, "gemma3": 262144,
    }  # fmt: skip
