"""Which backend is chosen, and what the error says when one cannot run."""

import contextlib
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels import backends
from grpo_kernels.backends import cpu, gpu


def test_available_backends_name_the_reason():
    states = gk.available_backends()
    assert tuple(states)[: len(backends.NAMES)] == backends.NAMES and states["cpu"] == states["reference"] == "ok"
    assert all(state == "ok" or len(state) > 20 for state in states.values())


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
    """That is: built, on a GPU that is new enough, for a supported dtype. The same inside a compiled graph."""

    class Cuda:
        def rejects(self, device, dtype):
            if device.index == 1:
                return "needs sm_80 or later; got cuda:1"
            return "'cuda' has no float64; 'triton' and 'cpu' have" if dtype == torch.float64 else None

    class Others:
        def rejects(self, device, dtype):
            return None

    monkeypatch.setattr(backends, "implementation", lambda name: Cuda() if name == "cuda" else Others())

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


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are GPUs: gpus(capabilities, the driver's error for the native module on each)."""
    pytest.importorskip("triton")
    triton = importlib.import_module("grpo_kernels.backends.triton")
    current = [0]

    @contextlib.contextmanager
    def on(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    def forget():
        backends.implementation.cache_clear()
        gpu.too_old.cache_clear()
        sys.modules.pop("grpo_kernels.backends.cuda", None)

    def install(capabilities, errors):
        forget()
        native = SimpleNamespace(unusable=lambda: errors[current[0]])
        monkeypatch.setitem(sys.modules, "grpo_kernels.backends._cuda", native)
        monkeypatch.setattr(backends, "_cuda", native, raising=False)
        for name, value in {
            "is_available": lambda: True, "device_count": lambda: len(capabilities), "current_device": lambda: current[0],
            "get_device_capability": lambda i: capabilities[i], "device": on,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(triton, "INTERPRETED", False)

    yield install
    forget()


def test_a_gpu_whose_driver_cannot_run_our_kernels_goes_to_triton(gpus):
    gpus([(9, 0), (9, 0)], ["CUDA driver version is insufficient", "no kernel image is available"])
    state = gk.available_backends()
    assert "CUDA driver version is insufficient" in state["cuda"] and "use 'triton'" in state["cuda"]
    assert state["triton"] == "ok" and backends.resolve("auto", torch.device("cuda")) == "triton"
    with pytest.raises(backends.BackendUnavailable, match="version is insufficient"):
        backends.resolve("cuda", torch.device("cuda"))

    gpus([(9, 0), (11, 0)], ["", "no kernel image is available"])  # only the first has a kernel image
    assert gk.available_backends()["cuda"] == "ok"
    names = [backends.resolve("auto", torch.device(name)) for name in ("cuda", "cuda:0", "cuda:1")]
    assert names == ["cuda", "cuda", "triton"]
    with pytest.raises(ValueError, match=r"'cuda' does not run on cuda:1: .*no kernel image is available"):
        backends.resolve("cuda", torch.device("cuda:1"))


def test_a_gpu_that_is_too_old_is_refused_with_what_to_use(gpus, monkeypatch):
    gpus([(7, 5)], [""])
    state = gk.available_backends()
    for name in ("cuda", "triton"):
        assert "need sm_80 or later and cuda:0 is sm_75; use backend='reference'" in state[name]
    with pytest.raises(backends.BackendUnavailable, match="sm_75; use backend='reference'"):
        backends.resolve("auto", torch.device("cuda"))
    assert backends.resolve("reference", torch.device("cuda")) == "reference"

    gpus([(8, 0), (7, 0)], ["", ""])
    assert gk.available_backends()["cuda"] == gk.available_backends()["triton"] == "ok"
    for name in ("auto", "cuda", "triton"):
        with pytest.raises(ValueError, match="cuda:1 is sm_70; use backend='reference'"):
            backends.resolve(name, torch.device("cuda:1"))

    monkeypatch.setattr(torch.version, "hip", "6.4")  # ROCm numbers its architectures differently
    gpus([(7, 0)], [""])
    assert backends.resolve("triton", torch.device("cuda")) == "triton"


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


def test_importing_the_library_does_not_import_the_compiler():
    """torch._dynamo takes longer to import than the rest of torch. The attribute that we set instead of using its
    decorator is the one that the decorator sets."""
    program = "import sys, grpo_kernels; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    marked = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(marked).items() <= vars(backends._of_gpu).items() and vars(marked)


def test_anybody_may_register_a_backend():
    loaded = []

    class Mine:
        name, fuses_group_advantages, differentiable = "mine", False, False

        def unavailable(self):
            return None

        def rejects(self, device, dtype):
            return "backend 'mine' wants bfloat16" if dtype not in (None, torch.bfloat16) else None

        def whiten(self, values, active, coefficients):
            return values * 0 + 7

        def masked_moments(self, values, active):
            return torch.ones(5, dtype=torch.float64)

    def load():
        loaded.append(1)
        return Mine()

    try:
        backends.register("mine", load)
        assert not loaded and gk.available_backends()["mine"] == "ok"
        assert (gk.whiten(torch.randn(2, 3), backend="mine") == 7).all() and loaded == [1]
        with pytest.raises(TypeError, match="'mine' wants bfloat16"):
            backends.resolve("mine", torch.device("cpu"), torch.float32)
        backends.register("mine", lambda: SimpleNamespace(unavailable=lambda: "it is asleep"))
        with pytest.raises(backends.BackendUnavailable, match="backend 'mine' is not here: it is asleep"):
            gk.whiten(torch.randn(2, 3), backend="mine")
        assert gk.available_backends()["mine"] == "it is asleep"
    finally:
        del backends._LOADERS["mine"]
        backends.implementation.cache_clear()
    with pytest.raises(ValueError, match="got 'mine'"):
        backends.resolve("mine", torch.device("cpu"))
