"""`grpo-kernels doctor`: what a newcomer or a bug report needs to know."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("typer")

from typer.testing import CliRunner

import grpo_kernels as gk
from grpo_kernels.tools import cli, doctor

RUNS = [name for name, state in gk.available_backends().items() if state == "ok" and name != "reference"]


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, ["doctor", *arguments], env={"COLUMNS": "200"})


def flat(output: str) -> str:
    """Without the line breaks that a narrow terminal puts in."""
    return " ".join(output.split())


def test_it_says_what_is_here_and_that_it_computes():
    result = invoke()
    assert result.exit_code == 0, result.output
    shown = flat(result.output)
    for expected in (torch.__version__, "instruction set", "row_policy", *(f"self-test {name} on" for name in RUNS)):
        assert expected in shown
    for name, state in gk.available_backends().items():
        assert name in shown and (state == "ok" or state.split()[0] in shown)


def test_it_fails_when_the_kernels_are_wrong(monkeypatch):
    wrong = doctor.SelfTest("cpu", "cpu", error=float("nan"), seconds=0.0)
    monkeypatch.setattr(doctor, "self_tests", lambda: [wrong])
    result = invoke()
    assert result.exit_code == 1 and "FAILED" in result.output


def test_it_fails_where_no_kernel_runs(monkeypatch):
    monkeypatch.setattr(doctor, "self_tests", list)
    assert invoke().exit_code == 1


def test_a_backend_that_raises_is_reported(monkeypatch):
    def broken(*_: object, **__: object):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(gk, "linear_grpo_loss", broken)
    test = doctor.self_test("cpu")
    assert not test.passed and str(test) == "FAILED, RuntimeError: no such instruction"


def test_a_wrong_gradient_fails_the_self_test(monkeypatch):
    correct = gk.linear_grpo_loss

    def scaled(*arguments, backend, **keywords):
        out = correct(*arguments, backend=backend, **keywords)
        return out._replace(loss=out.loss * 1.01) if backend == "cpu" else out

    monkeypatch.setattr(gk, "linear_grpo_loss", scaled)
    assert not doctor.self_test("cpu").passed


@pytest.mark.parametrize(
    ("rows", "chunks"), [(1, "1 chunk of 1 rows at most"), (4096, "10 chunks of 410 rows at most")]
)
def test_the_plan_names_the_chunks(rows, chunks):
    linear = next(p for p in doctor.plans(rows, 151936, 896, torch.bfloat16) if p.call == "linear_grpo_loss")
    assert linear.backend == "cpu" and linear.kernels.startswith(chunks)


def without(*modules, arguments=("doctor",)):
    """The command where `modules` are not installed."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({modules!r}))"
    script = f"{blocked}; sys.argv[1:] = {list(arguments)!r}; from grpo_kernels.tools.cli import app; app()"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_the_extra_cli_is_enough_for_the_doctor():
    done = without("matplotlib", "psutil", "transformers", "gguf", "accelerate", "pytest")
    assert done.returncode == 0 and "self-test" in done.stdout, done.stderr


def test_without_typer_the_command_names_its_extra():
    done = without("typer")
    assert done.returncode == 1 and done.stderr.strip() == (
        "grpo-kernels needs typer: run `pip install 'grpo-kernels[cli]'`."
    )
