"""Every kernel of both GPU backends, as its compiler's PTX, on the machine of this folder: right by the accuracy rule, no
race, no deadlock."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from . import nvcc

# The kernels that a backend has, by its sources.
SOURCES = {
    "cuda": ("csrc/cuda/*.cu*", r"__global__[^;{]*?\b(\w+_kernel)\("),
    "triton": ("grpo_kernels/backends/triton/*.py", r"^@kernel\ndef (\w+_kernel)\("),
}
HERE = [
    pytest.param("cuda", marks=pytest.mark.skipif(nvcc.version() is None, reason="nvcc is not here")),
    pytest.param("triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")),
]
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")


def run(module, backend, *arguments):
    """What a module of this folder prints, a line of JSON for each case."""
    command = [sys.executable, "-m", f"ptx.{module}", backend, *arguments]
    paths = f"{ROOT}:{ROOT / 'python_tests'}"
    done = subprocess.run(
        command,
        env=environment(PYTHONPATH=paths, TRITON_INTERPRET="0"),
        cwd=ROOT / "python_tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(outcomes):
    assert outcomes
    for found in outcomes:
        print(f"{found['case']}: {found['instructions']} instructions, {found['waits']} waits, {found['seconds']} s")
    wrong = {found["case"]: found["said"] for found in outcomes if found["said"] != "ok"}
    assert not wrong, json.dumps(wrong, indent=1)


def kernels_in_the_sources(backend):
    pattern, kernel = SOURCES[backend]
    names = {name for file in ROOT.glob(pattern) for name in re.findall(kernel, file.read_text(), re.MULTILINE)}
    return names - {"probe_kernel"}  # the driver is asked about it, and nothing launches it


@pytest.mark.parametrize("backend", HERE)
def test_every_kernel(backend):
    outcomes = run("run", backend)
    check(outcomes)
    assert {kernel for found in outcomes for kernel in found["kernels"]} == kernels_in_the_sources(backend)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("backend", HERE)
def test_every_form_and_shape(backend, seed):
    check(run("run", backend, "--soak", "--seed", str(seed), "--resident", str(1 + 2 * seed)))
