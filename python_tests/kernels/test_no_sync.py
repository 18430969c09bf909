"""No public function synchronises with the GPU, and none needs more launches than before. Fake CUDA tensors show this
on any machine; on a machine with a GPU, benchmarks/gpu_check.sh shows it with torch's sync debug mode."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment

pytest.importorskip("triton", reason="the Triton backend is walked too")
from fake_cuda import library

import grpo_kernels as gk

HERE = Path(__file__).parents[1]
LINEAR = ("linear_token_logps", "linear_grpo_loss", "LinearGRPOLoss")
# They read a number from the GPU to make a coefficient of it; their documentation says so.
WAIT_BY_DESIGN = {("AdaptiveKLController", "update"), ("AdaptiveEntropyController", "update")}

if torch.version.cuda is not None or torch.version.hip is not None:
    pytest.skip("this torch has a CUDA of its own, which cannot be replaced", allow_module_level=True)
if library.compiler() is None:
    pytest.skip("no C++ compiler for nothing_gpu.cpp", allow_module_level=True)


def walked():
    env = environment(PYTHONPATH=os.pathsep.join([str(HERE), *sys.path]))
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "fake_cuda.walk"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """The walk, done once in a separate process for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "fake_cuda_walk.json"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_text(walked())
    return json.loads(path.read_text())


def entries(walk, key):
    return {(name, form): e[key] for name, forms in walk["calls"].items() for form, e in forms.items() if key in e}


def test_every_public_function_is_walked():
    from fake_cuda import calls

    assert set(calls.FUNCTIONS) == {name for name in gk.__all__ if calls.takes_tensors(name)}


def test_the_recorder_notices_every_known_wait(walk):
    assert [name for name, waits in walk["known waits"].items() if not waits] == []


def test_auto_is_what_a_gpu_gets(walk):
    assert walk["auto"] == {
        "torch.float32": "cuda", "torch.bfloat16": "cuda", "torch.float16": "cuda", "torch.float64": "triton",
    }  # fmt: skip


def test_nothing_waits_around_the_operators(walk):
    waits = entries(walk, "waits")
    assert len(waits) > 200
    assert {call: w for call, w in waits.items() if w and call not in WAIT_BY_DESIGN} == {}
    # One copy each; of a tensor without memory `tolist` asks for every number by itself.
    assert all(set(waits[call]) == {"item"} for call in WAIT_BY_DESIGN)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_operators_wait_in_the_linear_path_alone(walk, backend):
    """It waits for the number of active rows, which is the size of its result: once per forward, and once more in a
    backward that recomputes the logits. Whether torch adds in float32 is asked once per process."""
    waits = entries(walk, f"waits in {backend}")
    assert len(waits) > 100
    for (name, form), seen in waits.items():
        again = form != "no grad" and (name == "linear_token_logps" or form in RECOMPUTED)
        expected = ["nonzero"] * (1 + again) if name in LINEAR else []
        assert [x for x in seen if name not in LINEAR or x != "item"] == expected, (name, form)
    assert sum(w.count("item") for w in waits.values()) <= 1


RECOMPUTED = [
    "single_pass=False",
    *(packed + name for packed in ("", "packed, ") for name in ("sequence", "gmpo", "vespo", "clip_cov")),
]


def test_launches_are_pinned(walk):
    """Also when there are fewer than before: then run `PYTHONPATH=python_tests python -m fake_cuda.walk --pin`."""
    pinned = json.loads((HERE / "fake_cuda" / "launches.json").read_text())
    if torch.__version__.partition("+")[0] != pinned["torch"]:
        pytest.skip(f"pinned with torch {pinned['torch']}, whose operations may be made of others")
    now = {f"{name} | {form}": count for (name, form), count in entries(walk, "launches").items()}
    before = {f"{name} | {form}": n for name, forms in pinned["launches"].items() for form, n in forms.items()}
    changed = {
        call: f"{before.get(call)} -> {now.get(call)}" for call in now | before if before.get(call) != now.get(call)
    }
    assert changed == {}
