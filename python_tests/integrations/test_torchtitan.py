"""torchtitan 0.3.0's DAPO loss, written out, decides what KernelsLoss computes. torchtitan itself needs a GPU's
packages to be imported, so a stand-in has the interface of its ChunkedLossWrapper."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

B, L, H, V = 3, 7, 8, 31


class Wrapper:
    @dataclass(kw_only=True)
    class Config:
        num_chunks: int = 8

    def set_lm_head(self, lm_head: torch.nn.Module) -> None:
        self.lm_head = lm_head

    def __call__(self, pred: Any, labels: Any, global_valid_tokens: Any = None, **loss_inputs: Any) -> Any: ...


@pytest.fixture
def integration(monkeypatch: pytest.MonkeyPatch) -> Any:
    import importlib
    from importlib.machinery import ModuleSpec

    for name in ("torchtitan", "torchtitan.components", "torchtitan.components.loss"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["torchtitan.components.loss"].ChunkedLossWrapper = Wrapper
    monkeypatch.delitem(sys.modules, "grpo_kernels.integrations.torchtitan", raising=False)
    yield importlib.import_module("grpo_kernels.integrations.torchtitan")
    sys.modules.pop("grpo_kernels.integrations.torchtitan", None)


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    generator = -3.4 + 0.6 * torch.randn(B, L, generator=g)
    generator[0, 2], generator[1, 1] = float("nan"), -40.0  # dropped; beyond the clamp
    return {
        "labels": torch.randint(V, (B, L), generator=g), "generator_logprobs": generator,
        "advantages": torch.randn(B, L, generator=g), "loss_mask": torch.rand(B, L, generator=g) < 0.8,
    }  # fmt: skip


def written_out(logits: torch.Tensor, b: dict[str, torch.Tensor], low: float, high: float, count: float) -> Any:
    mask = b["loss_mask"] & b["generator_logprobs"].isfinite()
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    x = logps.gather(-1, b["labels"][..., None])[..., 0] - b["generator_logprobs"]
    ratio = torch.where(mask, x, 0.0).clamp(-10, 10).exp()
    terms = -torch.minimum(ratio * b["advantages"], ratio.clamp(1 - low, 1 + high) * b["advantages"])
    return (terms * mask).sum() / count, (ratio * mask).sum() / count, (entropy * mask).sum() / count


@pytest.mark.parametrize("count", [None, 40, torch.tensor(40.0)])
def test_loss_gradients_and_metrics(integration: Any, count: Any) -> None:
    torch.manual_seed(0)
    loss = integration.KernelsLoss(integration.KernelsLoss.Config(ratio_clip_low=0.2, ratio_clip_high=0.28))
    b, head, hidden = batch(), torch.nn.Linear(H, V, bias=False), torch.randn(B, L, H)
    with pytest.raises(ValueError, match="set_lm_head first"):
        loss(hidden, **b)
    loss.set_lm_head(head)
    mine, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    value, metrics = loss(mine, b.pop("labels"), count, **b)
    value.backward()
    gradient, head.weight.grad = head.weight.grad, None
    exact, ratio, entropy = written_out(head(theirs), batch(), 0.2, 0.28, 1.0 if count is None else 40.0)
    exact.backward()
    torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, head.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["loss/ratio_mean"], ratio, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["trainer/entropy/mean"], entropy, rtol=1e-5, atol=1e-6)
