"""The pieces of a check, by information per second: first whether anything runs at all, last what takes minutes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from typing import Any

from . import tools
from .process import Done
from .protocol import CUDA_ERROR, STUCK, TIMED_OUT, Started, read_cases
from .runner import ROOT, TAIL, WORK, Piece, Run

BACKENDS = ("triton", "cuda")
TEST_LIMIT = 90.0  # of one file


def result_of(done: Done, own_limit: bool, **figures: Any) -> dict[str, Any] | None:
    """None if the call's time limit ended it."""
    if done.status is None and not own_limit:
        return None
    result = {"ok": done.status == 0, **figures}
    if done.status is None:
        result["hang"] = True
    return result if result["ok"] else {**result, "output": done.output[-TAIL:]}


# ---- at the start of every call ----


def machine(run: Run, piece: Piece) -> dict[str, Any] | None:
    """Also starts the build, which runs while the first pieces run."""
    done, own = run.execute(piece, run.limit(piece), *run.python("machine"))
    described = json.loads(done.output.strip().splitlines()[-1]) if done.status == 0 else {}
    if described:
        run.build = start_build(run, described["device"]["capability"])
    return result_of(done, own, **described)


def start_build(run: Run, capability: list[int] | None) -> Any:
    """Builds only `_cuda`, only for this device, after unpacking the given wheels."""
    build = f"{sys.executable} setup.py -q build_ext --inplace"
    switches = {"GRPO_KERNELS_CPU": "0", "GRPO_KERNELS_CUDA": "1"}
    if run.dry:
        build = f"{sys.executable} -m py_compile setup.py"
    else:
        switches["GRPO_KERNELS_CUDA_ARCHS"] = "{}{}".format(*capability or (9, 0))
    wheels = sorted(run.wheels.glob("*.whl")) if run.wheels else []
    if wheels:
        pip = f"{sys.executable} -m pip install -q --no-index --no-deps --upgrade --target {WORK / 'site'}"
        build = f"{pip} {' '.join(map(str, wheels))} && {build}"
    return run.start("build", ("sh", "-c", build), **switches)


def built(run: Run, piece: Piece) -> dict[str, Any] | None:
    if run.build is None:
        return {"ok": False, "output": "the build was not started"}
    own, remaining = run.limit(piece), run.remaining()
    done = run.build.wait(min(own, remaining))
    result = result_of(done, own <= remaining, build_seconds=round(done.seconds, 1))
    if result:
        result.pop("hang", None)  # a hang of nvcc, not of the GPU
    return result


# ---- lists of cases ----


FAMILIES = ("rows", "clusters", "waits", "plain", "triton")
QUIET = {"cuda": 3.0, "triton": 20.0}  # seconds of silence that only a hang explains: Triton compiles


def cases(name: str, backend: str) -> Any:
    """Runs a list of cases. If a case ends the process, continues after it, until the list ends or the family hangs."""

    def work(run: Run, piece: Piece) -> dict[str, Any] | None:
        if backend == "cuda" and not run.results.get("build", {}).get("ok"):
            return {"ok": False, "bad": ["not built"]}
        before = run.results.get(piece.name, {})
        going_on = before if before.get("unfinished") else {}
        result: dict[str, Any] = {"cases": dict(going_on.get("cases", {})), "seeds": [*going_on.get("seeds", [])]}
        behind, spent = going_on.get("behind"), 0.0
        while True:
            full = command(run, name, backend, behind, run.ended(FAMILIES))
            done, own = run.execute(piece, run.limit(piece) - spent, *full, **environment(run, name))
            spent += done.seconds
            said, running = read_cases(done.output)
            result["cases"].update(said)
            result["seeds"] += re.findall(r"^seed (\d+)$", done.output, re.M)
            behind = list(said)[-1] if said else behind
            hang = hung(done, own, running, QUIET[backend])
            if done.status is None and not hang and (said or not own):
                return {**result, "ok": False, "unfinished": True, "behind": behind}
            if done.status == CUDA_ERROR:
                result["cuda_error"] = True
            elif running is None:
                return judged(result, done)
            if running is not None:
                behind = running.name
                result["cases"][behind] = died(done, hang)
            elif STUCK in done.output:  # the kernel's watchdog has ended it, as the case reports
                hang, running = True, Started(behind, said[behind].get("family", ""))
            if hang and running is not None:
                run.hang(piece.families or (running.family,), piece, running.name)
                result |= {"hang": True, "last_started": running.name}
                if piece.families:
                    return judged(result, done)

    return work


def hung(done: Done, own_limit: bool, running: Started | None, quiet: float) -> bool:
    """Whether a case hung: by its own time limit, or by ours if that did not end it."""
    if running is None:
        return False
    return TIMED_OUT in done.output or (done.status is None and own_limit and done.quiet >= quiet)


def died(done: Done, hang: bool) -> dict[str, Any]:
    return {"ok": False, "hang": hang, "status": done.status, "output": done.output[-TAIL:]}


def judged(result: dict[str, Any], done: Done) -> dict[str, Any]:
    bad = [name for name, case in result["cases"].items() if not case["ok"]]
    result = {**result, "ok": not bad and done.status == 0, "bad": bad}
    if not bad and done.status != 0:  # it failed before the first case, or after the last
        result |= {"output": done.output[-TAIL:], "never_began": not result["cases"]}
    return result


def command(run: Run, name: str, backend: str, behind: str | None, skip: list[str]) -> tuple[str, ...]:
    go_on = () if behind is None else ("--from", behind)
    seconds = ("--seconds", str(run.case_seconds), "--first-seconds", str(run.first_seconds))
    return run.python("cases", name, "--backend", backend, *seconds, "--skip", ",".join(skip), *go_on)


def environment(run: Run, name: str) -> dict[str, str]:
    """On a CPU the probe's kernels run in the interpreter."""
    return {"TRITON_INTERPRET": "1"} if run.dry and name in ("probe", "tuning") else {}


# ---- tools and tests ----


def sanitizer(tool: str, backend: str) -> Any:
    def work(run: Run, piece: Piece) -> dict[str, Any] | None:
        path = shutil.which("compute-sanitizer")
        inner = command(run, "few", backend, None, [])
        if run.dry:
            return result_of(*run.execute(piece, run.limit(piece), *inner), errors=0)
        if path is None:
            return {"ok": True, "unavailable": "compute-sanitizer is not on the PATH"}
        # Without a caching allocator, memory ends where a tensor ends.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        slow = (*inner, "--seconds", "60", "--first-seconds", "60")
        options = ("--tool", tool, "--error-exitcode", "9")
        done, own = run.execute(piece, run.limit(piece), path, *options, *tools.OURS_ALONE, *slow, **uncached)
        if tools.NO_OPTION.search(done.output):
            done, own = run.execute(piece, run.limit(piece), path, *options, *slow, **uncached)
        if reason := tools.refused(done.output):
            return {"ok": True, "unavailable": reason}
        return result_of(done, own, summary=tools.summary(done.output))

    return work


def traffic(backend: str) -> Any:
    """Bytes of device memory per logit for each row kernel, from hardware counters."""

    def work(run: Run, piece: Piece) -> dict[str, Any] | None:
        inner = command(run, "traffic", backend, None, run.ended(("rows", "clusters", "triton")))
        if run.dry:
            return result_of(*run.execute(piece, run.limit(piece), *inner))
        path = shutil.which("ncu")
        if path is None:
            return {"ok": True, "unavailable": "ncu is not on the PATH"}
        slow = (*inner, "--seconds", "30", "--first-seconds", "30")
        done, own = run.execute(piece, run.limit(piece), path, *tools.NCU, *slow)
        if reason := tools.refused(done.output):
            return {"ok": True, "unavailable": reason}
        moved = tools.bytes_per_logit(done.output) if done.status == 0 else None
        return result_of(done, own, bytes_per_logit=moved)

    return work


def tests(run: Run, piece: Piece) -> dict[str, Any] | None:
    """The suite by file, in the remaining time; device_proxy.py of python_tests moves its tensors to the GPU."""
    files = ["loss/test_logps.py"] if run.dry else [f for f in tools.TEST_FILES if (ROOT / "python_tests" / f).exists()]
    before = run.results.get(piece.name, {})
    by_file = dict(before["files"]) if before.get("unfinished") else {}
    for file in (f for f in files if f not in by_file):
        done, own = run.execute(
            piece, run.patient(TEST_LIMIT), *tools.pytest(file, run.dry), **tools.test_environment(run.dry)
        )
        counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.output)}
        result = result_of(done, own, **counts)
        if result is None:
            return {"ok": False, "unfinished": True, "files": by_file}
        if done.status == 5:  # every test deselected
            result = {"ok": True, **counts}
        by_file[file] = result
        if result.get("hang") or (done.status != 0 and "Timeout" in done.output):
            run.check_health()
    bad = [name for name, one in by_file.items() if not one["ok"]]
    return {"ok": not bad, "files": by_file, "bad": bad}


def every() -> list[Piece]:
    """The limits of the first call's pieces add up to less than 270 s (see test_gpu_check.py)."""
    first = [
        Piece("machine", 24, machine, always=True),
        Piece("probe", 12, cases("probe", "triton"), ("triton",), "triton"),
        Piece("triton rows", 28, cases("all-rows", "triton"), ("triton",), "triton"),
        Piece("triton others", 28, cases("tokens", "triton"), ("triton",), "triton"),
        Piece("build", 16, built, always=True),
        Piece("cuda plain", 12, cases("plain", "cuda"), ("plain",), "cuda"),
        Piece("cuda rows", 14, cases("rows", "cuda"), ("rows",), "cuda"),
        Piece("cuda wide rows", 15, cases("wide", "cuda"), ("clusters",), "cuda"),
        Piece("cuda gae", 18, cases("gae", "cuda"), ("waits",), "cuda"),
        Piece("cuda sequences", 18, cases("sequences", "cuda"), ("waits",), "cuda"),
        Piece("cuda diversity", 18, cases("diversity", "cuda"), ("waits",), "cuda"),
        Piece("cuda stress", 20, cases("stress", "cuda"), ("waits",), "cuda"),
        Piece("cuda times", 16, cases("timing", "cuda"), (), "cuda"),
        Piece("triton times", 16, cases("timing", "triton"), ("triton",), "triton"),
        Piece("cuda graphs", 14, cases("graphs", "cuda"), (), "cuda"),
    ]
    later = [
        Piece("triton graphs", 40, cases("graphs", "triton"), ("triton",), "triton", later=True),
        Piece("cuda forms", 20, cases("forms", "cuda"), ("waits",), "cuda", later=True),
        Piece("triton forms", 40, cases("forms", "triton"), ("triton",), "triton", later=True),
        Piece("triton stress", 20, cases("stress", "triton"), ("triton",), "triton", later=True),
        *(Piece(f"{b} bytes", 40, traffic(b), (), b, later=True) for b in BACKENDS),
        Piece("memcheck", 60, sanitizer("memcheck", "cuda"), (), "cuda", later=True),
        Piece("racecheck", 60, sanitizer("racecheck", "cuda"), (), "cuda", later=True),
        Piece("memcheck triton", 60, sanitizer("memcheck", "triton"), ("triton",), "triton", later=True),
        Piece("tuning", 60, cases("tuning", "triton"), ("triton",), "triton", later=True),
        Piece("peers", 40, cases("peers", "triton"), (), "all", later=True),
        Piece("tests", 1e9, tests, (), "all", later=True),
    ]
    return first + later


def first_call() -> list[Piece]:
    return [piece for piece in every() if not piece.later]
