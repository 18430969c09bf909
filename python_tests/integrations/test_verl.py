"""Our losses under verl's registry against verl's own: value, gradient and metrics."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("verl.trainer.ppo.core_algos", reason="the oracle is verl itself: pip install verl==0.9.1")
from test_oracle_verl import GLOBAL, LOSSES, actor, make_batch, theirs
from verl.utils import torch_functional

from grpo_kernels.integrations import verl


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


def test_patch_and_undo() -> None:
    native = torch_functional.logprobs_from_logits
    undo = verl.patch()
    assert torch_functional.logprobs_from_logits is verl.logprobs_from_logits
    undo()
    assert torch_functional.logprobs_from_logits is native
