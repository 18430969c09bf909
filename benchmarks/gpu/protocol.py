"""The output of a process that runs cases, for its parent, which does not import torch.

Before each case: `start`, its name and its family. Then `ok`, `WRONG` or `EXC`, the name, and the results as JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

CUDA_ERROR = 3  # exit status: the context is lost, so every later call would fail
TIMED_OUT = "Timeout ("  # the beginning of faulthandler's message
STUCK = "would never have ended"  # the message of csrc/cuda/watchdog.cuh after ten seconds
LINE = re.compile(r"^(start|ok|WRONG|EXC) ([^|\n]*?)(?: \| (.*))?$", re.M)
Figures = dict[str, Any]


class Started(NamedTuple):
    """A case that started and did not end."""

    name: str
    family: str


def read_cases(output: str) -> tuple[dict[str, Figures], Started | None]:
    """The results of each case, and the case that was running at the end."""
    by_name: dict[str, Figures] = {}
    started: Started | None = None
    for word, name, said in LINE.findall(output):
        figures = json.loads(said or "{}")
        if word == "start":
            started = Started(name, figures.get("family", ""))
        elif started is not None and name == started.name:
            about = {} if word == "ok" else {"word": word, "family": started.family}
            by_name[name] = {"ok": word == "ok", **about, **figures}
            started = None
    return by_name, started
