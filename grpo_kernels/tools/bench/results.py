"""The JSON of a run: what `grpo-kernels bench` writes, and what pytest-benchmark wrote, read alike."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..environment import machine_info

SCHEMA = 1


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]
    records: list[dict[str, Any]]  # of measure.measure and lengths.measure_lengths
    date: str = ""  # UTC, to the minute
    command: str = ""
    path: str = field(default="", compare=False)

    @property
    def device(self) -> str:
        """What two results must share to be compared: the GPU, else the processor and how much of it."""
        machine = self.machine
        cpu = f"{machine['cpu']}, {machine['torch_threads']} threads, {machine['instruction_set']}"
        return machine.get("gpu") or cpu

    @property
    def caption(self) -> str:
        """Device, versions and commit: goes with every table and picture."""
        machine = self.machine
        peers = ", ".join(f"{name} {found}" for name, found in machine.get("packages", {}).items())
        return (
            f"{self.device}; torch {machine['torch']}{', ' + peers if peers else ''}; "
            f"commit {machine['commit'] or 'unknown'}; {self.date}"
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": SCHEMA, "datetime": self.date, "command": self.command, "machine": self.machine,
            "cases": self.records,
        }  # fmt: skip
        path.write_text(json.dumps(content, indent=1) + "\n")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")


def of_this_machine(records: Sequence[dict[str, Any]], command: str) -> Results:
    return Results(machine_info(), list(records), now(), command)


def load(path: Path) -> Results:
    """Raises ValueError for a file that is neither kind."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result: {error}") from None
    if content.get("schema") == SCHEMA:
        return Results(content["machine"], content["cases"], content["datetime"], content["command"], str(path))
    machine = content.get("machine_info", {}).get("grpo_kernels")
    if machine is None:
        raise ValueError(f"{path} holds neither `grpo-kernels bench` nor `pytest benchmarks` results")
    records = [b["extra_info"] for b in content["benchmarks"] if "providers" in b["extra_info"]]
    date = content["datetime"][:16].replace("T", " ")
    return Results(machine, records, date, "pytest benchmarks", str(path))
