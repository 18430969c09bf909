"""The formulas of `grpo_kernels.tools.memory` against the allocator; everybody else is measured only."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.tools.memory import (
    FORMULAS,
    PRECISIONS,
    LossShape,
    largest_batch,
    predict,
    profile_memory,
    training_memory,
)
from grpo_kernels.tools.memory.critic import critic_moments, critic_step
from grpo_kernels.tools.memory.measure import make_batch, outcomes, profile_step
from grpo_kernels.tools.memory.predict import formula_of
from grpo_kernels.tools.memory.training import critic_parameters
from grpo_kernels.tools.providers import Task, provider_named, providers
from grpo_kernels.tools.shapes import SHAPES, ModelShape

TOLERANCE = 0.02
GRIDS = [(8, 32, 16384, 96), (1, 200, 16411, 48)]  # sequences, tokens, vocabulary, hidden
DTYPES = [torch.bfloat16, torch.float32]
CASES = [
    (path, p.name, grid, dtype)
    for path in ("linear", "logits")
    for p in providers("cpu")
    if path in p.paths and formula_of(p.name, path)
    for grid in GRIDS
    for dtype in DTYPES
]


def within(predicted: int, measured: int) -> bool:
    return abs(predicted / measured - 1) <= TOLERANCE


@pytest.mark.parametrize(("path", "name", "grid", "dtype"), CASES, ids=str)
def test_prediction_is_the_measurement(path, name, grid, dtype):
    shape = LossShape(*grid, dtype)
    profile = profile_step(provider_named(name), Task(path), make_batch(shape, path), shape)
    predicted = predict(name, shape, path)
    assert within(predicted.peak, profile.peak_without_scratch), (predicted.at_peak, profile.at_peak)


def test_every_formula_is_held_to_a_measurement():
    measured = {(path, name.replace("ours-cpu", "ours")) for path, name, *_ in CASES}
    assert measured == set(FORMULAS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("chunk_rows", "fill"), [(64, 1.0), (100, 0.6), (1000, 0.6), (1, 0.05)])
def test_prediction_of_chunks_and_masked_rows(dtype, chunk_rows, fill):
    shape = LossShape(4, 64, 20011, 64, dtype, fill, chunk_rows)
    batch = make_batch(shape, "linear")
    shape = dataclasses.replace(shape, fill=batch.tokens.mask.float().mean().item())  # lengths are whole tokens
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()

    def step():
        loss = gk.linear_grpo_loss(hidden, weight, *batch.tokens.arguments, chunk_rows=chunk_rows, backend="cpu").loss
        return torch.autograd.grad(loss, (hidden, weight))

    step()
    with profile_memory(sizes=shape.sizes) as profile:
        step()
    assert within(predict("ours", shape).peak, profile.peak_without_scratch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(8, 512, 9, 64), (4, 256, 9, 896), (3, 100, 9, 16)])
def test_prediction_of_the_critic(grid, dtype):
    shape = LossShape(*grid, dtype)
    step = critic_step(shape)
    step()
    with profile_memory() as profile:
        step()
    assert within(max(m.total for m in critic_moments(shape)), profile.peak_without_scratch)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32_adam", torch.float32), ("bf16_only", torch.bfloat16)])
def test_training_states_are_what_adam_allocates(precision, dtype):
    with profile_memory() as profile:
        model = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.Linear(400, 500)).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        model(torch.ones(1, 300, dtype=dtype)).sum().backward()
        optimizer.step()
    parameters = sum(p.numel() for p in model.parameters())
    assert within(parameters * PRECISIONS[precision].trained, profile.left)


# ---- PPO compared with GRPO ----

SMALL = ModelShape("small", vocab=1000, hidden=64, layers=2, parameters=10**6, tied=False)
BATCH = LossShape(2, 50, 1000, 64)


def test_ppo_adds_a_critic_and_nothing_else():
    grpo, ppo = (training_memory(SMALL, BATCH, method=method) for method in ("grpo", "ppo"))
    added = set(ppo.holdings) - set(grpo.holdings)
    assert set(grpo.holdings) < set(ppo.holdings)
    assert {h.label for h in added} == {"critic: weights", "critic: gradients", "critic: optimizer"}
    assert ppo.total - grpo.total == 16 * (10**6 - 1000 * 64 + 64)
    assert critic_parameters(dataclasses.replace(SMALL, tied=True)) == 10**6 + 64


def test_one_backward_for_both_holds_both_activations():
    apart, together = (training_memory(SMALL, BATCH, method="ppo", together=given) for given in (False, True))
    added = set(together.holdings) - set(apart.holdings)
    assert {h.label for h in added} == {"critic: activations", "critic: values, GAE, value loss"}


def test_the_reference_is_weights_only():
    with_one, without = (training_memory(SMALL, BATCH, method="grpo", reference=given) for given in (True, False))
    assert with_one.total - without.total == 2 * 10**6


@pytest.mark.parametrize(("changes", "words"), [({"method": "dpo"}, "method"), ({"precision": "int8"}, "precision")])
def test_unknown_names_are_refused(changes, words):
    with pytest.raises(ValueError, match=f"{words} must be one of"):
        training_memory(SMALL, BATCH, **{"method": "grpo", **changes})


# ---- shapes and batches ----


@pytest.mark.parametrize(
    "changes", [{"sequences": 0}, {"vocab": 0}, {"dtype": torch.float16}, {"fill": 0.0}, {"fill": 1.5}]
)
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(ValueError, match="got"):
        dataclasses.replace(BATCH, **changes)


@pytest.mark.parametrize("name", ["trl", "liger", "verl", "cce", "quack", "compile", "ours-cpu-sideways"])
def test_who_has_no_formula_is_measured_only(name):
    with pytest.raises(
        ValueError, match=f"{name!r} from linear is measured only .* formulas for eager from logits, ours"
    ):
        predict(name, BATCH)


def test_who_has_no_formula_is_not_measured_where_eager_would_not_fit(monkeypatch):
    monkeypatch.setattr("grpo_kernels.tools.memory.measure.profile_step", None)
    task, shape = Task("logits"), LossShape(2, 50, 1000, 64)
    needed = 3 * shape.logits + predict("eager", shape, "logits").peak
    (found,) = outcomes([provider_named("compile")], task, shape, needed - 1, lambda name: None)
    assert found.peak is None and found.reason.startswith("too large for here")
    assert found.reason.endswith("if it needs what eager PyTorch does")


@pytest.mark.parametrize(("path", "name"), FORMULAS)
def test_the_largest_batch_is_the_largest(path, name):
    model = SHAPES["qwen2.5-0.5b"]
    shape = LossShape(1, 512, model.vocab, model.hidden)
    beside = shape.hidden_states if path == "linear" else shape.logits
    budget = 12 << 30

    def needs(sequences: int) -> int:
        return predict(name, dataclasses.replace(shape, sequences=sequences), path).peak + sequences * beside

    found = largest_batch(name, shape, budget, path, beside=beside)
    assert found > 0 and needs(found) <= budget
    assert all(needs(n) > budget for n in range(found + 1, found + 40))
    assert largest_batch(name, shape, 1 << 20, path, beside=beside) == 0


# ---- the command ----

pytest.importorskip("rich")
pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from grpo_kernels.tools import cli  # noqa: E402


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, ["memory", *arguments], env={"COLUMNS": "250"})


def flat(output: str) -> str:
    """Without the line breaks that the terminal puts in."""
    return " ".join(output.split())


TINY = ["--model", "smollm2-135m", "--sequences", "1", "--tokens", "16", "--providers", "eager,ours-cpu,cce"]


def test_the_command_measures_and_predicts(tmp_path):
    import json

    picture, figures_path = tmp_path / "memory.png", tmp_path / "memory.json"
    result = invoke(*TINY, "--json", str(figures_path), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    figures = json.loads(figures_path.read_text())
    steps = {(step["path"], step["provider"]): step for step in figures["steps"]}
    assert set(steps) >= {("linear", "eager"), ("linear", "ours-cpu"), ("logits", "ours-cpu")}
    eager = steps["logits", "eager"]
    assert within(eager["predicted_bytes"], eager["measured"]["peak_bytes"])
    ours, with_eager, ppo = (state["total_bytes"] for state in figures["training"])
    assert max(ours, with_eager) < ppo
    for words in ("log-softmax, fp32 [N, V]", "Least memory, measured: ours-cpu", "GRPO needs", "in all"):
        assert words in result.output
    if importlib.util.find_spec("cut_cross_entropy") is None:
        assert "not installed: pip install cut-cross-entropy" in result.output


def test_what_does_not_fit_is_predicted():
    result = invoke("--model", "qwen3-8b", "--sequences", "512", "--tokens", "8192", "--providers", "eager,ours-cpu")
    assert result.exit_code == 0, result.output
    assert "too large for here" in result.output and "Least memory, predicted" in result.output


def test_predict_measures_nothing(monkeypatch):
    monkeypatch.setattr("grpo_kernels.tools.memory.measure.profile_step", None)
    result = invoke(*TINY, "--predict")
    assert result.exit_code == 0 and "Least memory, predicted for cpu" in result.output
    assert "no formula has met a GPU" in invoke(*TINY[:-2], "--predict", "--device", "cuda").output


def test_predict_says_who_is_measured_only():
    result = invoke(*TINY[:-1], "eager,trl,liger,cce,compile", "--predict")
    assert result.exit_code == 0 and "trl: measured only; liger: measured only; cce" in flat(result.output)
    alone = invoke(*TINY[:-1], "trl", "--predict")
    assert "loss from logits: nothing measured and nothing predicted. Not in the table: trl: measured only." in flat(
        alone.output
    )


def test_who_is_measured_only_has_no_prediction_and_no_largest_batch():
    pytest.importorskip("trl")
    shown = invoke(*TINY[:-1], "trl").output
    (row,) = [line.split() for line in shown.splitlines() if "measured only" in line][:1]
    assert [word for word in row if word != "│"][-1] == "-"


def test_a_failing_peer_is_shown_as_such(monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel\nand a stack")

    monkeypatch.setattr("grpo_kernels.tools.providers.plain.Eager.build", broken)
    result = invoke(*TINY)
    assert result.exit_code == 0 and "fails: RuntimeError: no such kernel" in result.output


def test_a_snapshot_is_shown(tmp_path):
    import pickle

    trace = [{"action": "alloc", "addr": 1, "size": 3 << 20, "stream": 0, "time_us": 5, "frames": []}]
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [[], trace]}))
    result = invoke("--snapshot", str(path))
    assert result.exit_code == 0 and "cuda:1: peak 3.0 MiB" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gpt-9"], "choose from"),
        (["--dtype", "fp8"], "dtype must be one of"),
        (["--dtype", "fp16"], "predictions are for"),
        (["--providers", "nobody"], "not known"),
        (["--loss", "mse"], "loss must be one of"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words):
    result = invoke(*arguments, "--predict")
    assert result.exit_code == 1 and words in result.output and "Traceback" not in result.output
