"""rollout_correction: properties, torch.compile, devices without data, and data parallelism."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from correction_inputs import FILTERS, FULL, METRICS, WEIGHTS, batch_of, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import one_thread as one_thread
from oracle_cases import poisoned
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import grpo_kernels as gk
from grpo_kernels.correction.config import LEVELS, NANS


def assert_close(a: gk.RolloutCorrection, b: gk.RolloutCorrection, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a.token_weights, b.token_weights, rtol=tolerance, atol=tolerance)
    assert torch.equal(a.mask, b.mask)
    assert list(a.metrics) == list(b.metrics)
    for name in a.metrics:
        torch.testing.assert_close(a.metrics[name], b.metrics[name], rtol=tolerance, atol=tolerance, msg=name)


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
    padded = gk.rollout_correction(**b, config=config)
    kept = torch.ones_like(b["mask"])
    kept[::2] = b["mask"][::2]  # masked tokens removed from every other row
    flat = gk.rollout_correction(**packed(b, kept), config=config)
    assert_close(flat, padded._replace(token_weights=padded.token_weights[kept], mask=padded.mask[kept]), 1e-11)


@quick
@given(shapes, seeds, configs)
def test_masked_tokens_are_not_read(shape: tuple[int, int], seed: int, config: gk.CorrectionConfig) -> None:
    b = batch_of(shape, seed)
    dirty = {k: poisoned(v, b["mask"]) if v.shape == b["mask"].shape and k != "mask" else v for k, v in b.items()}
    assert_close(gk.rollout_correction(**dirty, config=config), gk.rollout_correction(**b, config=config), 0.0)


@quick
@given(shapes, seeds, configs)
def test_rows_do_not_affect_each_other(shape: tuple[int, int], seed: int, config: gk.CorrectionConfig) -> None:
    config = replace(config, batch_normalise=False)
    b = batch_of(shape, seed)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    original, permuted = (gk.rollout_correction(**x, config=config) for x in (b, {k: v[order] for k, v in b.items()}))
    assert torch.equal(original.token_weights[order], permuted.token_weights)
    assert torch.equal(original.mask[order], permuted.mask)


@quick
@given(shapes, seeds, configs)
def test_the_policy_as_its_own_sampler_needs_no_correction(
    shape: tuple[int, int], seed: int, config: gk.CorrectionConfig
) -> None:
    """old = rollout: every weight is exactly 1, nothing is rejected, and the divergence is 0."""
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
    rejected = b["mask"] & ~got.mask
    if config.renormalise and b["mask"].any():
        assert m["rejected_tokens"] == pytest.approx(float(rejected.sum() / b["mask"].sum()), abs=1e-6)


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
    """One graph for each. Inductor compiles only the largest, since it takes half a minute."""
    backend = "inductor" if config is FULL and form == "packed" else "aot_eager"
    b = batch_of((5, 7), 10)
    b = b if form == "padded" else packed(b, torch.ones_like(b["mask"]))
    compiled = torch.compile(
        lambda **tensors: gk.rollout_correction(**tensors, config=config), fullgraph=True, backend=backend
    )
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
def test_no_host_sync(form: str) -> None:
    """On tensors without data, reading a value raises an error."""
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
        expected = gk.rollout_correction(*arguments, **options)
        rows = slice(0, 2) if rank == 0 else slice(2, 6)
        mine = gk.rollout_correction(*(x[rows] for x in arguments), dp_group=torch.distributed.group.WORLD, **options)
        torch.testing.assert_close(mine.token_weights, expected.token_weights[rows], rtol=1e-12, atol=0)
    torch.distributed.destroy_process_group()


def test_normalised_over_all_ranks(tmp_path) -> None:
    torch.multiprocessing.spawn(normalise_on, (str(tmp_path / "store"),), nprocs=2)
