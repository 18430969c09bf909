"""The Triton kernels per token and per sample, where the tests of all backends do not reach: long and many sequences,
compilation."""

from pathlib import Path

import pytest
import torch
from dry_compile import check_compiled
from forms import FORMS, with_everything
from oracle_cases import one_thread as one_thread  # torch's float64 exp on two threads is sometimes off by 3e-9

import grpo_kernels as gk

TARGETS = [("cuda", "80"), ("cuda", "89"), ("cuda", "90"), ("cuda", "100"), ("cuda", "120"), ("hip", "gfx942")]
pytestmark = pytest.mark.skipif(gk.available_backends()["triton"] != "ok", reason="no Triton")


def tokens(batch, length, seed=0):
    g = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(batch, length, generator=g, dtype=torch.float64)
    old, ref, rollout = (logps + 0.3 * torch.randn(logps.shape, generator=g).double() for _ in range(3))
    mask = torch.rand(batch, length, generator=g) < 0.8
    return logps, mask, {"old_logps": old, "ref_logps": ref, "rollout_logps": rollout}


def run(backend, form, logps, advantages, mask, others):
    leaf, entropy = logps.clone().requires_grad_(), (logps * -1).clone().requires_grad_()
    config = gk.LossConfig(**with_everything(form), aggregation="sequence_mean")
    out = gk.policy_loss(leaf, advantages, mask, entropy=entropy, config=config, backend=backend, **others)
    return out.loss.detach(), out.per_token_loss, *out.metrics.values(), *torch.autograd.grad(out.loss, (leaf, entropy))


@pytest.mark.parametrize("shape", [(1, 2600), (300, 3)], ids=str)
@pytest.mark.parametrize("name", ["token", "sequence", "sequence_product", "gmpo", "vespo", "kl_cov"])
def test_one_long_and_many_short_sequences(name, shape):
    logps, mask, others = tokens(*shape)
    if name == "sequence_product":
        others["old_logps"] = logps + 0.001 * (others["old_logps"] - logps)
    advantages = torch.linspace(-1, 1, shape[0], dtype=torch.float64) + 0.01
    for mine, exact in zip(
        *(run(b, FORMS[name], logps, advantages, mask, others) for b in ("triton", "reference")), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("packed", [False, True])
def test_gae_over_several_blocks(packed):
    _, mask, others = tokens(3, 2600)
    mask[0, 900:2300] = False  # a value and a running sum are carried over a block without tokens
    cu = None
    args = (others["ref_logps"], others["old_logps"], mask)
    if packed:
        args, cu = tuple(x.reshape(-1) for x in args), torch.tensor([0, 5, 5, 1900, 7000])
    for mine, exact in zip(
        *(gk.gae(*args, gamma=0.99, lam=0.97, cu_seqlens=cu, backend=b) for b in ("triton", "cpu")), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "length_weighted", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "leave_one_out", "mean", "none"])
def test_ragged_groups_with_everything(baseline, scale):
    g = torch.Generator().manual_seed(1)
    rewards, ids = torch.randn(60, 2, generator=g).double(), torch.randint(0, 9, (60,), generator=g)
    rewards[::7, 0], rewards[3] = float("nan"), float("nan")
    critic = torch.randn(60, generator=g).double()
    critic[::5] = float("nan")
    options = {"lengths": torch.randint(1, 9, (60,), generator=g)} if baseline == "length_weighted" else {}
    out = [
        gk.group_advantages(
            rewards, group_ids=ids, baseline=baseline, scale=scale, reward_weights=[1.0, 0.5], critic_values=critic,
            critic_weight=0.3, clip=(-1.5, 2.0), valid=torch.arange(60) % 11 != 0, backend=backend, **options,
        )
        for backend in ("triton", "cpu")
    ]  # fmt: skip
    for mine, exact in zip(*out, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ids", [None, torch.arange(60) % 7 * -3], ids=["size", "ids"])
def test_diversity_in_many_products_and_blocks(monkeypatch, ids):
    """Groups in several parts, columns in several products, a group over several blocks of the kernel."""
    from grpo_kernels.backends.triton import diversity

    monkeypatch.setattr(diversity, "COLUMNS", 8)
    monkeypatch.setattr(diversity, "BLOCK", 4)
    monkeypatch.setattr(diversity, "ELEMENTS", 300)
    tokens = torch.randint(0, 4, (60, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16) < torch.arange(60)[:, None] % 17
    options = {"threshold": 0.5, "ngram": 2, **({"group_size": 12} if ids is None else {"group_ids": ids})}
    mine, theirs = (gk.group_diversity(tokens, mask, backend=b, **options) for b in ("triton", "cpu"))
    assert all(map(torch.equal, mine, theirs)) and 0 < mine.keep.sum() < 60


@pytest.mark.parametrize("target", TARGETS, ids="-".join)
def test_compiled(target):
    """dry_tokens.py: one variant for all shapes and numbers, every form, no spills, no doubles."""
    check_compiled(Path(__file__).with_name("dry_tokens.py"), target)
