"""The benchmarks run, on tiny inputs and without torch.compile; what they are built of is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment

from grpo_kernels.tools.bench import compare as comparing
from grpo_kernels.tools.bench import plots, report, results, table, timing
from grpo_kernels.tools.bench.case import Case, of_model
from grpo_kernels.tools.bench.clock import CudaClock, WallClock
from grpo_kernels.tools.bench.lengths import measure_lengths
from grpo_kernels.tools.bench.measure import Differs, Options, distance, measure, summary
from grpo_kernels.tools.bench.sweeps import SWEEPS
from grpo_kernels.tools.environment import machine_info
from grpo_kernels.tools.providers import (
    PATHS,
    Provider,
    Result,
    Run,
    Task,
    both,
    provider_named,
    providers,
)
from grpo_kernels.tools.providers.batch import produced, tokens_batch
from grpo_kernels.tools.providers.plain import Eager
from grpo_kernels.tools.shapes import SHAPES, shape_named

ROOT = Path(__file__).resolve().parents[2]
QUICK = Options(seconds=0.0, compile=False, strict=True)
OURS = provider_named("ours-cpu")

with_benchmarks = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="installed without the benchmarks")


def small(path: str = "logits", **changes: Any) -> Case:
    sizes = {"vocab": 499, "hidden": 16} if path == "linear" else {"vocab": 499} if path in ("logits", "logps") else {}
    return Case(**{"task": Task(path), "sequences": 3, "tokens": 7, "dtype": "fp32", **sizes, **changes})


def python(*arguments: str, status: int = 0) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(PYTHONPATH=path), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- the suite ----


@with_benchmarks
def test_every_benchmark_runs_and_everybody_agrees() -> None:
    output = python("-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-o", "addopts=--benchmark-disable")
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) >= 70
    assert not re.search(r"failed|skipped|error", output)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    file = tmp_path_factory.mktemp("benchmarks") / "results.json"
    output = python(
        "-m", "pytest", "benchmarks", "-k", "(log_probs and not from_log_probs) or new_lengths", "-q", "-p",
        "no:cacheprovider", "-o", "addopts=", "--benchmark-only", f"--benchmark-json={file}",
    )  # fmt: skip
    return output, file


@with_benchmarks
def test_a_measurement_ends_with_a_table_and_stores_everybodys_figures(measured: tuple[str, Path]) -> None:
    output, file = measured
    found = results.load(file)
    assert found.machine["torch"] == torch.__version__ and found.machine["commit"] != ""
    records = {record["case"]: record for record in found.records}
    record = records["logps [4 x 9, 1009] fp32 no grad"]
    for entry in (record["unit_seconds"], record["providers"]["ours-cpu"], record["providers"]["eager"]):
        assert 0 < entry["low"] <= entry["seconds"] <= entry["high"] and entry["rounds"] >= 3
    assert record["providers"]["eager"]["distance"] < 1e-4
    assert 0 < record["providers"]["ours-cpu"]["peak_bytes"] < record["providers"]["eager"]["peak_bytes"]
    assert "compiling takes seconds" in record["providers"]["compile"]["missing"]
    assert "| logps [4 x 9, 1009] fp32 no grad" in output


@with_benchmarks
def test_the_report_repeats_that_table(measured: tuple[str, Path]) -> None:
    output, file = measured
    lines = [line for line in python("-m", "benchmarks.report", str(file)).splitlines() if line.startswith("| logps")]
    assert len(lines) == 5 and all(line in output for line in lines)
    assert "became worse" in python("-m", "benchmarks.report", "--compare", str(file), str(file))


# ---- providers and cases ----


def test_shapes_are_the_models_own() -> None:
    assert {name: SHAPES[name].vocab for name in ("smollm2-135m", "llama3.2-1b", "qwen2.5-7b", "gemma3-1b")} == {
        "smollm2-135m": 49152, "llama3.2-1b": 128256, "qwen2.5-7b": 152064, "gemma3-1b": 262144,
    }  # fmt: skip
    for name, shape in SHAPES.items():
        size = float(re.search(r"([\d.]+)([bm])$", name)[1]) * {"b": 1e9, "m": 1e6}[name[-1]]
        assert abs(shape.parameters / size - 1) < 0.25, name
        assert shape.parameters > (1 if shape.tied else 2) * shape.vocab * shape.hidden
    assert shape_named("Qwen3-8B") is SHAPES["qwen3-8b"]
    with pytest.raises(ValueError, match="'gpt-9' is not known; choose from smollm2-135m"):
        shape_named("gpt-9")


def test_every_provider_says_what_is_missing() -> None:
    for provider in providers("cpu"):
        reason = provider.missing("cpu")
        assert reason is None or "pip install" in reason or "GPU" in reason
    names = [provider.name for provider in providers("cpu")]
    assert len(set(names)) == len(names) and {"eager", "compile", "trl", "liger", "cce", "verl", "quack"} < {*names}
    assert {p.name for p in providers("cuda")} > {"ours-cuda", "ours-triton", "trl", "liger"}
    with pytest.raises(ValueError, match="'apex' is not known"):
        provider_named("apex")


@pytest.mark.parametrize("upstream", [1.0, -0.5])
@pytest.mark.parametrize("path", PATHS)
def test_ours_runs_twice_on_every_path(path: str, upstream: float) -> None:
    """An in-place run is the same again once restored, and has not touched the batch."""
    case = small(path) if path != "advantages" else Case(Task(path), sequences=12, group_size=4, dtype="fp32")
    batch = case.batch()
    before = batch.source.clone()
    run = OURS.build(case.task, batch)
    first = [x.clone() for x in both(run, upstream)]
    if run.restore is not None:
        run.restore()
    assert all(map(torch.equal, first, both(run, upstream)))
    assert torch.equal(batch.source, before)


class Wrong(Eager):
    name = "wrong"

    def build(self, task: Task, batch: Any) -> Run:
        right = super().build(task, batch)
        return Run(lambda: Result((right.forward().outputs[0] * 1.01,), right.forward().inputs))


class Broken(Eager):
    name = "broken"

    def build(self, task: Task, batch: Any) -> Run:
        raise MemoryError("out of memory")


def test_who_computes_something_else_is_not_timed() -> None:
    record = measure(small(), [OURS, Wrong(), Broken()], replace(QUICK, strict=False))
    assert set(table.timed(record)) == {"ours-cpu"}
    reasons = table.untimed(record)
    assert "Differs" in reasons["wrong"] or "not have been used" in reasons["wrong"]
    assert reasons["broken"] == "MemoryError: out of memory"
    with pytest.raises(MemoryError):
        measure(small(), [OURS, Broken()], QUICK)
    with pytest.raises(Differs, match=r"output 1 is 1\.0e-02 from ours"):
        distance([torch.ones(3), torch.full((3,), 1.01)], [torch.ones(3), torch.ones(3)], 1e-3)


@pytest.mark.parametrize("mode", ["both", "forward", "backward", "no_grad"])
def test_every_mode_is_measured(mode: str) -> None:
    record = measure(small(mode=mode), [OURS, provider_named("eager")], QUICK)
    for entry in table.timed(record).values():
        assert entry["seconds"] > 0 and ("peak_bytes" in entry) == (mode != "backward")
    if mode == "no_grad":  # log-probs only: no tensor of the logits' size
        assert table.timed(record)["ours-cpu"]["peak_bytes"] < record["logits_bytes"] / 2


def test_masks_and_silent_groups_are_as_asked_for() -> None:
    for fill in (1.0, 0.6, 0.3):
        mask = small(sequences=16, tokens=100, fill=fill).batch().tokens.mask
        assert mask.float().mean().item() == pytest.approx(fill, abs=0.01)
        assert fill == 1.0 or len(set(mask.sum(-1).tolist())) > 8
    advantages = small(sequences=10, silent=0.4).batch().tokens.advantages
    assert (advantages == 0).sum() == 4 and not advantages[:4].any()
    assert tokens_batch((2, 3)).tokens.old_logps.ne(tokens_batch((2, 3)).tokens.logps).all()


def test_a_cases_name_tells_it_from_every_other() -> None:
    case = of_model("qwen2.5-0.5b", Task("logits"), 4, 128)
    assert case.name == "logits dapo qwen2.5-0.5b [4 x 128, 151936] bf16"
    changes = [
        {"fill": 0.3},
        {"silent": 0.4},
        {"peaked": True},
        {"mode": "no_grad"},
        {"upstream": 0.5},
        {"dtype": "fp32"},
    ]
    changes += [{"task": Task("logits", "gspo")}, {"task": Task(kl_coef=0.1)}, {"task": Task(entropy_coef=0.1)}]
    assert len({case.name, *(replace(case, **change).name for change in changes)}) == len(changes) + 1
    for sweep, (_, points) in SWEEPS.items():
        assert len({point.name for _, point in points(case)}) == len(points(case)), sweep


@pytest.mark.parametrize(
    "changes, message",
    [({"mode": "sideways"}, "mode must be one of both"), ({"dtype": "int8"}, "dtype must be one of bf16"),
     ({"fill": 0.0}, r"fill must lie in \[1e-06, 1\]; got 0.0"), ({"sequences": 0}, "sequences must be at least 1; got 0"),
     ({"silent": 2.0}, "silent must lie in")],
)  # fmt: skip
def test_a_case_checks_its_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_lengths_are_called_twice_each() -> None:
    record = measure_lengths(small(), [OURS, provider_named("compile")], QUICK, (3, 5))
    ours = record["providers"]["ours-cpu"]
    assert len(ours["first"]) == len(ours["again"]) == 2
    shown = table.lengths_table(record)
    assert shown.headings == ["length", "ours-cpu"] and [row[0] for row in shown.rows] == ["3", "5"]
    assert "compile" in table.untimed(record)


# ---- clocks and turns ----


def test_providers_time_interleaved_in_their_numbers() -> None:
    calls: list[str] = []
    providers = {name: lambda name=name: calls.append(name) for name in ("often", "rarely")}
    seconds = timing.measure_interleaved(
        providers, {"often": 6, "rarely": 2}, lambda: calls.append("setup"),
        prepare={"rarely": lambda: calls.append("prepare")},
    )  # fmt: skip
    assert {name: len(values) for name, values in seconds.items()} == {"often": 6, "rarely": 2}
    assert calls.count("setup") == 10 and calls.count("prepare") == 3
    assert all(calls[i + 1] == "rarely" for i, call in enumerate(calls) if call == "prepare")
    measured = [call for call in calls if call in providers][2:]  # after one untimed call each
    assert sorted(measured[:4]) == ["often", "often", "often", "rarely"]
    assert timing.medians({"x": [1.0, 9.0, 2.0]}) == {"x": 2.0}


def test_neither_setup_nor_flush_is_timed() -> None:
    class Slow(WallClock):
        def flush(self) -> None:
            torch.randn(1 << 21)

    seconds = timing.measure_interleaved({"nothing": lambda: None}, 3, lambda: torch.randn(1 << 21), clock=Slow())
    assert min(seconds["nothing"]) < 1e-3


class FakeCuda:
    """A stream on which a call takes as many milliseconds as it says, and the host none."""

    def __init__(self) -> None:
        self.now, self.synchronised, self.head_starts = 0.0, 0, 0

    def _sleep(self, cycles: int) -> None:
        self.now += cycles
        self.head_starts += 1

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        cuda = self

        class Event:
            def record(self) -> None:
                self.at = cuda.now

            def elapsed_time(self, other: Any) -> float:
                assert cuda.synchronised, "read before the stream was done"
                return other.at - self.at

        return Event()

    def synchronize(self) -> None:
        self.synchronised += 1


def test_a_gpu_is_timed_by_events() -> None:
    cuda = FakeCuda()

    def run() -> None:
        cuda.now += 2.5

    clock = CudaClock(cuda, flush_bytes=64)
    seconds = timing.measure_interleaved({"kernel": run}, 3, clock=clock)
    assert seconds["kernel"] == pytest.approx([2.5e-3] * 3) and cuda.synchronised == 4
    assert cuda.head_starts == 4  # before the first event each time: the host launches meanwhile


def test_summary_is_median_and_quartiles() -> None:
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0]) == {"seconds": 3.0, "low": 1.5, "high": 4.5, "rounds": 5}
    assert summary([2.0, 1.0, 9.0]) == {"seconds": 2.0, "low": 1.0, "high": 9.0, "rounds": 3}


def test_produced_logits_share_memory_and_are_no_leaf() -> None:
    logits = torch.randn(2, 3, 5)
    head = produced(logits)
    assert head.requires_grad and not head.is_leaf and head.data_ptr() == logits.data_ptr()
    (gradient,) = torch.autograd.grad(head.sum(), head)
    assert gradient.shape == logits.shape and not logits.requires_grad


def test_machine_info_names_what_a_figure_depends_on() -> None:
    info = machine_info()
    assert info["cpu"] and info["cores"] >= 1 and info["torch_threads"] == torch.get_num_threads()
    assert info["instruction_set"] in ("generic", "avx2", "avx512", "avx512_bf16")
    assert results_of(gpu="NVIDIA H100").device == "NVIDIA H100"


# ---- tables, comparison, report ----


def record_of(case: str = "a case", path: str = "logits", **seconds: float) -> dict[str, Any]:
    """Quartiles 2 % to either side; the unit takes 10 ms."""

    def entry(median: float) -> dict[str, Any]:
        return {"seconds": median, "low": 0.98 * median, "high": 1.02 * median, "rounds": 5}

    others = {
        name.replace("_", "-"): {"title": name, "version": "1", "peak_bytes": 1 << 20, **entry(s)}
        for name, s in seconds.items()
    }
    return {
        "case": case, "task": {"path": path}, "model": "", "dtype": "bf16", "unit": "copy", "unit_seconds": entry(0.01), "logits_bytes": 1 << 20,
        "input_bytes": 1 << 20, "active_share": 1.0, "providers": {**others, "quack": {"title": "", "version": None, "missing": "needs a GPU"}},
    }  # fmt: skip


MACHINE = {"cpu": "A CPU", "torch_threads": 2, "instruction_set": "avx2", "torch": "2.13", "commit": "abc", "packages": {"trl": "1.16.0"}}  # fmt: skip


def results_of(*records: dict[str, Any], **machine: Any) -> results.Results:
    return results.Results({**MACHINE, **machine}, list(records), "2026-01-01 00:00", "a command")


def test_a_table_says_who_wins() -> None:
    wins = record_of(ours_cpu=0.02, eager=0.1, trl=0.05)
    assert [row[0] for row in table.case_table(wins).rows] == ["copy", "ours-cpu *", "eager", "trl"]
    assert table.verdict(wins) == "ours-cpu is 2.5x as fast as trl. Least memory: ours-cpu, 1.0 MiB."
    loses = record_of(ours_cpu=0.02, eager=0.1, trl=0.01)
    assert "trl is 2.0x as fast as ours-cpu" in table.verdict(loses)
    assert table.overview_row(loses)[3:7] == ["5.0x", "", "trl", "0.50x"]
    assert table.untimed(wins) == {"quack": "needs a GPU"}


@pytest.mark.parametrize("now, verdict", [(0.02, "same"), (0.0208, "same"), (0.025, "SLOWER"), (0.015, "faster")])
def test_comparison_flags_what_is_beyond_the_noise(now: float, verdict: str) -> None:
    before, after = results_of(record_of(ours_cpu=0.02)), results_of(record_of(ours_cpu=now))
    (change,) = comparing.compare(before, after)
    assert change.verdict == verdict and change.regression == (verdict == "SLOWER")
    assert verdict in comparing.comparison_table([change]).markdown()


def test_comparison_counts_noise_units_memory_and_devices() -> None:
    before, after = record_of(ours_cpu=0.02), record_of(ours_cpu=0.025)
    noisy = {**after, "unit_seconds": {**after["unit_seconds"], "low": 0.005, "high": 0.015}}
    assert comparing.compare(results_of(before), results_of(noisy))[0].verdict == "same"
    slow_machine = {**record_of(ours_cpu=0.04), "unit_seconds": {"seconds": 0.02, "low": 0.0196, "high": 0.0204}}
    assert comparing.compare(results_of(before), results_of(slow_machine))[0].verdict == "same"
    larger = record_of(ours_cpu=0.02)
    larger["providers"]["ours-cpu"]["peak_bytes"] *= 2
    assert comparing.compare(results_of(before), results_of(larger))[0].verdict == "MORE MEMORY"
    other = results_of(after, gpu="H100")
    with pytest.raises(
        ValueError, match=r"different devices, which says nothing of the code: A CPU, 2 threads, avx2 \| H100"
    ):
        comparing.compare(results_of(before), other)
    assert comparing.compare(results_of(before), other, force=True)[0].regression
    with pytest.raises(ValueError, match="no case in common"):
        comparing.compare(results_of(before), results_of(record_of("another", ours_cpu=0.1)))


def test_results_survive_their_file(tmp_path: Path) -> None:
    written = results_of(record_of(ours_cpu=0.02))
    written.save(tmp_path / "x.json")
    assert results.load(tmp_path / "x.json") == written
    assert "A CPU, 2 threads, avx2; torch 2.13, trl 1.16.0; commit abc" in written.caption
    (tmp_path / "y.json").write_text(json.dumps({"benchmarks": []}))
    with pytest.raises(ValueError, match=r"y.json holds neither"):
        results.load(tmp_path / "y.json")


def test_the_report_fills_a_document(tmp_path: Path) -> None:
    swept = [
        {**record_of(f"at {x}", ours_cpu=0.01 * x, eager=0.1), "sweep": "tokens", "axis": "tokens", "x": x}
        for x in (1, 2)
    ]
    losses = [
        {**record_of(loss, "linear", ours_cpu=0.01), "sweep": "losses", "axis": "loss", "x": loss}
        for loss in ("a", "b")
    ]
    again = {"case": "lengths", "lengths": [3, 5], "providers": {"ours-cpu": {"title": "", "version": None, "first": [1.0, 2.0], "again": [1.0, 1.0]}}}  # fmt: skip
    found = results_of(
        record_of(ours_cpu=0.02, eager=0.1), record_of("b", "linear", ours_cpu=0.02), *swept, *losses, again
    )
    document = tmp_path / "doc.md"
    document.write_text("before\n<!-- begin cpu -->\nold\n<!-- end cpu -->\nafter\n")
    report.insert(document, "cpu", report.section(found, "cpu", tmp_path / "images", document))
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    pictures = re.findall(r"\]\((images/[^)]+)\)", text)
    assert len(pictures) == 4 and all((tmp_path / name).stat().st_size > 5000 for name in pictures)
    assert found.caption in text and "| ours-cpu *" in text and "quack: needs a GPU" in text
    assert len(report.markdown(found).split("| length")) == 2
    with pytest.raises(ValueError, match="has no <!-- begin gpu -->"):
        report.insert(document, "gpu", "")


def test_a_case_is_drawn(tmp_path: Path) -> None:
    file = plots.bars(record_of(ours_cpu=0.02, eager=0.1), results_of(), tmp_path / "bars.png")
    assert file.read_bytes().startswith(b"\x89PNG")


# ---- the command ----


@pytest.fixture
def invoke(tmp_path: Path) -> Any:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from grpo_kernels.tools.cli import app

    sizes = ["--vocab", "499", "--hidden", "16", "--sequences", "2", "--tokens", "8"]
    common = [*sizes, "--seconds", "0", "--no-compile", "--out", str(tmp_path)]
    return lambda *arguments: CliRunner().invoke(app, ["bench", *common, *arguments])


def test_the_command_ends_with_tables_figures_and_pictures(invoke: Any, tmp_path: Path) -> None:
    done = invoke("--path", "logits,linear,advantages,tokens,gae,logps", "--providers", "ours-cpu,eager,quack")
    assert done.exit_code == 0, done.output
    found = results.load(tmp_path / "bench.json")
    assert [record["task"]["path"] for record in found.records] == list(dict.fromkeys(
        ["logits", "linear", "advantages", "tokens", "gae", "logps"]))  # fmt: skip
    assert {p.name for p in tmp_path.glob("*.png")} == {f"{r['task']['path']}.png" for r in found.records}
    assert "as fast as" in done.output and "not timed: quack" in done.output and "x copy" in done.output


def test_the_command_sweeps(invoke: Any, tmp_path: Path) -> None:
    done = invoke("--path", "logits", "--sweep", "fill,losses,lengths", "--providers", "ours-cpu,eager")
    assert done.exit_code == 0, done.output
    records = results.load(tmp_path / "bench.json").records
    assert [r["x"] for r in records if r.get("sweep") == "fill"] == [1.0, 0.8, 0.6, 0.45, 0.3, 0.15]
    assert {p.name for p in tmp_path.glob("*.png")} == {"fill-logits.png", "losses-logits.png", "lengths-logits.png"}


@pytest.mark.parametrize(
    "arguments, message",
    [(["--model", "gpt-9"], "model 'gpt-9' is not known"), (["--path", "pixels"], "path 'pixels' is not known"),
     (["--sweep", "taste"], "sweep 'taste' is not known"), (["--providers", "apex"], "provider 'apex' is not known"),
     (["--device", "tpu"], "device must be cpu, cuda or auto"), (["--loss", "hinge"], "loss must be one of dapo")],
)  # fmt: skip
def test_the_command_names_what_there_is(invoke: Any, arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 1 and message in done.output


def test_the_command_lists_models_and_providers(invoke: Any) -> None:
    done = invoke("--list")
    assert done.exit_code == 0 and "gpt-oss-20b" in done.output and "ours-cpu-two-pass" in done.output


def test_a_provider_is_an_interface() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Provider()  # type: ignore[abstract]
