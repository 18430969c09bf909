"""A command in a process group of its own, which ends in time with everything that it started.

Nothing here imports torch: the process that watches the GPU must not be one that the GPU can hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Done:
    """`status` None: it was killed when `limit` had passed, and had written nothing for `quiet` seconds."""

    status: int | None
    output: str
    seconds: float
    quiet: float = 0.0


class Job:
    """A started command; its output goes to a file, which a killed process leaves behind."""

    def __init__(self, command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._begin = log, time.monotonic()
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self, limit: float) -> Done:
        """Its end, or that of its whole group after `limit` seconds from now. Also when this process is interrupted."""
        status: int | None = None
        quiet = 0.0
        try:
            status = self._process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            quiet = time.time() - self._log.stat().st_mtime
        finally:
            self.kill()  # a group outlives its leader: a profiler's child goes on using the GPU
        return Done(status, self._log.read_text(errors="replace"), time.monotonic() - self._begin, quiet)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # A process inside the driver may not die: it is left behind rather than waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)


def run(command: Sequence[str], limit: float, log: Path, folder: Path, environment: Mapping[str, str]) -> Done:
    return Job(command, log, folder, environment).wait(limit)


def write_json(path: Path, value: Any) -> None:
    """All or nothing: what is killed while it writes leaves the last file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(draft, path)
