"""Our losses under verl's registry against verl's own: value, gradient and metrics."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl.trainer.ppo.core_algos", reason="the oracle is verl itself: pip install verl==0.9.1")
from test_oracle_verl import GLOBAL, LOSSES, actor, make_batch, theirs
from verl.utils import torch_functional
from verl.utils.experimental import torch_functional as experimental
from verl.utils.kernel import linear_cross_entropy as kernel

from grpo_kernels.integrations import verl

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("info", [None, GLOBAL], ids=["own_batch", "global_batch"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("loss", LOSSES)
def test_registered_loss(loss: str, mode: str, info: dict | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl.core_algos, "POLICY_LOSS_REGISTRY", dict(verl.core_algos.POLICY_LOSS_REGISTRY))
    assert f"gk_{loss}" in verl.register()
    batch, config = make_batch(), actor(info, **LOSSES[loss][0])
    mode = LOSSES[loss][2] or mode
    exact, got = (theirs(name, mode, batch, config) for name in (loss, f"gk_{loss}"))
    assert torch.allclose(got.loss, exact.loss, rtol=1e-6, atol=1e-7)
    assert torch.allclose(got.gradient, exact.gradient, rtol=1e-5, atol=1e-7)
    assert got.metrics == pytest.approx(exact.metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("modules", ["", "grpo_kernels.integrations.verl"])
def test_a_worker_registers_by_itself(modules: str) -> None:
    """verl imports the modules of this variable when it is imported itself."""
    code = (
        "import verl; from verl.trainer.ppo import core_algos; print('gk_vanilla' in core_algos.POLICY_LOSS_REGISTRY)"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": modules}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == [str(bool(modules))], done.stderr


def test_other_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {**verl.core_algos.POLICY_LOSS_REGISTRY, "vanilla": lambda old_log_prob, log_prob: None}
    monkeypatch.setattr(verl.core_algos, "POLICY_LOSS_REGISTRY", changed)
    with pytest.raises(
        RuntimeError, match=r"takes \(old_log_prob, log_prob\); this integration was written for verl 0.9.1"
    ):
        verl.register()


def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, generator=g), torch.randn(11, 8, generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(11, (2, 5), generator=g)


def fused(*arguments: torch.Tensor, temperature: float = 0.7) -> tuple[torch.Tensor, ...]:
    return experimental.FusedLinearForPPO()(*arguments, temperature=temperature)


def with_gradients(score: Callable, *leaves: torch.Tensor) -> list[torch.Tensor]:
    outputs = score()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((x * torch.linspace(0.5, 1.5, x.numel()).view_as(x)).sum() for x in outputs)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(total, leaves)]


def test_patched_log_probs_are_verls() -> None:
    hidden, weight, labels = head()

    def calls() -> list[list[torch.Tensor]]:
        def from_logits() -> torch.Tensor:
            return torch_functional.logprobs_from_logits(hidden @ weight.t(), labels)

        return [with_gradients(score, hidden, weight) for score in (from_logits, lambda: fused(hidden, weight, labels))]

    native = calls()
    with verl.patch() as patch:
        ours = calls()
        assert patch.step_counts.two_sweeps == 2
        flat = kernel.linear_cross_entropy(hidden, weight, labels, 0.7)
        assert patch.step_counts.two_sweeps == 3
    for a, b in zip(ours, native, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)
    for x, y in zip(flat, native[1], strict=False):  # verl's own runs on a GPU only
        torch.testing.assert_close(x, y.flatten(), rtol=1e-5, atol=5e-6)


def test_a_temperature_per_sequence() -> None:
    """verl's fused heads take one number."""
    hidden, weight, labels = head()
    temperature = torch.tensor([0.5, 2.0])
    with verl.patch():
        logps, entropy = fused(hidden, weight, labels, temperature=temperature)
    wanted = ((hidden @ weight.t()) / temperature[:, None, None]).log_softmax(-1)
    torch.testing.assert_close(logps, wanted.gather(-1, labels[..., None])[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1), rtol=1e-5, atol=1e-6)


def test_a_reduction_is_refused() -> None:
    hidden, weight, labels = head()
    with verl.patch(), pytest.raises(ValueError, match="reduction must be 'none'; got 'mean'"):
        kernel.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")


def test_undo_reaches_modules_that_were_imported_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    native = (torch_functional.logprobs_from_logits, experimental.FusedLinearForPPO, kernel.linear_cross_entropy)
    patch = verl.patch()
    late = types.ModuleType("verl.late")
    late.logprobs_from_logits = torch_functional.logprobs_from_logits
    monkeypatch.setitem(sys.modules, "verl.late", late)
    assert late.logprobs_from_logits != native[0]
    patch()
    patch()  # once more changes nothing
    assert late.logprobs_from_logits is native[0]
    assert native == (
        torch_functional.logprobs_from_logits, experimental.FusedLinearForPPO, kernel.linear_cross_entropy
    )  # fmt: skip


def test_not_installed() -> None:
    code = (
        "import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'verl' else f(name, *a)\n"
        "import grpo_kernels.integrations.verl"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: this needs verl, which is not installed: pip install verl==0.9.1"
    )
