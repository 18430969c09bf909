"""What a process of cases says to its parent, which imports no torch.

`start`, the name and its family before each case, then `ok`, `WRONG` or `EXC`, the name and what was found, as JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

CUDA_ERROR = 3  # exit status: the context is lost, and every later call with it
TIMED_OUT = "Timeout ("  # how faulthandler begins
STUCK = "would never have ended"  # csrc/cuda/watchdog.cuh, after ten seconds
LINE = re.compile(r"^(start|ok|WRONG|EXC) ([^|\n]*?)(?: \| (.*))?$", re.M)
Figures = dict[str, Any]


class Started(NamedTuple):
    """A case that began and never ended."""

    name: str
    family: str


def read_cases(output: str) -> tuple[dict[str, Figures], Started | None]:
    """What each case said, and the one that was running at the end."""
    found: dict[str, Figures] = {}
    started: Started | None = None
    for word, name, said in LINE.findall(output):
        figures = json.loads(said or "{}")
        if word == "start":
            started = Started(name, figures.get("family", ""))
        elif started is not None and name == started.name:
            about = {} if word == "ok" else {"word": word, "family": started.family}
            found[name] = {"ok": word == "ok", **about, **figures}
            started = None
    return found, started
