"""OpenRLHF's PolicyLoss: against its formulas, written out in float64, and against its own class where it is installed."""

from __future__ import annotations

import itertools
from typing import Any, Optional

import pytest
import torch
from peers import extracted

from grpo_kernels.integrations.openrlhf import RELEASE, PolicyLoss

CORRECTIONS = {
    "off": {},
    "clip": dict(is_correction_level="token", is_correction_mode="clip", is_correction_threshold=(0.8, 1.2)),
    "mask": dict(is_correction_level="token", is_correction_threshold=(0.8, 1.2)),
    "mask of sequences": dict(is_correction_level="seq", is_correction_threshold=(0.97, 1.03)),
    "tv": dict(is_correction_level="token", is_correction_gating="tv", is_correction_threshold=(0, 0.05)),
    "binary_kl": dict(is_correction_level="token", is_correction_gating="binary_kl", is_correction_threshold=(0, 0.01)),
    "binary_kl of sequences": dict(
        is_correction_level="seq", is_correction_gating="binary_kl", is_correction_threshold=(0, 0.03)
    ),
}


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    old = -2 * torch.rand(5, 9, generator=g, dtype=torch.float64) - 0.02
    near = [old + s * torch.randn(5, 9, generator=g, dtype=torch.float64) for s in (0.4, 0.25)]
    lengths = torch.tensor([9, 7, 4, 1, 8])
    return {
        "log_probs": near[0].clamp(max=-1e-3).requires_grad_(), "old_log_probs": old,
        "advantages": torch.randn(5, 1, generator=g, dtype=torch.float64).expand(5, 9).contiguous(),
        "action_mask": (torch.arange(9) < lengths[:, None]).double(), "rollout_log_probs": near[1].clamp(max=-1e-3),
    }  # fmt: skip


def written_out(b: dict[str, torch.Tensor], o: dict[str, Any], totals: dict[str, Any]) -> list[torch.Tensor | None]:
    """In plain sums over single tokens."""
    lp, old, roll, adv, mask = (
        b[k] for k in ("log_probs", "old_log_probs", "rollout_log_probs", "advantages", "action_mask")
    )
    gspo, level = o.get("policy_loss_type") == "gspo", o.get("is_correction_level", "off")
    rows = [[t for t in range(9) if mask[i, t]] for i in range(5)]
    terms: dict[tuple[int, int], torch.Tensor] = {}
    clipped, dropped, low_high = [], {}, o.get("is_correction_threshold", (0.5, 5.0))

    def statistic(i: int, t: int) -> float:
        p, q = (min(max(float(x[i, t].exp()), 1e-6), 1 - 1e-6) for x in (roll, old))
        if o.get("is_correction_gating", "ratio") == "tv":
            return abs(p - q)
        import math

        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    for i, tokens in enumerate(rows):
        behaviour = roll if gspo and level != "off" else old
        mean = sum(lp[i, t] - behaviour[i, t] for t in tokens) / len(tokens)
        d = {t: old[i, t] - roll[i, t] for t in tokens}
        if o.get("is_correction_gating", "ratio") == "ratio":
            unit = {t: d[t].exp() for t in tokens}
            if level == "seq":
                unit = dict.fromkeys(tokens, (sum(d.values()) / len(tokens)).exp())
        else:
            unit = {t: statistic(i, t) for t in tokens}
            if level == "seq":
                unit = dict.fromkeys(tokens, sum(unit.values()) / len(tokens))
        for t in tokens:
            r, a = (mean if gspo else lp[i, t] - old[i, t]).exp(), adv[i, t]
            eps_low, eps_high = o.get("clip_eps_low", 0.2), o.get("clip_eps_high", 0.2)
            bounded = r.clamp(1 - eps_low, 1 + eps_high)
            term = -torch.minimum(r * a, bounded * a)
            if o.get("dual_clip") and a < 0:
                term = torch.minimum(term, -o["dual_clip"] * a)
            clipped.append(float(bounded * a < r * a))
            if level != "off" and not gspo:
                inside = low_high[0] <= unit[t] <= low_high[1]
                dropped[i, t] = float(not inside)
                if o.get("is_correction_mode") == "clip":
                    term = term * unit[t].clamp(*low_high)
                else:
                    term = term * d[t].exp() * inside
            terms[i, t] = term
    if o.get("token_level_loss", True) and not gspo:
        loss = sum(terms.values()) / (totals.get("batch_num_tokens") or len(terms))
        scaled = totals.get("batch_num_tokens")
    else:
        means = [sum(terms[i, t] for t in tokens) / len(tokens) for i, tokens in enumerate(rows)]
        loss = sum(means) / (totals.get("global_batch_size") or len(rows))
        scaled = totals.get("global_batch_size")
    loss = loss * (totals.get("dp_size", 1) if scaled else 1)
    n = len(terms)
    kl = sum(old[i, t] - lp[i, t].detach() for i, t in terms) / n
    if level == "off" or gspo:
        return [loss, torch.tensor(clipped).mean(), kl, None, None]
    vllm = sum(roll[i, t] - old[i, t] for i, t in terms) / n
    share = [dropped[i, rows[i][0]] for i in range(5)] if level == "seq" else list(dropped.values())
    return [loss, torch.tensor(clipped).mean(), kl, vllm, torch.tensor(share).mean()]


def assert_same(mine: Any, theirs: Any, leaf: torch.Tensor) -> None:
    for x, y in zip(mine, theirs, strict=True):
        if y is None:
            assert x is None
        else:
            torch.testing.assert_close(x.detach().double(), y.detach().double(), rtol=1e-6, atol=1e-9)
    a, b = (torch.autograd.grad(out[0], leaf)[0] for out in (mine, theirs))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)  # OpenRLHF adds 1e-8 to a number of tokens


TOTALS = [{}, {"batch_num_tokens": 40.0, "global_batch_size": 8.0, "dp_size": 2}]
LOSSES = [
    *({"policy_loss_type": kind, "dual_clip": dual, "token_level_loss": level}
      for kind, dual, level in itertools.product(("ppo", "gspo"), (None, 1.5), (True, False))),
]  # fmt: skip


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("options", LOSSES, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_formulas(options: dict[str, Any], correction: str) -> None:
    for totals in TOTALS:
        b, o = batch(), {**options, **CORRECTIONS[correction], "clip_eps_high": 0.28}
        assert_same(PolicyLoss(**o)(**b, **totals), written_out(b, o, totals), b["log_probs"])


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("options", LOSSES, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_openrlhfs_own(options: dict[str, Any], correction: str) -> None:
    scope = extracted(
        "openrlhf", RELEASE, "openrlhf/models/loss.py", ("PolicyLoss", "aggregate_loss"), torch=torch,
        nn=torch.nn, Optional=Optional,
        masked_mean=lambda x, mask, dim=None: (x * mask).sum(dim=dim) / mask.sum(dim=dim),
    )  # fmt: skip
    for totals in TOTALS:
        b, o = batch(), {**options, **CORRECTIONS[correction], "clip_eps_high": 0.28}
        assert_same(PolicyLoss(**o)(**b, **totals), scope["PolicyLoss"](**o)(**b, **totals), b["log_probs"])


def test_masked_tokens_are_not_read() -> None:
    b = batch()
    clean = PolicyLoss(**CORRECTIONS["mask"])(**b)
    holed = {
        k: v.detach().masked_fill(b["action_mask"] == 0, float("nan")) if k != "action_mask" else v
        for k, v in b.items()
    }
    for x, y in zip(PolicyLoss(**CORRECTIONS["mask"])(**holed), clean, strict=True):
        torch.testing.assert_close(x, y.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"policy_loss_type": "sapo"}, "policy_loss_type must be 'ppo' or 'gspo'; got 'sapo'"),
        ({"dual_clip": 0.9}, "dual_clip must be above 1"),
        ({"is_correction_level": "batch"}, "is_correction_level must be one of 'off', 'token', 'seq'; got 'batch'"),
        ({"is_correction_mode": "drop"}, "is_correction_mode must be one of"),
        ({"is_correction_gating": "kl"}, "is_correction_gating must be one of"),
        ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "is_correction_mode='clip' needs"),
        ({"is_correction_level": "token", "is_correction_gating": "tv"}, "has an upper threshold only"),
    ],
)
def test_options_that_cannot_be_honoured(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**wrong)


def test_a_correction_needs_the_sampler() -> None:
    b = batch()
    del b["rollout_log_probs"]
    with pytest.raises(ValueError, match="a correction needs rollout_log_probs; got None"):
        PolicyLoss(**CORRECTIONS["mask"])(**b)
