"""Launches of both GPU backends are free of races and deadlocks in every schedule, as far as SentryWard sees."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment
from ptx import nvcc

from .cases import CASES
from .check import PROVEN


def missing(module, reason):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=reason)


HERE = [
    pytest.param("cuda", marks=pytest.mark.skipif(nvcc.version() is None, reason="needs nvcc")),
    pytest.param("triton", marks=missing("triton", "needs Triton")),
]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree"),
    missing("sentryward", "needs SentryWard, which exists for Linux on x86-64 and Arm"),
]


def run(module, *arguments):
    """The output of a module of this folder: a line of JSON for each case."""
    done = subprocess.run(
        [sys.executable, "-m", f"verify.{module}", *arguments],
        env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'python_tests'}", TRITON_INTERPRET="0"),
        cwd=ROOT / "python_tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(backend, *arguments):
    results = run("run", backend, *arguments)
    for case in results:
        print(
            f"{case['case']}: {case['result']} in {case['seconds']} s, {case['guards']} guards, {case['decided']} decided"
        )
    wrong = {case["case"]: f"{case['result']}: {case['said']}" for case in results if case["result"] != PROVEN}
    assert not wrong, json.dumps(wrong, indent=1)
    assert [case["case"] for case in results] == [
        name for name, case in CASES[backend].items() if case.soak == ("--soak" in arguments)
    ]


@pytest.mark.parametrize("backend", HERE)
def test_launches_are_proven(backend):
    check(backend)


@pytest.mark.soak
@pytest.mark.parametrize("backend", HERE)
def test_larger_launches_are_proven(backend):
    check(backend, "--soak")


@pytest.mark.soak
@pytest.mark.parametrize("backend", HERE)
def test_mutants_are_noticed(backend):
    """And those that are listed as unnoticed still are."""
    results = run("mutants", backend)
    for mutant in results:
        print(f"{mutant['mutant']}: {mutant['result']} in {mutant['seconds']} s: {mutant['said'][:200]}")
    unexpected = {x["mutant"]: f"{x['result']}: {x['said']}" for x in results if x["noticed"] != x["to be noticed"]}
    assert results and not unexpected, json.dumps(unexpected, indent=1)
