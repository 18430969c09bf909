"""rollout_correction: what a config may be, edges, layouts, properties, torch.compile. Values: test_oracle_correction."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import one_thread as one_thread
from oracles import poisoned
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import grpo_kernels as gk
from grpo_kernels.correction_config import CORRECTION_PRESETS, LEVELS, NANS, REDUCTIONS, STATISTICS

METRICS = [
    "weight_mean", "weight_min", "weight_max", "weight_std", "effective_sample_size", "ratio_low", "ratio_high",
    "rejected_tokens", "rejected_rows", "missing_tokens", "k1", "k3", "ppl_ratio", "chi2_token", "chi2_sequence",
    "logp_difference_mean", "logp_difference_max", "mult_prob_error",
]  # fmt: skip
WEIGHTS = [
    {}, {"weight": "ratio"}, {"weight": "truncate", "high": 1.2}, {"weight": "clip", "low": 0.8, "high": 1.2},
    {"weight": "mask", "low": 0.8, "high": 1.2}, {"weight": "mask", "low": 0.9},
]  # fmt: skip
FILTERS = [gk.RejectionFilter(s, r, high=1.3 if s in ("ratio", "mult_prob_error") else 0.05)
           for s, r in itertools.product(STATISTICS, REDUCTIONS)]  # fmt: skip
FULL = gk.CorrectionConfig(
    weight="clip", level="sequence_mean", low=0.9, high=1.1, veto=0.5, opsm_delta=0.02, batch_normalise=True,
    filters=(gk.RejectionFilter("k3", "mean", high=0.06), gk.RejectionFilter("ratio", "max", high=1.9)),
)  # fmt: skip


def batch_of(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Keywords of rollout_correction; ragged rows, holes, sometimes rows without a token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shape[1] + 1, (shape[0], 1), generator=g)
    mask = (torch.arange(shape[1]) < lengths) & (torch.rand(shape, generator=g) < 0.9)
    old = -torch.rand(shape, generator=g) * 3
    others = [old + 0.2 * torch.randn(shape, generator=g) for _ in range(2)]
    names = ("old_logps", "rollout_logps", "logps", "advantages")
    tensors = dict(zip(names, (old, *others, torch.randn(shape[0], generator=g)), strict=True))
    return {name: x.to(dtype) for name, x in tensors.items()} | {"mask": mask}


def packed(b: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """Rows end to end, of `kept` tokens only."""
    flat = {name: x if x.dim() == 1 else x[kept] for name, x in b.items()}
    return flat | {"cu_seqlens": torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))}


def assert_close(a: gk.RolloutCorrection, b: gk.RolloutCorrection, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a.token_weights, b.token_weights, rtol=tolerance, atol=tolerance)
    assert torch.equal(a.mask, b.mask)
    assert list(a.metrics) == list(b.metrics)
    for name in a.metrics:
        torch.testing.assert_close(a.metrics[name], b.metrics[name], rtol=tolerance, atol=tolerance, msg=name)


# ---- every combination, once ----


@pytest.mark.parametrize("nan", NANS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_weights_by_hand(weight: dict[str, Any], level: str, nan: str) -> None:
    """The definition, one token after the other."""
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


def test_filters_together_are_and() -> None:
    b = batch_of((20, 30), 3)
    arguments = b["old_logps"], b["rollout_logps"], b["mask"]
    alone = [gk.rollout_correction(*arguments, filters=(f,), renormalise=True).mask for f in FILTERS]
    both = gk.rollout_correction(*arguments, filters=FILTERS[:3], renormalise=True)
    assert torch.equal(both.mask, alone[0] & alone[1] & alone[2])


def test_bounds_are_inside() -> None:
    """A value on its bound is kept; d = 0 is exactly 1."""
    zero = torch.zeros(1, 3)
    on = gk.rollout_correction(zero, zero, weight="mask", low=1.0, high=1.0)
    assert (on.token_weights == 1).all()
    for statistic, bound in (("ratio", 1.0), ("k1", 0.0), ("k2", 0.0), ("k3", 0.0), ("mult_prob_error", 1.0)):
        for reduction in REDUCTIONS:
            f = gk.RejectionFilter(statistic, reduction, low=bound)
            assert (gk.rollout_correction(zero, zero, filters=(f,)).token_weights == 1).all()


@pytest.mark.parametrize("level", ["token", "sequence_sum"])
def test_batch_normalise(level: str) -> None:
    """Mean 1 over tokens, or over rows that have tokens; rejection comes after it."""
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


def test_the_loss_takes_both() -> None:
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
    """A token that one side holds impossible, and both; the clamp bounds what they weigh."""
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
    """They cancel instead of turning the row into NaN, as in TRL."""
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


def test_nan_rejects_the_row_that_a_filter_sees() -> None:
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
    b = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in batch_of((3, 4), 6).items()}
    got = gk.rollout_correction(**b, config=FULL)
    assert not any(x.requires_grad for x in (got.token_weights, *got.metrics.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Half-precision log-probs are read as they are; what comes out is float32."""
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
    """A product over 200,000 tokens: float32 sums would be off by more than the weights' rounding."""
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


# ---- properties ----

quick = settings(max_examples=40, deadline=None)
shapes, seeds = st.tuples(st.integers(1, 6), st.integers(1, 9)), st.integers(0, 2**31)
configs = st.builds(
    lambda weight, level, filters, veto, delta, nan, normalise, renormalise: gk.CorrectionConfig(
        **weight, level=level if weight else "token", filters=filters, veto=veto, opsm_delta=delta, nan=nan,
        batch_normalise=normalise and bool(weight), renormalise=renormalise and (bool(filters) or veto is not None),
    ),
    st.sampled_from(WEIGHTS), st.sampled_from(LEVELS), st.lists(st.sampled_from(FILTERS), max_size=3),
    st.sampled_from([None, 0.8]), st.sampled_from([None, 0.01]), st.sampled_from(NANS), st.booleans(), st.booleans(),
)  # fmt: skip


@quick
@given(shapes, seeds, configs)
def test_packed_is_padded(shape: tuple[int, int], seed: int, config: gk.CorrectionConfig) -> None:
    b = batch_of(shape, seed)
    whole = gk.rollout_correction(**b, config=config)
    kept = torch.ones_like(b["mask"])
    kept[::2] = b["mask"][::2]  # masked tokens removed from every other row
    flat = gk.rollout_correction(**packed(b, kept), config=config)
    assert_close(flat, whole._replace(token_weights=whole.token_weights[kept], mask=whole.mask[kept]), 1e-11)


@quick
@given(shapes, seeds, configs)
def test_masked_tokens_are_not_read(shape: tuple[int, int], seed: int, config: gk.CorrectionConfig) -> None:
    b = batch_of(shape, seed)
    dirty = {k: poisoned(v, b["mask"]) if v.shape == b["mask"].shape and k != "mask" else v for k, v in b.items()}
    assert_close(gk.rollout_correction(**dirty, config=config), gk.rollout_correction(**b, config=config), 0.0)


@quick
@given(shapes, seeds, configs)
def test_rows_do_not_see_each_other(shape: tuple[int, int], seed: int, config: gk.CorrectionConfig) -> None:
    config = replace(config, batch_normalise=False)
    b = batch_of(shape, seed)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    whole, moved = (gk.rollout_correction(**x, config=config) for x in (b, {k: v[order] for k, v in b.items()}))
    assert torch.equal(whole.token_weights[order], moved.token_weights) and torch.equal(whole.mask[order], moved.mask)


@quick
@given(shapes, seeds, configs)
def test_the_sampler_is_the_policy(shape: tuple[int, int], seed: int, config: gk.CorrectionConfig) -> None:
    """old = rollout: every weight is exactly 1, nothing is rejected, no divergence."""
    config = replace(config, opsm_delta=None)
    b = batch_of(shape, seed)
    got = gk.rollout_correction(b["old_logps"], b["old_logps"], b["mask"], config=config)
    assert torch.equal(got.token_weights, b["mask"].double()) and torch.equal(got.mask, b["mask"])
    zero = ("k1", "k3", "chi2_token", "chi2_sequence", "rejected_tokens", "ratio_low", "ratio_high", "weight_std")
    assert all(got.metrics[name] == 0 for name in zero) and got.metrics["effective_sample_size"] == 1


@quick
@given(shapes, seeds, configs)
def test_metrics_are_finite_and_in_range(shape: tuple[int, int], seed: int, config: gk.CorrectionConfig) -> None:
    b = batch_of(shape, seed)
    got = gk.rollout_correction(**b, config=config)
    m = {name: float(x) for name, x in got.metrics.items()}
    assert list(m) == METRICS and all(map(math.isfinite, m.values()))
    assert all(x.dim() == 0 for x in got.metrics.values())
    assert m["weight_min"] <= m["weight_mean"] + 1e-12 <= m["weight_max"] + 2e-12 and m["k3"] >= 0
    assert 0 <= m["effective_sample_size"] <= 1 + 1e-12 and 0 <= m["rejected_tokens"] <= 1
    lost = b["mask"] & ~got.mask
    if config.renormalise and b["mask"].any():
        assert m["rejected_tokens"] == pytest.approx(float(lost.sum() / b["mask"].sum()), abs=1e-6)


def test_metrics_are_documented() -> None:
    table = gk.RolloutCorrection.__doc__.split("=\n")[1]
    documented = []
    for line in table.splitlines():
        names = re.match(r"    (\w\S*(?:, \S+)*)  ", line)
        for name in names[1].split(", ") if names else []:
            first, *more = name.split("/")
            documented += [first, *(first.rpartition("_")[0] + "_" + last for last in more)]
    assert sorted(documented) == sorted(METRICS)


# ---- torch.compile ----


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("config", [gk.CorrectionConfig.preset("verl_token_icepop"), FULL], ids=["icepop", "full"])
def test_compiled_is_eager(config: gk.CorrectionConfig, form: str) -> None:
    b = batch_of((5, 7), 10)
    b = b if form == "padded" else packed(b, torch.ones_like(b["mask"]))
    compiled = torch.compile(lambda **tensors: gk.rollout_correction(**tensors, config=config), fullgraph=True)
    assert_close(compiled(**b), gk.rollout_correction(**b, config=config))


def test_compiled_with_options_inside() -> None:
    b = batch_of((5, 7), 11)

    def f(old: Tensor, roll: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        c = gk.rollout_correction(
            old,
            roll,
            mask,
            weight="truncate",
            high=1.1,
            veto=0.7,
            filters=(gk.RejectionFilter("k3", "mean", high=0.1),),
        )
        return c.token_weights, c.metrics["k3"]

    arguments = b["old_logps"], b["rollout_logps"], b["mask"]
    for got, exact in zip(torch.compile(f, fullgraph=True)(*arguments), f(*arguments), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-14)


def test_lengths_keep_their_graph() -> None:
    counter = CompileCounter()
    compiled = torch.compile(
        lambda **tensors: gk.rollout_correction(**tensors, config=FULL), fullgraph=True, backend=counter
    )
    for shape in ((4, 5), (4, 6), (4, 9), (6, 7), (9, 3)):
        b = batch_of(shape, 12)
        b = packed(b, torch.ones_like(b["mask"]))
        assert_close(compiled(**b), gk.rollout_correction(**b, config=FULL))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_nothing_waits_for_a_device(form: str) -> None:
    """On tensors without data: whatever would read one raises."""
    b = batch_of((5, 7), 13)
    b = b if form == "padded" else packed(b, torch.ones_like(b["mask"]))
    b = {name: x.to("meta") for name, x in b.items()}
    got = gk.rollout_correction(**b, config=FULL)
    kl = gk.kl_divergence(b["logps"], b["old_logps"], mask=b["mask"], input_clamp=20.0)
    controller = gk.AdaptiveEntropyController()
    controller.observe(b["logps"], b["mask"])
    assert all(x.is_meta for x in (*got[:2], *got.metrics.values(), kl, controller._window))


# ---- data parallel ----


def normalise_on(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    b = batch_of((6, 5), 12)
    for level in ("token", "sequence_sum"):
        options = {"weight": "ratio", "level": level, "batch_normalise": True}
        arguments = [b[k] for k in ("old_logps", "rollout_logps", "mask")]
        whole = gk.rollout_correction(*arguments, **options)
        rows = slice(0, 2) if rank == 0 else slice(2, 6)
        mine = gk.rollout_correction(*(x[rows] for x in arguments), dp_group=torch.distributed.group.WORLD, **options)
        torch.testing.assert_close(mine.token_weights, whole.token_weights[rows], rtol=1e-12, atol=0)
    torch.distributed.destroy_process_group()


def test_normalised_over_all_ranks(tmp_path) -> None:
    torch.multiprocessing.spawn(normalise_on, (str(tmp_path / "store"),), nprocs=2)


# ---- what is refused ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight": "tis"}, "weight must be one of 'none', 'ratio', 'truncate', 'clip', 'mask'; got 'tis'"),
        ({"weight": "ratio", "level": "geometric"}, "level must be one of 'token', 'sequence_sum', 'sequence_mean'; got"),
        ({"nan": "zero"}, "nan must be one of 'ignore', 'reject'; got 'zero'"),
        ({"opsm_delta": 0.1, "opsm_behaviour": "new"}, "opsm_behaviour must be one of 'rollout', 'old'; got 'new'"),
        ({"high": 2.0}, "weight='none' reads no low and no high; got None, 2.0"),
        ({"weight": "ratio", "low": 0.5}, "weight='ratio' reads no low and no high; got 0.5, None"),
        ({"weight": "truncate"}, "weight='truncate' needs high and no low"),
        ({"weight": "truncate", "low": 0.5, "high": 2.0}, "weight='truncate' needs high and no low"),
        ({"weight": "clip"}, "weight='clip' needs low, high or both"),
        ({"weight": "mask"}, "weight='mask' needs low, high or both"),
        ({"weight": "mask", "low": 2.0, "high": 0.5}, "low must be at most high; got 2.0, 0.5"),
        ({"weight": "clip", "low": -0.1}, "low must be a finite number, at least 0; got -0.1"),
        ({"weight": "truncate", "high": 0.0}, "high must be a finite number above 0; got 0.0"),
        ({"weight": "truncate", "high": math.inf}, "high must be .*; got inf"),
        ({"weight": "truncate", "high": "2_3"}, "high must be .*|'>' not supported"),
        ({"level": "sequence_sum"}, "level is read by a weight only, not by weight='none'; got 'sequence_sum'"),
        ({"batch_normalise": True}, "batch_normalise needs a weight other than 'none'"),
        ({"renormalise": True}, "renormalise needs filters, a veto or opsm_delta"),
        ({"opsm_behaviour": "old"}, "opsm_behaviour is read with opsm_delta only"),
        ({"opsm_delta": -0.1}, "opsm_delta must be at least 0, or None; got -0.1"),
        ({"veto": 1.5}, "veto must be between 0 and 1, or None; got 1.5"),
        ({"veto": math.nan}, "veto must be between 0 and 1, or None; got nan"),
        ({"log_clamp": 0.0}, "log_clamp must be above 0, or None; got 0.0"),
    ],
)  # fmt: skip
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        gk.CorrectionConfig(**options)
    with pytest.raises((ValueError, TypeError), match=message):
        gk.rollout_correction(torch.zeros(1, 1), torch.zeros(1, 1), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (("k4", "mean", 0.0, 1.0), "statistic must be one of 'ratio', 'k1', .*; got 'k4'"),
        (("k1", "median", 0.0, 1.0), "reduction must be one of 'token', 'sum', 'mean', 'min', 'max'; got 'median'"),
        (("k3", "mean"), "a filter needs low or high; got None, None"),
        (("k3", "mean", -0.1), "low must be a finite number, at least 0; got -0.1"),
        (("k1", "mean", 0.2, -0.2), "low must be at most high; got 0.2, -0.2"),
        (("ratio", "mean", None, 0.0), "high must be a finite number above 0; got 0.0"),
        (("k1", "mean", math.nan), "low must be a finite number; got nan"),
        (("k1", "mean", None, True), "high must be a finite number; got True"),
    ],
)
def test_filter_refuses(options: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.RejectionFilter(*options)
    with pytest.raises(TypeError, match="filters must be RejectionFilter objects; got"):
        gk.CorrectionConfig(filters=[options])


def test_from_verl_refuses() -> None:
    for options, message in [
        (("geometric",), "rollout_is must be one of 'token', 'sequence'; got 'geometric'"),
        (("token", "a_b"), "a threshold must be 'low_high' or one number; got 'a_b'"),
        (("token", -1.0), "a threshold must be .*; got -1.0"),
        (("token", "5_0.5"), "low must be at most high"),
        (("token", 2.0, False, "seq_max_k1", 2.0), "rollout_rs must be one of 'token_k1', .*; got 'seq_max_k1'"),
        (("token", 2.0, False, "token_k2", "0.1_0.2"), "the threshold of token_k2 must be one number; got '0.1_0.2'"),
        (("token", 2.0, False, "token_k1,token_k2", "1,2,3"), "rollout_rs_threshold must be 1 or 2 values"),
        (("token", 2.0, False, "token_k1"), "a threshold must be .*; got 'None'"),
    ]:
        with pytest.raises(ValueError, match=message):
            gk.CorrectionConfig.from_verl(*options)


def test_presets() -> None:
    for name in CORRECTION_PRESETS:
        assert gk.CorrectionConfig.preset(name).log_clamp in (None, 20.0)
    assert gk.CorrectionConfig.preset("slime_tis", high=4.0).high == 4.0
    with pytest.raises(ValueError, match="no preset 'tis'; there are nemo_icepop, "):
        gk.CorrectionConfig.preset("tis")
    assert hash(FULL) == hash(replace(FULL)) and FULL == replace(FULL)
    assert [f.name for f in fields(gk.CorrectionConfig)][:4] == ["weight", "level", "low", "high"]


def test_arguments() -> None:
    x = torch.zeros(2, 3)
    for arguments, options, message in [
        ((x, torch.zeros(3, 2)), {}, r"rollout_logps must have the shape of the tokens, \(2, 3\); got \(3, 2\)"),
        ((x, x, torch.ones(2)), {}, r"mask must have the shape of the tokens, \(2, 3\); got \(2,\)"),
        ((x[0], x[0]), {}, r"flat tokens need cu_seqlens, their sequences' boundaries; got shape \(3,\)"),
        ((x, x), {"cu_seqlens": torch.tensor([0, 6])}, r"cu_seqlens goes with flat \[N\] tokens"),
        ((x[0], x[0]), {"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens must rise from 0 to at most the 3 tokens"),
        ((x[None], x[None]), {}, r"must be \[B, T\] or flat \[N\]; got shape \(1, 2, 3\)"),
        ((x, x), {"opsm_delta": 0.1}, "opsm_delta needs logps and advantages; logps and advantages is None"),
        ((x, x), {"opsm_delta": 0.1, "logps": x}, "opsm_delta needs logps and advantages; advantages is None"),
        (
            (x, x),
            {"opsm_delta": 0.1, "logps": x, "advantages": torch.zeros(3)},
            r"advantages must have shape \(2, 3\) or \(2,\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            gk.rollout_correction(*arguments, **options)
    with pytest.raises(TypeError, match=r"rollout_logps must be a tensor of shape \(2, 3\); got None"):
        gk.rollout_correction(x, None)
    with pytest.raises(TypeError, match="clip_max"):
        gk.rollout_correction(x, x, clip_max=3.0)
