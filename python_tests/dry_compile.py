"""Runs a script that compiles Triton kernels for a GPU that need not be present, in a process without the
interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import grpo_kernels as gk


def check_compiled(script: Path, target: tuple[str, ...]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    roots = Path(gk.__file__).parents[1], Path(__file__).parent  # the package under test, and the tests' helpers
    environment["PYTHONPATH"] = os.pathsep.join(map(str, roots))
    done = subprocess.run(
        [sys.executable, script, *target], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
