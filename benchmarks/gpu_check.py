"""Everything that needs a GPU, in pieces that each end in time and go on where the last one stopped.

`sh benchmarks/gpu_check.sh [--part build,test,sanitize,bench] [--wheels FOLDER]`, without a network: the Python that
runs this has torch and triton, nvcc is on the PATH, and what else is missing lies as wheels in the folder. One JSON
holds every figure and what remains to be done; other sources or another device begin anew. Exit status: 0 when the
parts asked for are done and good, 1 when something failed, 3 when time ran out and the same command is to be run again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu_check"  # wheels unpacked, benchmark files: nothing that is kept
PARTS = ("build", "test", "sanitize", "bench")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
DRAM = ("dram__bytes_read.sum", "dram__bytes_write.sum")
KERNELS_COUNTED = r"\w*row\w*"
OUT_OF_TIME = 3
TAIL = 1500  # characters of a failure's output that are kept


@dataclass
class Run:
    """One call of this script: where it writes, how long it may take, and whether it only plays."""

    out: Path
    deadline: float
    wheels: Path | None = None
    jobs: int = 1
    dry: bool = False
    state: dict[str, Any] = field(default_factory=dict)

    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.state, indent=1, sort_keys=True) + "\n")

    def execute(self, *command: str, **environment: str) -> tuple[int | None, str, float]:
        """Exit status (None: no time left), output, seconds."""
        paths = os.pathsep.join([str(ROOT), str(WORK / "site"), os.environ.get("PYTHONPATH", "")])
        begin, limit = time.monotonic(), self.remaining()
        if limit <= 0:
            return None, "", 0.0
        try:
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, **environment}, text=True, timeout=limit,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None, "", time.monotonic() - begin
        return done.returncode, done.stdout, time.monotonic() - begin

    def pieces(
        self, part: str, names: Sequence[str], run: Callable[[str], dict[str, Any] | None], jobs: int = 1
    ) -> None:
        """Runs the pieces that have not been good yet, some at a time; None: out of time, so it stays to be done."""
        results = self.state["parts"].setdefault(part, {})

        todo = [name for name in names if not results.get(name, {}).get("ok")]
        with ThreadPoolExecutor(jobs) as pool:
            for name, result in zip(todo, pool.map(run, todo), strict=True):
                if result is not None:
                    results[name] = result
                    self.save()
        self.state["missing"][part] = [name for name in names if name not in results]


def outcome(status: int | None, output: str, seconds: float, **figures: Any) -> dict[str, Any] | None:
    if status is None:
        return None
    result = {"ok": status == 0, "seconds": round(seconds, 1), **figures}
    return result if status == 0 else {**result, "output": output[-TAIL:]}


def build(run: Run) -> None:
    """The wheels that are given, then the native modules for this device, into the tree."""

    def wheels(_: str) -> dict[str, Any] | None:
        files = sorted(map(str, run.wheels.glob("*.whl"))) if run.wheels else []
        if not files:
            return {"ok": True, "installed": []}
        pip = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", str(WORK / "site"))
        done = run.execute(sys.executable, *pip, *files)
        return outcome(*done, installed=[Path(f).name for f in files])

    def module(name: str) -> dict[str, Any] | None:
        if run.dry:
            return outcome(*run.execute(sys.executable, "-c", "import grpo_kernels"))
        major, minor = run.state["device"]["capability"]
        wanted = {"GRPO_KERNELS_EMULATED": "1"} if name == "emulated" else {"GRPO_KERNELS_CUDA": "1"}
        archs = {"GRPO_KERNELS_CUDA_ARCHS": f"{major}{minor}"}
        return outcome(*run.execute(sys.executable, "setup.py", "-q", "build_ext", "--inplace", **wanted, **archs))

    run.state["parts"].pop("build", None)  # a machine may be as bare as the last one was
    run.pieces(
        "build", ["wheels", "native", "emulated"], lambda name: wheels(name) if name == "wheels" else module(name)
    )


def test(run: Run) -> None:
    """The suite, a file at a time, on every backend that is here."""
    files = sorted(p.name for p in (ROOT / "python_tests").glob("test_*.py"))
    wanted = ["test_docs.py"] if run.dry else files

    def one(file: str) -> dict[str, Any] | None:
        status, output, seconds = run.execute(
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"python_tests/{file}"
        )
        counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output)}
        return outcome(0 if status == 5 else status, output, seconds, **counts)  # 5: every test deselected

    run.pieces("test", wanted, one, run.jobs)


def sanitize(run: Run) -> None:
    """Every kernel on small inputs, under each tool."""
    tool = shutil.which("compute-sanitizer")

    def one(name: str) -> dict[str, Any] | None:
        cases = (sys.executable, "-m", "benchmarks.gpu_cases")
        if run.dry:
            return outcome(*run.execute(*cases, "--backend", "cpu", "--device", "cpu"))
        if tool is None:
            return {"ok": False, "output": "compute-sanitizer is not on the PATH"}
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that the end of a tensor is the end of its memory
        status, output, seconds = run.execute(tool, "--tool", name, "--error-exitcode", "9", *cases, **uncached)
        found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        return outcome(status, output, seconds, summary=found[1] if found else None)

    run.pieces("sanitize", TOOLS[:1] if run.dry else TOOLS, one)


def bench(run: Run) -> None:
    """Each benchmark file with every peer that is here, and what the row kernel moves."""
    files = sorted(p.name for p in (ROOT / "benchmarks").glob("bench_*.py"))

    def one(name: str) -> dict[str, Any] | None:
        if name == "dram":
            return dram(run)
        result = WORK / f"{name}.json"
        options = ("-o", "addopts=", "--benchmark-only", f"--benchmark-json={result}", *([] if run.dry else ["--full"]))
        status, output, seconds = run.execute(
            sys.executable, "-m", "pytest", f"benchmarks/{name}", "-q", "-p", "no:cacheprovider", *options
        )
        if status != 0:
            return outcome(status, output, seconds)
        cases = json.loads(result.read_text())["benchmarks"]
        return outcome(status, output, seconds, cases=[{"name": c["name"], **c["extra_info"]} for c in cases])

    WORK.mkdir(parents=True, exist_ok=True)
    run.pieces("bench", ["bench_advantages.py"] if run.dry else ["dram", *files], one)


def dram(run: Run) -> dict[str, Any] | None:
    """Bytes of DRAM traffic per logit of each row kernel, by the hardware's counters."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"ok": False, "output": "ncu is not on the PATH"}
    status, output, seconds = run.execute(
        tool, "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(DRAM),
        "--kernel-name", f"regex:{KERNELS_COUNTED}", sys.executable, "-m", "benchmarks.gpu_cases", "--traffic",
    )  # fmt: skip
    return outcome(status, output, seconds, bytes_per_logit=bytes_per_logit(output) if status == 0 else None)


def bytes_per_logit(output: str) -> dict[str, list[float]]:
    """From ncu's CSV among other lines: what each launch of a kernel read and wrote; by the kernel's name."""
    lines = output.splitlines()
    logits = next(json.loads(line)["logits"] for line in lines if line.startswith('{"logits"'))
    table = csv.DictReader(io.StringIO("\n".join(line for line in lines if line.startswith('"'))))
    found: dict[str, list[float]] = {}
    for row in table:
        if row["ID"]:  # the line of units has none
            total = sum(float(row[metric].replace(",", "")) for metric in DRAM)
            name = re.search(KERNELS_COUNTED, row["Kernel Name"])
            found.setdefault(name[0] if name else row["Kernel Name"], []).append(round(total / logits, 3))
    return found


def fresh_state(dry: bool) -> dict[str, Any]:
    """What the figures are of. Nothing of the package is imported, which may not be built yet."""
    import torch
    import triton

    state: dict[str, Any] = {"dry": dry, "commit": commit(), "sources": sources_digest(), "parts": {}, "missing": {}}
    state["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    state["device"] = None
    if not dry:
        device = torch.cuda.get_device_properties(0)
        state["device"] = {
            "name": device.name, "capability": [device.major, device.minor], "memory": device.total_memory,
            "multiprocessors": device.multi_processor_count, "cuda": torch.version.cuda,
        }  # fmt: skip
    return state


def commit() -> str | None:
    """None for a copy of the files without their history; their digest tells them apart all the same."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def sources_digest() -> str:
    digest = hashlib.sha256((ROOT / "setup.py").read_bytes())
    for folder in ("csrc", "grpo_kernels", "python_tests", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".sh", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def same_run(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return all(old.get(key) == new[key] for key in ("dry", "sources", "versions", "device"))


def table(state: dict[str, Any]) -> str:
    rows = []
    for part in filter(state["parts"].__contains__, PARTS):
        results = state["parts"][part]
        good = sum(bool(r["ok"]) for r in results.values())
        bad = [name for name, r in results.items() if not r["ok"]]
        seconds = sum(r.get("seconds", 0) for r in results.values())
        rows.append([part, str(good), ", ".join(bad), ", ".join(state["missing"].get(part, [])), f"{seconds:.0f}"])
    for kernel, values in (state["parts"].get("bench", {}).get("dram", {}).get("bytes_per_logit") or {}).items():
        rows.append([f"{kernel}: bytes per logit", ", ".join(map(str, values)), "", "", ""])
    return markdown_table(("part", "good", "failed", "to be done", "s"), rows)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help="one or several of %(default)s")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install beside the tree")
    parser.add_argument("--out", type=Path, help="the JSON; default: benchmarks/results/gpu_<device>.json")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which it stops (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 4), help="test files at a time")
    parser.add_argument("--dry", action="store_true", help="without a GPU: a small piece of each part, on the CPU")
    arguments = parser.parse_args(argv)
    arguments.part = arguments.part.split(",")
    if unknown := [part for part in arguments.part if part not in PARTS]:
        parser.error(f"--part must be of {', '.join(PARTS)}; got {', '.join(unknown)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    import torch

    arguments = arguments_of(argv)
    deadline = time.monotonic() + arguments.limit
    if not arguments.dry and not torch.cuda.is_available():
        print("torch finds no GPU here: nothing was checked (--dry exercises the script itself)", file=sys.stderr)
        return 1
    state = fresh_state(arguments.dry)
    name = "dry" if arguments.dry else re.sub(r"\W+", "_", state["device"]["name"]).lower()
    out = arguments.out or ROOT / "benchmarks" / "results" / f"gpu_{name}.json"
    if out.exists() and same_run(old := json.loads(out.read_text()), state):
        state = old
    run = Run(out, deadline, arguments.wheels, arguments.jobs, arguments.dry, state)
    for part in arguments.part:
        {"build": build, "test": test, "sanitize": sanitize, "bench": bench}[part](run)
        run.save()
    print(f"{table(state)}\n{out}")
    results = [r for part in arguments.part for r in state["parts"][part].values()]
    if not all(r["ok"] for r in results):
        return 1
    return OUT_OF_TIME if any(state["missing"][part] for part in arguments.part) else 0


if __name__ == "__main__":
    raise SystemExit(main())
