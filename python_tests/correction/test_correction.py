"""rollout_correction: definitions by hand and edge cases. test_oracle_correction.py compares it with the trainers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from correction_inputs import FILTERS, FULL, METRICS, WEIGHTS, batch_of, packed
from oracle_cases import one_thread as one_thread

import grpo_kernels as gk
from grpo_kernels.correction.config import LEVELS, NANS, REDUCTIONS


def binary_kl(p: float, q: float) -> float:
    p, q = (min(max(x, 1e-6), 1 - 1e-6) for x in (p, q))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("nan", NANS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_weights_by_hand(weight: dict[str, Any], level: str, nan: str) -> None:
    """The definition, token by token."""
    if not weight and level != "token":
        return  # refused, see below
    b = batch_of((5, 8), 1)
    b["rollout_logps"][1, 0] = b["old_logps"][3, 1] = math.nan
    b["mask"][1, 0] = b["mask"][3, 1] = True
    low, high = weight.get("low", -math.inf), weight.get("high", math.inf)
    expected = torch.zeros(5, 8, dtype=torch.float64)
    for i in range(5):
        tokens = b["mask"][i].nonzero()[:, 0].tolist()
        d = {t: float(b["old_logps"][i, t] - b["rollout_logps"][i, t]) for t in tokens}
        d = {t: 0.0 if nan == "ignore" and math.isnan(x) else x for t, x in d.items()}
        for t in tokens:
            x = {"token": d[t], "sequence_sum": sum(d.values()), "sequence_mean": sum(d.values()) / len(d)}[level]
            rho = math.exp(max(-20.0, min(20.0, x))) if not math.isnan(x) else math.nan
            kind = weight.get("weight", "none")
            w = {"none": 1.0, "ratio": rho, "truncate": min(rho, high), "clip": max(low, min(rho, high)),
                 "mask": rho if low <= rho <= high else 0.0}[kind]  # fmt: skip
            expected[i, t] = 0.0 if math.isnan(rho) else w
    got = gk.rollout_correction(b["old_logps"], b["rollout_logps"], b["mask"], level=level, nan=nan, **weight)
    torch.testing.assert_close(got.token_weights, expected, rtol=1e-12, atol=0)
    assert torch.equal(got.mask, b["mask"])
    assert float(got.metrics["missing_tokens"]) == pytest.approx(2 / int(b["mask"].sum()))


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("f", FILTERS, ids=lambda f: f"{f.reduction}_{f.statistic}")
def test_filters_by_hand(f: gk.RejectionFilter, renormalise: bool) -> None:
    b = batch_of((6, 9), 2)
    keep = torch.zeros(6, 9, dtype=torch.bool)
    for i in range(6):
        at = b["mask"][i]
        old, roll = b["old_logps"][i, at].tolist(), b["rollout_logps"][i, at].tolist()
        d = [o - r for o, r in zip(old, roll, strict=True)]
        x = {
            "ratio": d, "k1": [-v for v in d], "k2": [v * v / 2 for v in d], "k3": [math.exp(v) - 1 - v for v in d],
            "mult_prob_error": [math.exp(abs(v)) for v in d],
            "tv": [abs(math.exp(o) - math.exp(r)) for o, r in zip(old, roll, strict=True)],
            "binary_kl": [binary_kl(math.exp(r), math.exp(o)) for o, r in zip(old, roll, strict=True)],
        }[f.statistic]  # fmt: skip
        reduce = {"sum": sum, "mean": lambda v: sum(v) / len(v), "min": min, "max": max}.get(f.reduction)
        x = x if reduce is None or not x else [reduce(x)] * len(x)
        keep[i, at] = torch.tensor(
            [(math.exp(v) if f.statistic == "ratio" else v) <= f.high for v in x], dtype=torch.bool
        )
    for given_ in (b, packed(b, b["mask"])):
        given_ = {k: v for k, v in given_.items() if k not in ("logps", "advantages")}
        got = gk.rollout_correction(**given_, filters=(f,), renormalise=renormalise)
        kept = keep if "cu_seqlens" not in given_ else keep[b["mask"]]
        assert torch.equal(got.token_weights != 0, kept) and got.token_weights.max() <= 1
        assert torch.equal(got.mask, kept if renormalise else given_["mask"])


def test_several_filters_must_all_pass() -> None:
    b = batch_of((20, 30), 3)
    arguments = b["old_logps"], b["rollout_logps"], b["mask"]
    alone = [gk.rollout_correction(*arguments, filters=(f,), renormalise=True).mask for f in FILTERS]
    both = gk.rollout_correction(*arguments, filters=FILTERS[:3], renormalise=True)
    assert torch.equal(both.mask, alone[0] & alone[1] & alone[2])


def test_bounds_are_inclusive() -> None:
    """A value equal to its bound is kept; d = 0 gives exactly 1."""
    zero = torch.zeros(1, 3)
    on = gk.rollout_correction(zero, zero, weight="mask", low=1.0, high=1.0)
    assert (on.token_weights == 1).all()
    for statistic, bound in (("ratio", 1.0), ("k1", 0.0), ("k2", 0.0), ("k3", 0.0), ("mult_prob_error", 1.0)):
        for reduction in REDUCTIONS:
            if (statistic, reduction) == ("mult_prob_error", "sum"):
                continue
            f = gk.RejectionFilter(statistic, reduction, low=bound)
            assert (gk.rollout_correction(zero, zero, filters=(f,)).token_weights == 1).all()


@pytest.mark.parametrize("level", ["token", "sequence_sum"])
def test_batch_normalise(level: str) -> None:
    """The mean is 1 over tokens, or over rows that have tokens; rejection comes afterwards."""
    b = batch_of((30, 12), 4)
    arguments = {k: b[k] for k in ("old_logps", "rollout_logps", "mask")}
    options = {"weight": "truncate", "high": 1.1, "level": level, "batch_normalise": True}
    got = gk.rollout_correction(**arguments, **options)
    rows = b["mask"].any(-1)
    first = b["mask"].to(torch.int8).argmax(-1)
    mean = got.token_weights[b["mask"]].mean() if level == "token" else got.token_weights[rows, first[rows]].mean()
    assert float(mean) == pytest.approx(1, rel=1e-12) and float(got.metrics["weight_mean"]) != pytest.approx(1)
    rejecting = gk.rollout_correction(**arguments, **options, filters=(gk.RejectionFilter("k2", "token", high=0.01),))
    kept = rejecting.token_weights != 0
    assert kept.any() and not kept[b["mask"]].all()
    assert torch.equal(rejecting.token_weights[kept], got.token_weights[kept])


def test_the_loss_takes_weights_and_mask() -> None:
    """renormalise only changes the denominator."""
    b = batch_of((8, 10), 5)
    losses = {}
    for renormalise in (False, True):
        filters = (gk.RejectionFilter("k2", "token", high=0.02),)
        c = gk.rollout_correction(
            b["old_logps"], b["rollout_logps"], b["mask"], filters=filters, renormalise=renormalise
        )
        out = gk.policy_loss(
            b["logps"], b["advantages"], c.mask, old_logps=b["old_logps"], token_weights=c.token_weights
        )
        losses[renormalise] = float(out.loss) * int(c.mask.sum())
        assert int(out.metrics["tokens"]) == int(c.mask.sum()) <= int(b["mask"].sum())
    assert losses[True] == pytest.approx(losses[False], rel=1e-12)


# ---- edges ----


@pytest.mark.parametrize(
    "config", [gk.CorrectionConfig(), FULL, replace(FULL, renormalise=True, nan="reject")], ids=str
)
@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0), (3, 4), (1, 1)])
def test_no_token(config: gk.CorrectionConfig, shape: tuple[int, int]) -> None:
    x = torch.full(shape, math.nan)
    mask = torch.zeros(shape)
    for form in ("padded", "packed"):
        given_: dict[str, Any] = {"old_logps": x, "rollout_logps": x, "mask": mask, "logps": x}
        if form == "packed":
            given_ = {k: v.flatten() for k, v in given_.items()}
            given_["cu_seqlens"] = torch.arange(shape[0] + 1) * shape[1]
        got = gk.rollout_correction(**given_, advantages=torch.full(shape[:1], -1.0), config=config)
        assert got.token_weights.shape == got.mask.shape == given_["mask"].shape
        assert not got.token_weights.any() and not got.mask.any()
        ones = {"weight_mean", "weight_min", "weight_max", "effective_sample_size", "ppl_ratio", "mult_prob_error"}
        assert {k: float(v) for k, v in got.metrics.items()} == {k: float(k in ones) for k in METRICS}


def test_flat_tokens_without_any_sequence() -> None:
    got = gk.rollout_correction(torch.zeros(3), torch.ones(3), cu_seqlens=torch.tensor([0]), weight="ratio")
    assert not got.mask.any() and not got.token_weights.any()


def test_one_token() -> None:
    got = gk.rollout_correction(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), weight="ratio")
    m = {name: float(x) for name, x in got.metrics.items()}
    e = math.e
    assert float(got.token_weights) == pytest.approx(e)
    assert m == pytest.approx({
        "weight_mean": e, "weight_min": e, "weight_max": e, "weight_std": 0, "effective_sample_size": 1, "ratio_low": 0,
        "ratio_high": 0, "rejected_tokens": 0, "rejected_rows": 0, "missing_tokens": 0, "k1": -1, "k3": e - 2,
        "ppl_ratio": 1 / e, "chi2_token": e * e - 1, "chi2_sequence": e * e - 1, "logp_difference_mean": 1,
        "logp_difference_max": 1, "mult_prob_error": e,
    }, rel=1e-6)  # fmt: skip


@pytest.mark.parametrize("nan", NANS)
def test_infinite_log_probs(nan: str) -> None:
    """A token of probability 0 under one policy, or under both; the clamp bounds its weight."""
    inf = math.inf
    old = torch.tensor([[-1.0, -inf], [-1.0, -1.0], [-inf, -1.0], [-1.0, -1.0]])
    roll = torch.tensor([[-1.0, -1.0], [-inf, -1.0], [-inf, -1.0], [-1.0, -1.0]])
    got = gk.rollout_correction(old, roll, weight="truncate", high=2.0, nan=nan)
    neither = 1.0 if nan == "ignore" else 0.0
    expected = torch.tensor([[1, math.exp(-20)], [2, 1], [neither, 1], [1, 1]])
    torch.testing.assert_close(got.token_weights, expected)
    assert all(x.isfinite() for x in got.metrics.values())
    rows = gk.rollout_correction(old, roll, weight="truncate", high=2.0, level="sequence_sum", nan=nan, veto=1e-6)
    torch.testing.assert_close(rows.token_weights, torch.tensor([0.0, 2.0, neither, 1.0])[:, None].expand(4, 2))
    unclamped = gk.rollout_correction(old, roll, weight="truncate", high=2.0, log_clamp=None, nan=nan)
    expected[0, 1], expected[1, 0] = 0, 2.0 if nan == "ignore" else 0.0
    torch.testing.assert_close(unclamped.token_weights, expected)


def test_opposite_infinities_in_a_row() -> None:
    """They cancel, as in TRL, instead of making the row NaN."""
    old, roll = torch.tensor([[-math.inf, -1.0]]), torch.tensor([[-1.0, -math.inf]])
    got = gk.rollout_correction(old, roll, weight="truncate", level="sequence_sum", high=2.0, log_clamp=None)
    assert (got.token_weights == 1).all()


def test_all_rejected() -> None:
    old, roll = torch.zeros(2, 3), torch.full((2, 3), 3.0)
    for renormalise in (False, True):
        got = gk.rollout_correction(
            old, roll, weight="mask", low=0.5, high=2.0, batch_normalise=True, veto=0.1, renormalise=renormalise
        )
        assert not got.token_weights.any() and got.mask.all() != renormalise and got.mask.any() != renormalise
        m = got.metrics
        assert m["rejected_tokens"] == m["rejected_rows"] == m["ratio_low"] == 1 and m["effective_sample_size"] == 0
        assert all(x.isfinite() for x in m.values())
        out = gk.policy_loss(old, torch.ones(2), got.mask, token_weights=got.token_weights)
        assert out.loss == 0


def test_nan_rejects_the_row_where_a_filter_applies() -> None:
    old, roll = torch.zeros(2, 3), torch.zeros(2, 3)
    roll[0, 1] = math.nan
    for reduction in REDUCTIONS[1:]:
        f = (gk.RejectionFilter("k3", reduction, high=1.0),)
        assert gk.rollout_correction(old, roll, filters=f).token_weights.all()
        rejected = gk.rollout_correction(old, roll, filters=f, nan="reject")
        assert not rejected.token_weights[0].any() and rejected.token_weights[1].all()
        flat = gk.rollout_correction(
            old.flatten(), roll.flatten(), cu_seqlens=torch.tensor([0, 3, 6]), filters=f, nan="reject"
        )
        assert torch.equal(flat.token_weights, rejected.token_weights.flatten())


def test_nothing_is_differentiated() -> None:
    b = batch_of((3, 4), 6)
    for name in (k for k, v in b.items() if v.is_floating_point()):
        with pytest.raises(ValueError, match=rf"{name} requires grad.*pass {name}.detach\(\)"):
            gk.rollout_correction(**{**b, name: b[name].clone().requires_grad_()}, config=FULL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Log-probs may have half precision; the results are float32."""
    b = batch_of((4, 6), 7)
    halves = {k: v.to(dtype) if v.is_floating_point() else v for k, v in b.items()}
    got = gk.rollout_correction(**halves, config=FULL)
    wide = gk.rollout_correction(
        **{k: v.double() if v.is_floating_point() else v for k, v in halves.items()}, config=FULL
    )
    assert got.token_weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.token_weights.double(), wide.token_weights, rtol=1e-7, atol=0)
    for mask in (b["mask"].to(dtype) * -2, b["mask"].int()):
        assert torch.equal(
            gk.rollout_correction(**{**halves, "mask": mask}, config=FULL).token_weights, got.token_weights
        )


def test_long_rows_are_summed_in_float64() -> None:
    """A product over 200,000 tokens: the error of a float32 sum would exceed the weights' rounding."""
    g = torch.Generator().manual_seed(8)
    old = -torch.rand(1, 200_000, generator=g) * 8
    roll = old + 0.05 * torch.randn(1, 200_000, generator=g)
    exact = math.exp(math.fsum((old.double() - roll.double()).flatten().tolist()))
    options = {"weight": "ratio", "level": "sequence_sum", "log_clamp": None}
    flat = {"cu_seqlens": torch.tensor([0, 200_000])}
    for got in (
        gk.rollout_correction(old, roll, **options),
        gk.rollout_correction(old[0], roll[0], **flat, **options),
    ):
        assert float(got.token_weights.flatten()[0]) == pytest.approx(exact, rel=2e-7)


def test_threads_change_no_bit() -> None:
    b = batch_of((64, 2048), 9)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(gk.rollout_correction(**b, config=FULL))
    assert all(torch.equal(x, y) for x, y in zip(results[0][:2], results[1][:2], strict=True))
