"""The examples run as they are."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "grpo_from_scratch.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def rewards_of(done: subprocess.CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(x) for x in re.findall(r"reward ([\d.]+)", done.stdout)]


def test_the_reward_rises() -> None:
    done = subprocess.run([sys.executable, SCRIPT], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    rewards = rewards_of(done)
    assert len(rewards) == 15 and sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes() -> None:
    """One line per step, of rank 0; that the ranks agree is asked by the script itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*command, SCRIPT, "--steps", "2"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert len(rewards_of(done)) == 2


def test_it_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 100


def test_which_loss() -> None:
    """The notebook's cells in order; the last one asserts that each preset gives its trainer's number."""
    cells = json.loads((ROOT / "examples" / "which_loss.ipynb").read_text())["cells"]
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"which_loss.ipynb, cell {number}", "exec"), namespace)
    assert len(namespace["rows"]) == 9 and len({theirs for *_, theirs, _ in namespace["rows"]}) > 4
