"""The script for machines with a GPU, as far as one without can tell: that it ends in time, goes on where it stopped,
survives what it rehearses, and does not pretend."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import environment

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="installed without the benchmarks")
sys.path.insert(0, str(ROOT))
if (ROOT / "benchmarks").is_dir():
    from benchmarks import gpu_check
    from benchmarks.gpu import pieces, process, protocol, runner, tools


def checked(out: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, dict]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(out), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=1800, check=False
    )
    file = out / "gpu_dry.json"
    return done, json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done, _ = checked(tmp_path, "--piece", "probe")
    assert done.returncode == 1 and "nothing was checked" in done.stderr and not list(tmp_path.iterdir())


# ---- end to end, on the CPU ----


def test_an_exception_and_a_hang_are_written_down_and_the_rest_goes_on(tmp_path: Path) -> None:
    arguments = ("--dry", "--case-seconds", "5", "--piece", "cuda gae,cuda sequences,cuda plain")
    rehearsal = "hang=gae, nine tiles;raise=whitening"
    done, state = checked(tmp_path, *arguments, GRPO_KERNELS_REHEARSE=rehearsal)
    found = state["pieces"]
    assert done.returncode == 1, done.stdout + done.stderr
    plain, gae = found["cuda plain"], found["cuda gae"]
    assert plain["bad"] == ["whitening"] and "a rehearsal" in plain["cases"]["whitening"]["what"]
    assert plain["cases"]["loss, level token"]["ok"]  # behind the exception
    assert gae["hang"] and gae["last_started"] == "gae, nine tiles" and not gae["ok"]
    assert gae["cases"]["gae, three tiles"]["ok"] and "in rehearse" in gae["cases"]["gae, nine tiles"]["output"]
    assert "waits hung in cuda gae" in found["cuda sequences"]["skipped"]
    assert state["healthy"] and not state["missing"]


@pytest.mark.slow
def test_a_dry_run_walks_every_piece(tmp_path: Path) -> None:
    done, state = checked(tmp_path, "--dry", "--limit", "1500", "--case-seconds", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {*state["pieces"]} == {piece.name for piece in pieces.every()} and not state["missing"]
    times = state["pieces"]["cuda times"]["cases"]
    assert all(case["kernel_ms"] > 0 and case["copies"] > 0 for case in times.values()) and len(times) > 12
    done, again = checked(tmp_path, "--dry")
    assert done.returncode == 0
    assert {**again["pieces"], "machine": 0, "build": 0} == {**state["pieces"], "machine": 0, "build": 0}


# ---- processes ----


def script(tmp_path: Path, text: str) -> tuple[str, ...]:
    file = tmp_path / "script.py"
    file.write_text(text)
    return sys.executable, str(file)


CHILD = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """A zombie is not: who reaps it is the init of this machine's business."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the process in /proc")
def test_the_limit_ends_children_too_and_keeps_the_output(tmp_path: Path) -> None:
    done = process.run(script(tmp_path, CHILD), 5, tmp_path / "log", tmp_path, {})
    assert done.status is None and 5 <= done.seconds < 20
    deadline = time.monotonic() + 10
    while alive(int(done.output)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(done.output))


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    process.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        process.write_json(file, {"b": object()})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        process.write_json(file, {"c": 3})
    assert json.loads(file.read_text()) == {"a": 1}


# ---- which piece comes next ----


def piece(name: str, result: dict | None = None, calls: list | None = None, **options: object) -> runner.Piece:
    def work(run: runner.Run, _: runner.Piece) -> dict | None:
        if calls is not None:
            calls.append(name)
        return result

    return runner.Piece(name, 10, work, **options)  # type: ignore[arg-type]


def run_in(tmp_path: Path, seconds: float = 100) -> runner.Run:
    return runner.Run(tmp_path / "state.json", time.monotonic() + seconds, dry=True)


def test_new_pieces_come_first_then_failures_then_what_has_other_sources_then_the_later_ones() -> None:
    now = runner.digest("all")
    results = {
        "good": {"ok": True, "sources": now}, "old": {"ok": True, "sources": "other"},
        "failed": {"ok": False, "sources": now}, "hung": {"ok": False, "hang": True, "sources": now},
        "mended": {"ok": False, "hang": True, "sources": "other"}, "half": {"ok": False, "unfinished": True},
        "asked": {"ok": True, "sources": now},
    }  # fmt: skip
    names = ("old", "good", "failed", "hung", "mended", "asked", "new", "half", "always")
    listed = [piece("later", later=True), *(piece(name, always=name == "always") for name in names)]
    assert [p.name for p in runner.order(listed, results, ["asked"])] == [
        "new", "half", "always", "failed", "mended", "asked", "old", "later",
    ]  # fmt: skip


def test_it_stops_in_time_saves_each_piece_and_goes_on(tmp_path: Path) -> None:
    calls: list[str] = []
    listed = [piece("a", {"ok": True}, calls), piece("b", None, calls), piece("c", {"ok": True}, calls)]
    run = run_in(tmp_path)
    run.run(listed)
    assert calls == ["a", "b", "c", "b"] and run.state["missing"] == ["b"]  # once more, behind the others
    assert {*json.loads(run.out.read_text())["pieces"]} == {"a", "c"}
    late = run_in(tmp_path, seconds=0)
    late.state = json.loads(run.out.read_text())
    late.run(listed)
    assert calls == ["a", "b", "c", "b"] and late.state["missing"] == ["b"]


def test_a_family_ends_with_its_first_hang_until_sources_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(runner.Run, "check_health", lambda self: calls.append("health"))

    def hangs(run: runner.Run, me: runner.Piece) -> dict:
        run.hang(me.families, me, "a case")
        return {"ok": False, "hang": True}

    listed = [
        runner.Piece("gae", 10, hangs, ("waits",), "cuda"), piece("diversity", {"ok": True}, calls, families=("waits",)),
        piece("rows", {"ok": True}, calls, families=("rows",)),
    ]  # fmt: skip
    run = run_in(tmp_path)
    run.run(listed)
    assert calls == ["health", "rows"] and run.results["diversity"]["skipped"] == "waits hung in gae (a case)"
    monkeypatch.setitem(runner._digests, "cuda", "another")
    assert run.ended(("waits",)) == []


def test_a_change_of_one_backend_leaves_the_results_of_the_other() -> None:
    def names(of: str) -> set[str]:
        roots, without = runner.SOURCES[of]
        found = {f.relative_to(ROOT).as_posix() for root in roots for f in runner._files(ROOT / root)}
        return {name for name in found if not name.startswith(without)}

    triton, cuda = names("triton"), names("cuda")
    assert "grpo_kernels/backends/triton/row.py" in triton - cuda and "csrc/cuda/rows.cu" in cuda - triton
    assert "grpo_kernels/loss/grpo.py" in triton & cuda and triton | cuda == names("all")


def test_the_limits_of_the_first_call_fit_into_it() -> None:
    assert sum(p.limit for p in pieces.first_call()) <= 270
    later = [p for p in pieces.every() if p.later]
    assert {"memcheck", "racecheck", "tests", "tuning"} < {p.name for p in later}


class Sick(runner.Run):
    """Its health piece fails."""

    def python(self, module: str, *arguments: str) -> tuple[str, ...]:
        return sys.executable, "-c", "raise SystemExit('it does not add')"


def test_a_gpu_that_no_longer_adds_ends_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    lost = {"ok": False, "cuda_error": True, "bad": ["a"]}
    machine = piece("machine", {"ok": True, "device": {"name": "dry"}, "versions": {}}, always=True)
    listed = [machine, piece("build", {"ok": True}, always=True), piece("a", lost), piece("b", {"ok": True}, calls)]
    monkeypatch.setattr(gpu_check, "every", lambda: listed)
    monkeypatch.setattr(gpu_check, "Run", Sick)
    assert gpu_check.main(["--dry", "--out", str(tmp_path)]) == 4
    state = json.loads((tmp_path / "gpu_dry.json").read_text())
    assert state["healthy"] is False and "it does not add" in state["health_output"]
    assert not calls and state["missing"] == ["a", "b"] and state["pieces"]["a"] | lost == state["pieces"]["a"]


def test_exit_statuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = piece("machine", {"ok": True, "device": {"name": "dry"}, "versions": {}}, always=True)
    for result, expected in (({"ok": True}, 0), ({"ok": False}, 1), (None, 3)):
        listed = [machine, piece("build", {"ok": True}, always=True), piece("a", result)]
        monkeypatch.setattr(gpu_check, "every", lambda listed=listed: listed)
        assert gpu_check.main(["--dry", "--out", str(tmp_path / str(expected))]) == expected


# ---- a list of cases whose process dies ----


class Scripted(runner.Run):
    """Answers with the next of `answers` (status, output, own limit, seconds of silence) and keeps the commands."""

    def execute(self, piece, limit, *command, **environment):  # type: ignore[no-untyped-def]
        self.commands.append(command)  # type: ignore[attr-defined]
        status, output, own, *quiet = self.answers.pop(0)  # type: ignore[attr-defined]
        return process.Done(status, output, 1.0, *quiet), own


def scripted(tmp_path: Path, *answers: tuple, families: tuple[str, ...] = ("rows",)) -> tuple[Scripted, dict | None]:
    run = Scripted(tmp_path / "state.json", time.monotonic() + 100, dry=True)
    run.answers, run.commands = [*answers], []  # type: ignore[attr-defined]
    run.results["build"] = {"ok": True}
    listed = runner.Piece("cuda rows", 10, pieces.cases("rows", "cuda"), families, "cuda")
    return run, listed.work(run, listed)


START = 'start {} | {{"family": "rows"}}\n'
A, B, C = (START.format(name) for name in "abc")


def test_it_goes_on_behind_the_case_that_lost_the_context(tmp_path: Path) -> None:
    first = f'seed 3\n{A}ok a | {{}}\n{B}EXC b | {{"cuda_error": true}}\n'
    run, result = scripted(tmp_path, (3, first, False), (0, f"seed 4\n{C}ok c | {{}}\n", False))
    assert result and result["bad"] == ["b"] and result["cuda_error"] and result["seeds"] == ["3", "4"]
    assert "--from" not in run.commands[0] and run.commands[1][-2:] == ("--from", "b")  # type: ignore[attr-defined]
    run, result = scripted(tmp_path, (-11, A, False), (0, f"{C}ok c | {{}}\n", False))
    assert result and result["cases"]["a"]["status"] == -11 and result["cases"]["c"]["ok"] and not run.hung


STOOD_STILL = {
    "its own clock": (1, f"{A}Timeout (0:00:12)!\n", False),
    "the limit": (None, A, True, 3.5),
    "the watchdog": (3, f'{A}gae_kernel: this kernel would never have ended\nEXC a | {{"cuda_error": true}}\n', False),
}  # fmt: skip


@pytest.mark.parametrize("answer", STOOD_STILL.values(), ids=STOOD_STILL.keys())
def test_a_hang_ends_the_list_whoever_ends_the_process(tmp_path: Path, answer: tuple) -> None:
    run, result = scripted(tmp_path, answer)
    assert result and result["hang"] and result["last_started"] == "a" and run.hung["rows"]["case"] == "a"
    assert result["bad"] == ["a"] and not result["ok"]


def test_a_list_of_several_families_goes_on_without_the_one_that_hung(tmp_path: Path) -> None:
    answers = ((1, f"{A}Timeout (0:00:12)!\n", False), (0, f"{C}ok c | {{}}\n", False))
    run, result = scripted(tmp_path, *answers, families=())
    assert result and result["hang"] and result["cases"]["c"]["ok"] and {*run.hung} == {"rows"}
    assert run.commands[1][-4:] == ("--skip", "rows", "--from", "a")  # type: ignore[attr-defined]


@pytest.mark.parametrize("own", [False, True])
def test_what_time_cut_off_is_gone_on_with(tmp_path: Path, own: bool) -> None:
    """A list that is slower than its limit is no hang."""
    run, result = scripted(tmp_path, (None, f"{A}ok a | {{}}\n{B}", own, 0.5))
    assert result and result["unfinished"] and not run.hung
    run.results["cuda rows"] = result
    run.answers = [(0, f"{B}ok b | {{}}\n", False)]  # type: ignore[attr-defined]
    listed = runner.Piece("cuda rows", 10, pieces.cases("rows", "cuda"), ("rows",), "cuda")
    whole = listed.work(run, listed)
    assert run.commands[-1][-2:] == ("--from", "a")  # type: ignore[attr-defined]
    assert whole and whole["ok"] and {*whole["cases"]} == {"a", "b"}


def test_a_process_that_never_comes_to_its_first_case_has_the_gpu_looked_at(tmp_path: Path) -> None:
    _, result = scripted(tmp_path, (None, "seed 1\n", True, 9.0))
    assert result and result["never_began"] and not result["ok"]


def test_a_lost_context_is_told_from_a_graph_that_was_not_made() -> None:
    from benchmarks.gpu.case import lost_context

    assert lost_context("AcceleratorError: CUDA error: an illegal memory access was encountered")
    assert lost_context("RuntimeError: kernel gae: unspecified launch failure")
    assert not lost_context("RuntimeError: CUDA error: operation not permitted when stream is capturing")
    assert not lost_context("ValueError: backend 'cuda' needs tensors on an NVIDIA GPU")


def test_cases_are_read_with_what_stands_between_them() -> None:
    output = (
        f'seed 1\nstart a, b | {{"family": "x"}}\nnoise\nok a, b | {{"ms": 2}}\n{C}WRONG c | {{"what": "x | y"}}\n{A}'
    )
    found, running = protocol.read_cases(output)
    assert found["a, b"] == {"ok": True, "ms": 2}
    assert found["c"] == {"ok": False, "word": "WRONG", "family": "rows", "what": "x | y"}
    assert running == protocol.Started("a", "rows")


# ---- tools ----


def test_the_bytes_of_a_profile_by_kernel() -> None:
    profile = "\n".join(
        [
            "==PROF== Connected to process 1",
            '{"logits": 1000}',
            '"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"',
            '"","","byte","byte"',
            '"0","void gk::(anonymous namespace)::row_kernel<float, (bool)1>(gk::RowArgs)","2,048","16"',
            '"1","policy_kernel","2000","2000"',
            '"2","policy_kernel","2000","0"',
        ]
    )
    assert tools.bytes_per_logit(profile) == {"row_kernel": [2.064], "policy_kernel": [4.0, 2.0]}


def test_a_tool_that_refuses_the_device_is_no_failure() -> None:
    assert tools.refused("x\n========= Error: Device not supported\n") == "========= Error: Device not supported"
    assert tools.refused("========= ERROR SUMMARY: 1 error\n") is None
    assert tools.NO_OPTION.search("Error: unrecognised option '--kernel-name-exclude'")
    assert tools.summary("========= ERROR SUMMARY: 1 error\n") == "1 error"


PROBE = """
import sys
import torch
sys.path.insert(0, "python_tests")
from dry_driver import assembly, dry_run
dry = dry_run("cuda", 90)
from benchmarks.gpu import probe_kernels as p
x = torch.ones(3000)
for function in p.FUNCTIONS:
    p.launch(function, x, x, x)
found = {c.src.constants[(4,)]: assembly(c) for c in dry.variants(p.probe_kernel)}
assert set(found) == set(p.FUNCTIONS)
assert "div.full.f32" in found["quotient"] and "div.rn.f32" in found["div_rn"] and "ex2.approx" in found["exp2"]
"""


def test_the_probe_compiles_for_a_gpu_and_asks_what_it_says() -> None:
    env = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
