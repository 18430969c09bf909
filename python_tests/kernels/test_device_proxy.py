"""The proxy that moves CPU tensors to a GPU's kernels and back, tested without a GPU: clones stand for the copies."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment
from device_proxy import FUNCTIONS, OnDevice

import grpo_kernels as gk
from grpo_kernels import backends
from grpo_kernels.testing.inputs import make_batch
from grpo_kernels.tools.providers.batch import produced

NAMES = ["cpu", "emulated"]


@pytest.fixture(params=NAMES)
def both(request, monkeypatch):
    """Runs a call on the backend directly and through the proxy, which counts the calls that reach it."""
    try:
        module = backends.implementation(request.param)
    except backends.BackendUnavailable as missing:
        pytest.skip(str(missing))
    proxy = OnDevice(module, "cpu")

    def run(call):
        plain = call(request.param)
        with monkeypatch.context() as m:
            m.setitem(backends._LOADERS, request.param, lambda: proxy)
            backends.implementation.cache_clear()
            travelled = call(request.param)
        backends.implementation.cache_clear()
        return plain, travelled

    return run, proxy


def batch():
    return make_batch(sequences=3, tokens=5, vocab=67).to(torch.float32)


def loss(backend, inplace=False, upstream=1.0, **options):
    b = batch()
    x = torch.empty(3, 6, 67)[:, 1:]  # a view into a larger storage, at an offset
    x.copy_(b.logits)
    leaf = produced(x) if inplace else x.requires_grad_()
    config = gk.LossConfig(kl_coef=0.1, entropy_coef=0.05, **options)
    out = gk.grpo_loss(
        leaf, b.targets, b.advantages, b.mask, config=config, inplace=inplace, backend=backend, **b.keywords()
    )
    (gradient,) = torch.autograd.grad(out.loss, leaf, torch.tensor(upstream))
    assert not inplace or gradient.data_ptr() == x.data_ptr()
    return out.loss.detach(), out.per_token_loss, gradient.clone()


def packed(backend):
    b = batch()
    x = b.old_logps.reshape(-1).clone().requires_grad_()
    out = gk.policy_loss(
        x, b.advantages, cu_seqlens=torch.tensor([0, 4, 4, 13]), config=gk.LossConfig(ratio_level="sequence"),
        old_logps=b.ref_logps.reshape(-1), backend=backend,
    )  # fmt: skip
    return out.loss.detach(), *torch.autograd.grad(out.loss, x)


def others(backend):
    b = batch()
    yield from gk.group_advantages(torch.arange(6.0) ** 2, group_ids=torch.tensor([4, 0, 4, 0, 4, 4]), backend=backend)
    yield from gk.gae(b.old_logps, b.ref_logps, b.mask, gamma=0.9, lam=0.9, backend=backend)
    x = b.old_logps.clone().requires_grad_()
    out = gk.value_loss(x, b.ref_logps, b.rollout_logps, b.mask, backend=backend)
    yield from (out.loss.detach(), out.per_token_loss, *torch.autograd.grad(out.loss, x))
    yield gk.whiten(b.old_logps, b.mask, backend=backend)
    yield from gk.group_diversity(torch.tensor([[1, 2, 3], [3, 2, 1], [4, 4, 5]]), group_size=3, backend=backend)


def separate(backend):
    """The backward in a separate launch, in place."""
    x = batch().logits.clone()
    leaf = produced(x)
    out = gk.token_logps(leaf, batch().targets, return_entropy=True, inplace_backward=True, backend=backend)
    (gradient,) = torch.autograd.grad((out.logps * 2 + out.entropy).sum(), leaf)
    assert gradient.data_ptr() == x.data_ptr()
    return out.logps.detach(), gradient


CALLS = {
    "loss": loss,
    "in place": lambda backend: loss(backend, inplace=True, upstream=0.5),
    "sequence": lambda backend: loss(backend, ratio_level="sequence"),
    "packed": packed,
    "others": lambda backend: tuple(others(backend)),
    "separate": separate,
}


def test_every_function_gives_the_same_bits_through_the_proxy(both):
    run, proxy = both
    for name, call in CALLS.items():
        for a, b in zip(*run(call), strict=True):
            assert torch.equal(a, b), name
    assert {*FUNCTIONS} == {name for name, n in proxy.calls.items() if n}, proxy.calls


def test_shared_memory_stays_shared_and_writes_are_copied_back():
    class Module:
        def row_policy(self, rows, inputs, gradient):
            assert rows.data_ptr() == gradient.data_ptr() != x.data_ptr()
            assert (gradient.stride(), gradient.storage_offset()) == (x.stride(), x.storage_offset())
            gradient.add_(1)
            return (rows.sum(), None)

    x = torch.zeros(4, 6)[1:, ::2]
    total, nothing = OnDevice(Module(), "cpu").row_policy(x, (), x)
    assert (x == 1).all() and total == 9 and nothing is None


def test_the_suite_through_the_proxy_runs_tests_of_that_backend_alone():
    """As on a machine with a GPU, where conftest.py takes the backends from the environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "python_tests/loss/test_losses.py"]
    env = environment(GRPO_KERNELS_TEST_BACKENDS="cpu")
    done = subprocess.run(
        [*command, "-k", "upstream or several or dtypes", "-vv"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if "::" in line]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]
    assert len(lines) > 5 and all("PASSED" in line and "cpu" in line for line in lines), lines
    assert "test_dtypes_and_instruction_sets" not in done.stdout  # of no backend's fixture
    assert os.environ.get("GRPO_KERNELS_TEST_BACKENDS") is None
