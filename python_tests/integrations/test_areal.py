"""AReaL's functions: against its formulas, written out in float64, and against its own where it is installed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peers import extracted

from grpo_kernels.integrations.areal import RELEASE, gather_logprobs, gather_logprobs_entropy, ppo_actor_loss_fn

LENGTHS = [6, 4, 1, 5]


def batch(packed: bool) -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = False  # a tool's token

    def normal() -> torch.Tensor:
        return torch.randn(4, 6, generator=g, dtype=torch.float64)

    proximal, drift = -normal().abs(), torch.tensor([[0.5], [-0.5], [0.6], [0.4]], dtype=torch.float64)
    b = {
        "logprobs": proximal + drift + 0.4 * normal(), "proximal_logprobs": proximal, "old_logprobs": proximal + 0.1 * normal(),
        "advantages": normal() + torch.tensor([[1.0], [-1.0], [-1.0], [1.0]]), "loss_mask": mask,
    }  # fmt: skip
    if packed:
        kept = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
        b = {name: x[kept] for name, x in b.items()}
        b["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    b["logprobs"].requires_grad_()
    return b


def written_out(b: dict[str, Any], eps_low: float, eps_high: float, c_clip: float | None, level: str) -> torch.Tensor:
    x, adv, mask = b["logprobs"] - b["proximal_logprobs"], b["advantages"], b["loss_mask"]
    rows = [x[i] for i in range(4)] if x.dim() == 2 else list(x.split(LENGTHS))
    advs = [adv[i] for i in range(4)] if x.dim() == 2 else list(adv.split(LENGTHS))
    masks = [mask[i] for i in range(4)] if x.dim() == 2 else list(mask.split(LENGTHS))
    terms = []
    for row, a, on in zip(rows, advs, masks, strict=True):
        for t in on.nonzero()[:, 0].tolist():
            r = (row[on].mean() if level == "sequence" else row[t]).exp()
            av = a[on].mean() if level == "sequence" else a[t]
            term = torch.maximum(-av * r, -av * r.clamp(1 - eps_low, 1 + eps_high))
            terms.append(torch.minimum(term, c_clip * av.abs()) if c_clip else term)
    return torch.stack(terms).sum() / len(terms)


CASES = list(itertools.product(("token", "sequence"), (None, 1.2), (None, 0.28), (False, True)))


@pytest.mark.parametrize("level, c_clip, eps_higher, packed", CASES)
def test_formulas(level: str, c_clip: float | None, eps_higher: float | None, packed: bool) -> None:
    b = batch(packed)
    mine, stats = ppo_actor_loss_fn(
        **b, eps_clip=0.2, eps_clip_higher=eps_higher, c_clip=c_clip, importance_sampling_level=level
    )
    exact = written_out(b, 0.2, eps_higher or 0.2, c_clip, level)
    torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-14)
    a, c = (torch.autograd.grad(y, b["logprobs"])[0] for y in (mine, exact))
    torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)
    assert all(x.shape == b["loss_mask"].shape and not x.requires_grad for x in stats.values())
    on = b["loss_mask"]
    torch.testing.assert_close(stats["loss"][on].mean(), mine.detach())
    assert stats["clip_mask"].any() and not stats["clip_mask"][~on].any()
    assert bool(stats["dual_clip_mask"].any()) == (c_clip is not None)


@pytest.mark.parametrize("level, c_clip, eps_higher, packed", CASES)
def test_areals_own(level: str, c_clip: float | None, eps_higher: float | None, packed: bool) -> None:
    scope = extracted(
        "areal", RELEASE, "areal/utils/functional/functional.py",
        ("ppo_actor_loss_fn", "_compute_sequence_level_ratio_and_advantages"), torch=torch, RejectionSamplingConfig=None,
    )  # fmt: skip
    options = dict(eps_clip=0.2, eps_clip_higher=eps_higher, c_clip=c_clip, importance_sampling_level=level)
    b = batch(packed)
    mine, stats = ppo_actor_loss_fn(**b, **options)
    theirs, wanted = scope["ppo_actor_loss_fn"](**b, **options)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert set(stats) == set(wanted)
    for name, x in wanted.items():
        torch.testing.assert_close(stats[name][b["loss_mask"]], x[b["loss_mask"]], rtol=1e-9, atol=1e-12)


def test_options_that_cannot_be_honoured() -> None:
    with pytest.raises(ValueError, match="rejection_sampling is not supported here; correct with"):
        ppo_actor_loss_fn(**batch(False), eps_clip=0.2, rejection_sampling=object())
    with pytest.raises(ValueError, match="must be 'token' or 'sequence'; got 'batch'"):
        ppo_actor_loss_fn(**batch(False), eps_clip=0.2, importance_sampling_level="batch")
    b = batch(True)
    del b["cu_seqlens"]
    with pytest.raises(ValueError, match="over packed tokens needs cu_seqlens"):
        ppo_actor_loss_fn(**b, eps_clip=0.2, importance_sampling_level="sequence")


def test_log_probs() -> None:
    g = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(2, 5, 13, generator=g, requires_grad=True), torch.randint(13, (2, 5), generator=g)
    wanted = (logits / 0.7).log_softmax(-1)
    chosen, entropy = wanted.gather(-1, labels[..., None])[..., 0], -(wanted.exp() * wanted).sum(-1)
    torch.testing.assert_close(gather_logprobs(logits, labels, 0.7), chosen)
    mine = gather_logprobs_entropy(logits, labels, 0.7, None, 3)
    torch.testing.assert_close(mine, (chosen, entropy))
    a, b = (torch.autograd.grad(sum(x.sum() for x in y), logits)[0] for y in (mine, (chosen, entropy)))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
