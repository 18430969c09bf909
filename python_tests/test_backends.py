"""Which backend runs, and what is said of one that cannot."""

import importlib

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
    with pytest.raises(backends.BackendUnavailable, match="'triton' is not here"):  # no silent fall back to slow code
        backends.resolve("auto", torch.device("cuda"))
    with pytest.raises(ValueError, match="needs CPU tensors; got meta"):
        backends.resolve("cpu", torch.device("meta"))


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
