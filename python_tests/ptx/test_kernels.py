"""Every kernel of both GPU backends, as compiled PTX on the machine of this folder: accurate, without races or
deadlocks."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from . import nvcc

# A pattern for the kernels in a backend's sources.
SOURCES = {
    "cuda": ("csrc/cuda/*.cu*", r"__global__[^;{]*?\b(\w+_kernel)\("),
    "triton": ("grpo_kernels/backends/triton/*.py", r"^@kernel\ndef (\w+_kernel)\("),
}
HERE = [
    pytest.param("cuda", marks=pytest.mark.skipif(nvcc.version() is None, reason="needs nvcc")),
    pytest.param("triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")),
]
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")


def run(module, backend, *arguments):
    """The output of a module of this folder: a line of JSON for each case."""
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
    for x in outcomes:
        print(f"{x['case']}: {x['instructions']} instructions, {x['waits']} waits, {x['seconds']} s")
    wrong = {outcome["case"]: outcome["said"] for outcome in outcomes if outcome["said"] != "ok"}
    assert not wrong, json.dumps(wrong, indent=1)


def kernels_in_the_sources(backend):
    pattern, kernel = SOURCES[backend]
    names = {name for file in ROOT.glob(pattern) for name in re.findall(kernel, file.read_text(), re.MULTILINE)}
    return names - {"probe_kernel"}  # never launched: the driver is only asked whether it could run


@pytest.mark.parametrize("backend", HERE)
def test_every_kernel(backend):
    outcomes = run("run", backend)
    check(outcomes)
    assert {kernel for outcome in outcomes for kernel in outcome["kernels"]} == kernels_in_the_sources(backend)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("backend", HERE)
def test_every_form_and_shape(backend, seed):
    check(run("run", backend, "--soak", "--seed", str(seed), "--resident", str(1 + 2 * seed)))
