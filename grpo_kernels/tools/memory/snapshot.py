"""Profiles from CUDA memory snapshots, recorded here or elsewhere."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .events import MemoryEvent, Recording
from .profile import MemoryProfile

# Memory is the caller's from "alloc" until it asks for the release; "free_completed" may wait for another stream.
_SIGN = {"alloc": 1, "free_requested": -1}
_NOT_THE_USERS = ("/torch/", "<frozen", "/grpo_kernels/tools/memory/")


class _DataOnly(pickle.Unpickler):
    """A snapshot is dicts, lists, strings and numbers. A pickle that asks for anything else is not opened."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"not a CUDA memory snapshot: it asks for {module}.{name}")


def load_snapshot(path: str | Path) -> dict[str, Any]:
    """What ``torch.cuda.memory._dump_snapshot(path)`` wrote. Runs no code from the file.

    Raises:
        ValueError: for a file that is no snapshot.
    """
    try:
        with open(path, "rb") as file:
            snapshot = _DataOnly(file).load()
    except (pickle.UnpicklingError, EOFError, UnicodeDecodeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a CUDA memory snapshot: {error}") from error
    if not isinstance(snapshot, dict) or "device_traces" not in snapshot:
        raise ValueError(f"{path} is not a CUDA memory snapshot: it has no device_traces")
    return snapshot


def snapshot_profile(snapshot: Mapping[str, Any], device: int = 0) -> MemoryProfile:
    """The timeline of a snapshot whose history was recorded (``torch.cuda.memory._record_memory_history()``).

    Labels are the source lines that allocated, where the history has stacks. Bytes are above what was allocated when
    the recording began.

    Raises:
        ValueError: if nothing was recorded for the device.
    """
    traces = snapshot["device_traces"]
    trace = traces[device] if device < len(traces) else []
    entries = [entry for entry in trace if entry["action"] in _SIGN]
    if not entries:
        raise ValueError(
            f"the snapshot has no allocations of cuda:{device}: call torch.cuda.memory._record_memory_history() before "
            "the step and torch.cuda.memory._dump_snapshot(path) after it"
        )
    name = f"cuda:{device}"
    first = entries[0].get("time_us", 0)
    events = [
        MemoryEvent(
            (entry.get("time_us", first) - first) / 1e6,
            entry["addr"],
            _SIGN[entry["action"]] * entry["size"],
            name,
            _origin(entry.get("frames") or []),
            None,
        )
        for entry in entries
    ]
    profile = MemoryProfile(name)
    profile.fill(Recording(list(events), []))
    return profile


def _origin(frames: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """The innermost Python line that is the user's own, else the innermost of all; frames are innermost first."""
    python = [frame for frame in frames if str(frame["filename"]).endswith(".py")]
    own = [frame for frame in python if not any(part in frame["filename"] for part in _NOT_THE_USERS)]
    for frame in (own or python)[:1]:
        return (f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}",)
    return (str(frames[0]["name"]),) if frames else ()
