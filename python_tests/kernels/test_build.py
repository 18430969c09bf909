"""The build: the error for a missing compiler; CUDA is built where possible and never breaks the CPU module."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUDA_MODULES = sorted((ROOT / "grpo_kernels/backends").glob("_cuda.*"))
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build reads."""
    for name in ("csrc", "setup.py", "pyproject.toml", "README.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / "grpo_kernels/backends").mkdir(parents=True)
    shutil.copy(ROOT / "grpo_kernels/__init__.py", tmp_path / "grpo_kernels")  # for the version
    return tmp_path


@pytest.fixture
def empty_tree(tree):
    """The same with empty sources, which compile quickly."""
    for file in (tree / "csrc").rglob("*"):
        if file.suffix in (".cpp", ".cu"):
            file.write_text("")
    return tree


def build(tree, path=None, **environment):
    env = {**os.environ, "GRPO_KERNELS_CUDA_ARCHS": "80", **environment}
    if path is not None:
        env["PATH"] = str(path)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


def modules(tree):
    return {p.name.split(".")[0] for p in (tree / "grpo_kernels/backends").glob("*.so")}


def test_a_missing_compiler_is_one_clear_sentence(tree):
    done = build(tree, CXX="no-such-compiler")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert (
        "needs a C++17 compiler and found none (tried no-such-compiler): install g++ or clang, or set CXX."
        in done.stderr
    )


def fake_nvcc(tree, script):
    folder = tree / "bin"
    folder.mkdir()
    (folder / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvcc").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_failing_cuda_build_leaves_the_cpu_module(empty_tree):
    path = fake_nvcc(empty_tree, '[ "$1" = --list-gpu-arch ] && echo compute_80 && exit 0\nexit 1')
    done = build(empty_tree, path=path)
    assert done.returncode == 0 and modules(empty_tree) == {"_cpu"}, done.stderr
    assert "grpo_kernels.backends._cuda was not built and the CUDA backend will be missing" in done.stderr
    assert build(empty_tree, path=path, GRPO_KERNELS_CUDA="1").returncode != 0  # asked for: an error
    quiet = build(empty_tree, path=path, GRPO_KERNELS_CUDA="0")
    assert quiet.returncode == 0 and "was not built" not in quiet.stderr


def test_either_module_may_be_left_out(tree):
    list_them = "import setuptools\nsetuptools.setup = lambda ext_modules, **_: print([e.name for e in ext_modules])\n"
    script = list_them + (tree / "setup.py").read_text()
    for switches, expected in (({"GRPO_KERNELS_CPU": "0"}, "_cuda"), ({"GRPO_KERNELS_CUDA": "0"}, "_cpu")):
        env = {**os.environ, "GRPO_KERNELS_CUDA": "1", **switches}
        (tree / "listed.py").write_text(script)
        done = subprocess.run([sys.executable, "listed.py"], cwd=tree, env=env, capture_output=True, text=True)
        assert done.stdout.strip() == f"['grpo_kernels.backends.{expected}']", done.stderr


WITHOUT_CPU = """
import sys
sys.modules["grpo_kernels.backends._cpu"] = None
import torch
import grpo_kernels as gk
from grpo_kernels.tools.environment import machine_info
assert "does not load" in gk.available_backends()["cpu"]
assert machine_info()["instruction_set"]
assert gk.whiten(torch.randn(3, 4), backend="reference").isfinite().all()
print("well")
"""


def test_the_package_imports_without_the_cpu_module():
    done = subprocess.run([sys.executable, "-c", WITHOUT_CPU], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "well", done.stderr


LAUNCH = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)  # needs no driver and no GPU
try:
    cuda.row_forward(cuda.Rows((8, 9, 9), (8, 1, 1), None, None, 0, (1, 1, 9), 1.0, 1.0, 0.0, 1), [8] * 5, 0)
except RuntimeError as error:
    print(error)
print(cuda.unusable())
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_is_built_where_nvcc_is_installed(empty_tree):
    done = build(empty_tree)
    assert done.returncode == 0 and modules(empty_tree) == {"_cpu", "_cuda"}, done.stderr


@pytest.mark.skipif(not CUDA_MODULES, reason="built without CUDA")
def test_errors_of_the_cuda_module_name_the_kernel():
    command = [sys.executable, "-c", LAUNCH, CUDA_MODULES[0]]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    failure, unusable = done.stdout.splitlines()
    assert failure.startswith("kernel row_forward: "), done.stdout + done.stderr
    assert "; built with CUDA " in unusable and "the driver is for" in unusable  # there is none


@pytest.mark.parametrize("compiler", ["c++", "clang++", "aarch64-linux-gnu-g++"])
def test_compiles_without_x86(compiler, tree):
    """The portable path uses no intrinsics. An arm64 compiler checks it too, where one is installed."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    sources = sorted((tree / "csrc/cpu").glob("*.cpp"))
    flags = "-std=c++17 -O1 -Wall -Wextra -Werror -DGK_ISA=generic -fsyntax-only".split()
    done = subprocess.run([compiler, *flags, *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
