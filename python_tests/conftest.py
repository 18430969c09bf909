"""For all tests: the available backends and instruction sets."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before anything imports triton, so that its kernels run on CPU tensors

import grpo_kernels as gk
from grpo_kernels.backends import DtypeUnsupported

try:
    from grpo_kernels.backends import cpu
except ImportError:  # a build without the CPU module, as on a machine that tests a GPU
    cpu = None

ROOT = Path(__file__).parents[1]


def environment(**changes: str) -> dict[str, str]:
    """The environment for a separate process. It must not look like a pytest-xdist worker, where pytest-benchmark would
    measure nothing."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}, **changes}


def build_emulated() -> None:
    """Only tests need it, so no installation has it. ninja compiles what has changed, for one session at a time."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "emulated.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            command, cwd=ROOT, env=environment(GRPO_KERNELS_EMULATED="1"), capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(f"the emulated CUDA kernels do not build:\n{done.stdout}{done.stderr}")


BACKENDS_HERE = [name for name, state in gk.available_backends().items() if state == "ok"]
# "cuda,triton": only these backends and their tests, also on CPU tensors; see device_proxy.py and benchmarks/gpu.
TRAVELLING = [name for name in os.environ.get("GRPO_KERNELS_TEST_BACKENDS", "").split(",") if name]
if TRAVELLING:
    import device_proxy

    if unavailable := {*TRAVELLING} - {*BACKENDS_HERE}:
        raise RuntimeError(f"GRPO_KERNELS_TEST_BACKENDS asks for {sorted(unavailable)}; available are {BACKENDS_HERE}")
    device_proxy.travel(TRAVELLING, "cuda" if torch.cuda.is_available() else "cpu")
    BACKENDS_HERE = [*TRAVELLING, "reference"]
elif (ROOT / "setup.py").exists() and Path(gk.__file__).parents[1] == ROOT:
    build_emulated()
    import emulated

    emulated.register()
    BACKENDS_HERE.append("emulated")
KERNELS_HERE = [name for name in BACKENDS_HERE if name != "reference"]
NO_FLOAT64 = ("cuda", "emulated")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pytest_configure() -> None:
    torch.set_num_threads(2)
    if "triton" in BACKENDS_HERE and not torch.cuda.is_available():
        import interpreter

        interpreter.prepare()


@pytest.hookimpl(tryfirst=True)  # before tests are selected by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `soak` run only with `-m soak`, whatever other markers are selected."""
    for item in items:
        for mark in item.iter_markers("soak_where"):
            if mark.args[0](**item.callspec.params):
                item.add_marker(pytest.mark.soak)
        if item.get_closest_marker("soak") and "soak" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes long: make soak"))
    if TRAVELLING:
        kept, deselected = device_proxy.of_backends(items, TRAVELLING)
        config.hook.pytest_deselected(items=deselected)
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A test in float64 is skipped on backends without float64."""
    try:
        return (yield)
    except DtypeUnsupported as error:
        pytest.skip(str(error))


@pytest.fixture(params=cpu.supported_instruction_sets() if cpu else [])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set of this CPU."""
    with cpu.forced_instruction_set(request.param):
        yield request.param


@pytest.fixture(params=KERNELS_HERE)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def acc_dtype_of(backend: str) -> torch.dtype:
    """The widest dtype that the backend computes in."""
    return torch.float32 if backend in NO_FLOAT64 else torch.float64


@pytest.fixture
def acc_dtype(backend: str) -> torch.dtype:
    return acc_dtype_of(backend)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
