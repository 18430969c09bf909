"""Chooses the next piece, saves its result, and stops in time."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .process import Done, Job, write_json

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu_check"  # logs and unpacked wheels, which may be deleted
HEALTH_LIMIT = 20.0
LEAST = 3.0  # no piece starts with fewer seconds remaining
TAIL = 1500  # characters of a failure's output that are saved
PATIENCE = 20  # factor of the limits on a CPU, which may be busy
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")

# The sources on which a result depends. A change of one backend does not invalidate the other's results.
SHARED = ("setup.py", "grpo_kernels")
TRITON = ("grpo_kernels/backends/triton",)
SOURCES = {"triton": (SHARED, ()), "cuda": ((*SHARED, "csrc"), TRITON), "all": ((*SHARED, "csrc"), ())}


class Unhealthy(RuntimeError):
    """The GPU no longer answers, so later results would mean nothing."""


@dataclass(frozen=True)
class Piece:
    """`work` returns the result, or None if the time of the call ran out first."""

    name: str
    limit: float  # seconds
    work: Callable[[Run, Piece], dict[str, Any] | None]
    families: tuple[str, ...] = ()  # skipped if one of them has hung
    of: str = "all"  # a key of SOURCES
    later: bool = False  # runs after everything else and after repeats
    always: bool = False  # runs in each call, since the machine may have changed


@dataclass
class Run:
    """One call of the check. `state` is the JSON."""

    out: Path
    deadline: float
    dry: bool = False
    wheels: Path | None = None
    case_seconds: float = 12.0  # the kernels' watchdog takes ten
    first_seconds: float = 25.0  # the first call compiles
    state: dict[str, Any] = field(default_factory=dict)
    build: Job | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def results(self) -> dict[str, Any]:
        return self.state.setdefault("pieces", {})

    @property
    def hung(self) -> dict[str, Any]:
        """For each family: the piece, the case and the sources of its first hang."""
        return self.state.setdefault("hung", {})

    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def patient(self, seconds: float) -> float:
        return seconds * (PATIENCE if self.dry else 1)

    def limit(self, piece: Piece) -> float:
        return self.patient(piece.limit)

    def save(self) -> None:
        write_json(self.out, self.state)

    def start(self, name: str, command: Sequence[str], **environment: str) -> Job:
        paths = [str(ROOT), str(WORK / "site"), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", **environment}
        return Job(command, WORK / f"{name}.log", ROOT, environment)

    def execute(self, piece: Piece, limit: float, *command: str, **environment: str) -> tuple[Done, bool]:
        """How it ended, and whether the piece's limit, rather than the call's, ended it."""
        allowed = min(limit, self.remaining())
        done = self.start(piece.name, command, **environment).wait(allowed)
        return done, done.status is None and allowed == limit

    def python(self, module: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", f"benchmarks.gpu.{module}", "--device", self.device, *arguments)

    def hang(self, families: Iterable[str], piece: Piece, case: str | None = None) -> None:
        for family in families:
            self.hung.setdefault(family, {"piece": piece.name, "case": case, "sources": digest(piece.of)})

    def ended(self, families: Iterable[str]) -> list[str]:
        """The families among these that have hung with the current sources."""
        current = {digest(of) for of in SOURCES}
        return [f for f in families if f in self.hung and self.hung[f]["sources"] in current]

    def check_health(self) -> None:
        """After a hang or a CUDA error, checks that the GPU still adds numbers."""
        done = self.start("health", self.python("health")).wait(HEALTH_LIMIT)
        self.state["healthy"] = done.status == 0
        self.save()
        if done.status != 0:
            self.state["health_output"] = done.output[-TAIL:]
            self.save()
            raise Unhealthy(f"the GPU does not answer after {self.state.get('current')}")

    def run(self, pieces: Sequence[Piece], again: Sequence[str] = ()) -> None:
        """Runs the pieces that are due and saves after each. Those without time stay in `missing`."""
        todo = order(pieces, self.results, again)
        self.state["missing"] = [p.name for p in todo]
        cut: set[str] = set()
        while todo and self.remaining() >= LEAST:
            piece = todo.pop(0)
            if self._do(piece):
                self.state["missing"].remove(piece.name)
            elif piece.name not in cut:  # slower than its limit: retry once, after everything new
                cut.add(piece.name)
                todo.insert(sum(not p.later or piece.later for p in todo), piece)
            self.save()

    def _do(self, piece: Piece) -> bool:
        if over := self.ended(piece.families):
            first = self.hung[over[0]]
            reason = f"{over[0]} hung in {first['piece']} ({first['case']})"
            self.results.setdefault(piece.name, {"ok": False, "skipped": reason, "sources": digest(piece.of)})
            return True
        self.state["current"] = piece.name
        self.save()  # if the machine disappears, the file says what was running
        begin = time.monotonic()
        result = piece.work(self, piece)
        if result is None:
            return False
        result = {**result, "seconds": round(time.monotonic() - begin, 1), "sources": digest(piece.of)}
        self.results[piece.name] = result
        self.state.pop("current", None)
        print(f"{piece.name}: {brief(result)}", flush=True)
        if any(result.get(sign) for sign in ("hang", "cuda_error", "never_began")):
            self.check_health()
        return not result.get("unfinished")


def brief(result: dict[str, Any]) -> str:
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    word = "good" if result["ok"] else "unfinished" if result.get("unfinished") else "FAILED"
    word = f"unavailable ({result['unavailable']})" if "unavailable" in result else word
    wrong = ", ".join(result.get("bad", []))
    return f"{word} in {result.get('seconds', 0):.0f} s" + (f": {wrong}" if wrong else "")


def order(pieces: Sequence[Piece], results: dict[str, Any], again: Sequence[str] = ()) -> list[Piece]:
    """New pieces, then those that failed, then those that were good with other sources; then the same for `later`
    pieces. A hang is not repeated until the sources change."""

    def rank(piece: Piece) -> int | None:
        result, late = results.get(piece.name), 3 * piece.later
        if piece.always or result is None or result.get("unfinished") or "skipped" in result:
            return 1 + late
        same = result["sources"] == digest(piece.of)
        if piece.name in again or (not result["ok"] and not (result.get("hang") and same)):
            return 2 + late
        return None if same else 3 + late

    ranked = [(rank(piece), i) for i, piece in enumerate(pieces)]
    return [pieces[i] for r, i in sorted((r, i) for r, i in ranked if r is not None)]


_digests: dict[str, str] = {}


def digest(of: str) -> str:
    """Hash of the sources on which a result depends, which needs no git."""
    if of not in _digests:
        hashed, (roots, without) = hashlib.sha256(), SOURCES[of]
        for file in sorted(file for root in roots for file in _files(ROOT / root)):
            name = file.relative_to(ROOT).as_posix()
            if not name.startswith(without):
                hashed.update(f"{name}\n".encode() + file.read_bytes())
        _digests[of] = hashed.hexdigest()[:16]
    return _digests[of]


def _files(root: Path) -> Iterable[Path]:
    return [root] if root.is_file() else (f for f in root.rglob("*") if f.suffix in SUFFIXES)
