"""Which backend runs, and what is said of one that cannot."""

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels import backends
from grpo_kernels.backends import cpu


def test_available_backends_name_the_reason():
    found = gk.available_backends()
    assert tuple(found) == backends.NAMES and found["cpu"] == found["reference"] == "ok"
    assert all(state == "ok" or len(state) > 20 for state in found.values())


def test_auto_resolves_by_device():
    assert backends.resolve("auto", torch.device("cpu")) == "cpu"
    assert backends.resolve("auto", torch.device("meta")) == "reference"
    with pytest.raises(ValueError, match="needs CPU tensors; got meta"):
        backends.resolve("cpu", torch.device("meta"))


WITHOUT_A_GPU = """
import torch
import grpo_kernels as gk
from grpo_kernels import backends

assert torch.cuda.is_available() or "finds no CUDA or ROCm device" in gk.available_backends()["triton"]
x, t = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)
try:
    gk.token_logps(x, t, backend="triton")
except (backends.BackendUnavailable, ValueError) as error:
    assert "TRITON_INTERPRET=1, set before Triton is imported" in str(error), error
else:
    raise AssertionError("CPU tensors were accepted")
if not torch.cuda.is_available():
    try:
        backends.resolve("auto", torch.device("cuda"))  # no silent fall back to slow code
    except backends.BackendUnavailable as error:
        assert "'triton' is not here" in str(error)
    else:
        raise AssertionError("resolved")
"""


def test_triton_without_a_gpu_and_without_its_interpreter():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_GPU], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(gk.available_backends()["triton"] != "ok", reason="no Triton")
def test_triton_is_what_a_gpu_gets():
    assert backends.resolve("auto", torch.device("cuda")) == "triton"


def test_a_gpu_gets_cuda_where_it_has_kernels(monkeypatch):
    """Built, the GPU new enough and the dtype there; inside a compiled graph too."""
    cuda = SimpleNamespace(runs_on=lambda device, dtype: device.index != 1 and dtype != torch.float64)
    others = SimpleNamespace(runs_on=lambda device: True)
    monkeypatch.setattr(backends, "implementation", lambda name: cuda if name == "cuda" else others)

    def names():
        devices = torch.device("cuda"), torch.device("cuda:1")  # the second is too old
        return [backends.resolve("auto", d, t) for d in devices for t in (None, torch.bfloat16, torch.float64)]

    assert names() == ["cuda", "cuda", "triton", "triton", "triton", "triton"]

    def in_a_graph(x):
        return x + len(backends.resolve("auto", torch.device("cuda"), torch.bfloat16))

    assert torch.compile(in_a_graph, fullgraph=True, backend="eager")(torch.zeros(1)) == len("cuda")
    with pytest.raises(ValueError, match="sm_80 or later; got cuda:1"):
        backends.resolve("cuda", torch.device("cuda:1"), torch.bfloat16)
    with pytest.raises(TypeError, match="'cuda' has no float64; 'triton' and 'cpu' have"):
        backends.resolve("cuda", torch.device("cuda"), torch.float64)


def test_a_missing_native_module_says_how_to_build_it(monkeypatch):
    def missing(name):
        raise ImportError("no _cpu")

    backends.implementation.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    try:
        with pytest.raises(
            backends.BackendUnavailable, match=r"does not load \(no _cpu\); build it with `pip install \.`"
        ):
            gk.token_logps(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64))
        assert "pip install" in gk.available_backends()["cpu"]
        assert "pip install 'grpo-kernels[triton]'" in gk.available_backends()["triton"]
    finally:
        backends.implementation.cache_clear()


def test_instruction_sets():
    assert (
        cpu.instruction_set() == cpu.supported_instruction_sets()[-1] and "generic" in cpu.supported_instruction_sets()
    )
    with cpu.forced_instruction_set("generic"):
        assert cpu.instruction_set() == "generic"
    assert cpu.instruction_set() == cpu.supported_instruction_sets()[-1]
    with pytest.raises(ValueError, match=r"this CPU supports .*got 'sse9'"), cpu.forced_instruction_set("sse9"):
        pass


def test_threads_follow_torch(monkeypatch):
    """Every launch reads torch.get_num_threads()."""
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked.append(1) or 1)
    gk.grpo_loss(torch.randn(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2))
    assert len(asked) == 2  # the row kernel and the token kernel


def test_a_forked_child_does_not_wait_for_threads_it_has_not_got():
    """torch's own parallel loops hang there; ours start threads of their own."""
    code = """
import os, torch, grpo_kernels as gk
torch.set_num_threads(2)
x, t, a = torch.randn(64, 5000), torch.zeros(64, dtype=torch.int64), torch.ones(64)
loss = gk.grpo_loss(x, t, a).loss
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(gk.grpo_loss(x, t, a).loss, loss) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_calls_from_several_python_threads():
    """The GIL is released in the kernels: calls overlap."""
    torch.manual_seed(0)
    x, t, a = torch.randn(64, 5000), torch.randint(5000, (64,)), torch.randn(64)
    expected = gk.grpo_loss(x, t, a).loss
    with ThreadPoolExecutor(4) as pool:
        losses = list(pool.map(lambda _: gk.grpo_loss(x, t, a).loss, range(100)))
    assert all(torch.equal(loss, expected) for loss in losses)
