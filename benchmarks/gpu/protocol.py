"""What a process of cases says to its parent, which imports no torch.

`start NAME` before each case, then `ok`, `WRONG` or `EXC`, the name and JSON with what was found.
"""

from __future__ import annotations

import json
import re
from typing import Any

CUDA_ERROR = 3  # exit status: the context is lost, and every later call with it
TIMED_OUT = "Timeout ("  # how faulthandler begins
LINE = re.compile(r"^(start|ok|WRONG|EXC) ([^|\n]*?)(?: \| (.*))?$", re.M)
Figures = dict[str, Any]


def read_cases(output: str) -> tuple[dict[str, Figures], str | None]:
    """What each case said, and the one that began and never ended."""
    found: dict[str, Figures] = {}
    started = None
    for word, name, figures in LINE.findall(output):
        if word == "start":
            started = name
        elif name == started:
            found[name] = {"ok": word == "ok", **({"word": word} if word != "ok" else {}), **json.loads(figures)}
            started = None
    return found, started
