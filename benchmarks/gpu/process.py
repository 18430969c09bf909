"""Runs a command in a separate process group, which is ended in time with everything that it started.

Nothing here imports torch: the GPU must not be able to hang the process that watches it.
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
    """`status` is None if it was killed after `limit`; it had then written nothing for `quiet` seconds."""

    status: int | None
    output: str
    seconds: float
    quiet: float = 0.0


class Job:
    """A started command. Its output goes to a file, which survives if the process is killed."""

    def __init__(self, command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._begin = log, time.monotonic()
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self, limit: float) -> Done:
        """Waits for its end, and kills its process group after `limit` seconds, or if this process is interrupted."""
        status: int | None = None
        quiet = 0.0
        try:
            status = self._process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            quiet = time.time() - self._log.stat().st_mtime
        finally:
            self.kill()  # a group may outlive its leader: a profiler's child continues to use the GPU
        return Done(status, self._log.read_text(errors="replace"), time.monotonic() - self._begin, quiet)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # A process that hangs in the driver may not die, so nobody waits for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)


def run(command: Sequence[str], limit: float, log: Path, folder: Path, environment: Mapping[str, str]) -> Done:
    return Job(command, log, folder, environment).wait(limit)


def write_json(path: Path, value: Any) -> None:
    """Writes atomically: a process that is killed while writing leaves the previous file intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(draft, path)
