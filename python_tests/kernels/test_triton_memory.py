"""No Triton kernel accesses memory outside its tensors, whatever the boundaries of packed sequences are: on a GPU
nothing checks them. The backend is called directly, since the operators refuse such boundaries on the CPU."""

import math

import pytest
import torch
from bounds import Accesses, check_accesses

import grpo_kernels as gk
from grpo_kernels.backends import triton as backend
from grpo_kernels.inputs.grouping import AdvantageForm, Samples
from grpo_kernels.inputs.layout import layout_of, rows_of
from grpo_kernels.loss.policy import Advantages, LossArguments, policy_inputs

pytest.importorskip("triton")
import triton
import triton.language as tl

from grpo_kernels.backends.triton import returns, token
from grpo_kernels.backends.triton.launch import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="checks the accesses of the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # what it computes of NaNs
]

TOKENS, BLOCK = 60, 16  # of the kernels per token: a sequence has several
LOWEST, HIGHEST = -(2**63), 2**63 - 1
LEGAL = {"all tokens": [0, 20, 60], "tail": [0, 3, 3, 6], "no tokens": [0, 0]}
HOSTILE = {
    "past": [0, 20, 1000], "descending": [0, 40, 20, 60], "negative": [0, -10, 60], "late": [8, 20, 60],
    "ends below 0": [0, 20, -7], "extremes": [LOWEST, HIGHEST, LOWEST, HIGHEST], "widest": [0, HIGHEST],
    "overflowing": [HIGHEST, LOWEST], "past first": [140, 160, 180],
}  # fmt: skip
BOUNDARIES = {**LEGAL, **HOSTILE}


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> Accesses:
    monkeypatch.setattr(returns, "BLOCK", BLOCK)
    monkeypatch.setattr(token, "BLOCK", BLOCK)
    return check_accesses(monkeypatch)


def apart(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers in a view with a gap behind each row."""
    wide = torch.randn(*shape[:-1], shape[-1] + 5, generator=torch.Generator().manual_seed(0))
    return wide.to(dtype)[..., 2:-3]


def packed(*, cu_seqlens: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    return apart(1, TOKENS), torch.arange(TOKENS)[None] % 7 != 3, cu


def token_policy(cu_seqlens: list[int], level: str) -> tuple[torch.Tensor, ...]:
    logps, active, cu = packed(cu_seqlens=cu_seqlens)
    flat = logps[0]
    layout = layout_of(flat.shape, torch.tensor([0, TOKENS]))
    inputs = policy_inputs(
        layout, active, torch.float32, gk.LossConfig(kl_coef=0.1, entropy_coef=0.1, ratio_level=level),
        Advantages(flat), LossArguments(flat - 0.1, flat, flat, token_weights=flat),
    )  # fmt: skip
    return backend.token_policy(logps, logps, active, cu, inputs)


# ---- the check itself ----


@triton.jit
def copy_kernel(source, destination, first, count, BLOCK: tl.constexpr):
    i = first + tl.arange(0, BLOCK)
    tl.store(destination + i, tl.load(source + i, i < count), i < count)


@pytest.mark.parametrize(("first", "count", "lanes"), [(0, 8, 0), (0, 9, 1), (-2, 4, 2)])
def test_the_check_counts_the_lanes_outside(accesses, first, count, lanes):
    copy_kernel[(1,)](torch.arange(8), torch.zeros(8, dtype=torch.int64), first, count, BLOCK=16)
    assert [(x.kernel, x.what, x.lanes) for x in accesses.outside] == (
        [("copy_kernel", "load", lanes), ("copy_kernel", "store", lanes)] if lanes else []
    )


def test_a_gap_of_a_view_is_outside(accesses):
    copy_kernel[(1,)](torch.arange(32).view(2, 16)[:, 3:7], torch.zeros(32, dtype=torch.int64), 0, 19, BLOCK=32)
    assert [(x.what, x.lanes) for x in accesses.outside] == [
        ("load", 12)
    ]  # 16 lanes but 4 of the first row, 3 of the next


# ---- boundaries of sequences ----


@pytest.mark.parametrize("name", BOUNDARIES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_token_kernel(accesses, name, level):
    _, per_token, g_logps, g_entropy, _ = token_policy(BOUNDARIES[name], level)
    assert accesses.inside["token_kernel"] > 0 and not accesses.outside
    last = max(0, min(BOUNDARIES[name][-1], TOKENS))
    assert all((x[0, last:] == 0).all() for x in (per_token, g_logps, g_entropy))


@pytest.mark.parametrize(("name", "critic"), [*((name, True) for name in BOUNDARIES), ("tail", False), ("past", False)])
def test_gae(accesses, name, critic):
    rewards, active, cu = packed(cu_seqlens=BOUNDARIES[name])
    out = backend.gae(rewards, apart(1, TOKENS) if critic else None, active, cu, 0.99, 0.9)
    assert accesses.inside["gae_kernel"] > 0 and not accesses.outside
    last = max(0, min(BOUNDARIES[name][-1], TOKENS))
    assert all((x[0, last:] == 0).all() for x in out[: 1 + critic])


@pytest.mark.parametrize("name", BOUNDARIES)
def test_diversity(accesses, name):
    cu = torch.tensor(BOUNDARIES[name])
    tokens, active = torch.arange(TOKENS)[None] % 13, torch.ones(1, TOKENS, dtype=torch.bool)
    samples = cu.numel() - 1
    keep, *_ = backend.group_diversity(tokens, active, cu, None, samples, 2, 0.5)
    assert keep.shape == (samples,) and keep[0]
    assert accesses.inside["greedy_kernel"] > 0 and not accesses.outside


def test_all_programs_zero_the_tail(accesses):
    """The tokens after the last sequence are zeros, written by all programs in turn."""
    rewards, active, cu = packed(cu_seqlens=[0, 4, 6])
    outputs = (*backend.gae(rewards, rewards, active, cu, 0.99, 0.9), *token_policy([0, 4, 6], "sequence")[1:4])
    assert all((x[0, 6:] == 0).all() and (x[0, :6] != 0).any() for x in outputs) and not accesses.outside


# ---- legal launches of the other kernels stay inside ----


def row_policy(rows, config):
    batch, tokens = rows.targets.shape
    x = torch.zeros(batch, tokens)
    inputs = policy_inputs(
        layout_of(rows.targets.shape, None), rows.active, torch.float32, config, Advantages(x + 1),
        LossArguments(ref_logps=x),
    )  # fmt: skip
    backend.row_policy(rows, inputs, rows.logits)


@pytest.mark.parametrize(
    "shape", [(1, 2, 2600), (2, 3, 2600), (2, 3, 37)], ids=str
)  # rows that are split, rows that are not, short rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(accesses, shape, dtype):
    logits = apart(*shape, dtype=dtype)
    targets = torch.full(shape[:2], shape[2] - 1)
    targets[0, 0], targets[0, 1] = -5, 2**40
    rows = rows_of(
        logits, targets, None, temperature=torch.ones(shape[:2]), logit_scale=1.0, softcap=None, ignore_index=-100
    )
    stats, _ = backend.row_forward(rows, True)
    backend.row_backward(rows, stats, torch.ones(shape[:2]), None, torch.empty(shape, dtype=dtype))
    row_policy(rows, gk.LossConfig(kl_coef=0.1, entropy_coef=0.1))
    assert {"stats_kernel", "gradient_kernel", "policy_kernel"} == set(accesses.inside) and not accesses.outside


@pytest.mark.parametrize("ids", [None, torch.arange(12) % 5])
@pytest.mark.parametrize(("baseline", "scale"), [("length_weighted", "batch"), ("leave_one_out", "leave_one_out")])
def test_groups(accesses, ids, baseline, scale):
    options = {"group_size": 4} if ids is None else {"group_ids": ids}
    if baseline == "length_weighted":
        options["lengths"] = torch.arange(12) + 1
    gk.group_advantages(torch.randn(12, 2), baseline=baseline, scale=scale, backend="triton", **options)
    assert ("batch_kernel" in accesses.inside) == (scale == "batch")
    assert accesses.inside["group_kernel"] > 0 and not accesses.outside


def test_values(accesses):
    x, on = apart(3, 40), torch.arange(120).view(3, 40) % 3 != 0
    backend.value_loss(x, x, apart(3, 40), on.float(), on, 0.2)
    assert accesses.inside["value_kernel"] > 0 and not accesses.outside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("columns", [1, 7, 4099])
@pytest.mark.parametrize("layout", ["dense", "rows apart", "aligned rows apart", "anywhere"])
def test_scaling(accesses, layout, columns, dtype):
    """Each element is scaled once, with vectors or without; memory outside the matrix stays as it is."""
    wide = columns + {"dense": 0, "rows apart": 3, "aligned rows apart": -columns % 8 + 8, "anywhere": 9}[layout]
    begin = 1 if layout == "anywhere" else 0
    memory = torch.randn(2, 3, wide, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = memory.clone()
    expected[..., begin : begin + columns] *= 1.5
    backend.scale(memory[..., begin : begin + columns], torch.tensor(1.5))
    assert torch.equal(memory, expected)
    assert accesses.inside["scale_kernel"] > 0 and not accesses.outside


# ---- any values, and empty inputs ----

FILLINGS = {
    "NaN": [math.nan], "infinite": [math.inf], "-infinite": [-math.inf], "largest": [3.3e38, -3.3e38],
    "mixed": [math.nan, -math.inf, math.inf, 0.0, 3.3e38, -3.3e38, 1e-45],
}  # fmt: skip
TARGETS = {"legal": 5, "past": 2600, "far past": HIGHEST, "negative": -1, "far below": LOWEST}


def filled(filling: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """These numbers, repeated, in a view with a gap behind each row."""
    x = apart(*shape)
    numbers = torch.tensor(FILLINGS[filling])
    x.copy_(numbers[torch.arange(x.numel()) % len(numbers)].view(shape))
    wide = torch.zeros(*shape[:-1], shape[-1] + 5, dtype=dtype)[..., 2:-3]
    return wide.copy_(x)


def all_row_kernels(logits, targets, mask, temperature=1.0):
    shape = logits.shape[:2]
    rows = rows_of(logits, targets, mask, temperature=temperature, logit_scale=1.0, softcap=None, ignore_index=-100)
    stats, _ = backend.row_forward(rows, True)
    gradient = torch.full_like(logits, 7)
    backend.row_backward(rows, stats, torch.ones(shape), torch.ones(shape), gradient)
    row_policy(rows, gk.LossConfig(kl_coef=0.1, entropy_coef=0.1))
    return stats, gradient


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("shape", [(1, 2, 2600), (2, 3, 37)], ids=str)
def test_rows_of_any_numbers(accesses, shape, filling):
    logits = filled(filling, *shape, dtype=torch.bfloat16)
    all_row_kernels(logits, torch.full(shape[:2], shape[2] - 1), None, temperature=filled(filling, *shape[:2]))
    assert {"stats_kernel", "gradient_kernel", "policy_kernel"} == set(accesses.inside) and not accesses.outside


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_targets_of_any_value(accesses, target, masked):
    """A masked token's log-prob is 0; an active token's is NaN unless its target is a column."""
    stats, gradient = all_row_kernels(
        apart(1, 2, 2600), torch.full((1, 2), TARGETS[target]), torch.full((1, 2), not masked)
    )
    assert not accesses.outside and accesses.inside["policy_kernel"] > 0
    if masked:
        assert (stats.logps == 0).all() and (gradient == 0).all()
    else:
        assert stats.logps.isfinite().all() == (target == "legal")


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("active", [True, False])
def test_tokens_of_any_numbers(accesses, filling, active):
    """All kernels per token and per sample. Where nothing is active, the results do not depend on the values."""
    x, on = filled(filling, 2, 40), torch.full((2, 40), active)
    layout = layout_of(x.shape, None)
    inputs = policy_inputs(
        layout, on, torch.float32, gk.LossConfig(kl_coef=0.1, entropy_coef=0.1, ratio_level="sequence"),
        Advantages(x), LossArguments(x, x, x, token_weights=x),
    )  # fmt: skip
    outputs = [*backend.token_policy(x, x, on, None, inputs)[:4], *backend.gae(x, x, on, None, 0.99, 0.9)]
    outputs += backend.value_loss(x, x, x, x, on, 0.2)[:2]
    valid = torch.full((12,), active)
    rewards = filled(filling, 12, 2)
    form = AdvantageForm(4, "mean", "batch", 1, 1e-4, 0.0, -9.0, 9.0, False)
    outputs += backend.group_advantages(Samples(rewards, None, valid, None, None, None), form)[:1]
    backend.scale(filled(filling, 2, 3, 37), torch.tensor(FILLINGS[filling][0]))
    kernels = {"token_kernel", "gae_kernel", "value_kernel", "group_kernel", "batch_kernel", "scale_kernel"}
    assert kernels == set(accesses.inside) and not accesses.outside
    if not active:
        assert all((out == 0).all() for out in outputs), [out.count_nonzero() for out in outputs]


@pytest.mark.parametrize("ids", [[LOWEST, HIGHEST, 0, -1] * 3, [HIGHEST] * 12], ids=["extremes", "one"])
def test_groups_of_any_name(accesses, ids):
    gk.group_advantages(torch.randn(12), group_ids=torch.tensor(ids), scale="batch", backend="triton")
    assert accesses.inside["group_kernel"] > 0 and not accesses.outside


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_tokens_at_all(accesses, shape):
    x, on = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    all_row_kernels(torch.zeros(*shape, 37), torch.zeros(shape, dtype=torch.int64), None)
    inputs = policy_inputs(
        layout_of(x.shape, None), on, torch.float32, gk.LossConfig(), Advantages(x), LossArguments(x),
    )  # fmt: skip
    loss, per_token, *_ = backend.token_policy(x, None, on, None, inputs)
    assert loss == 0 and per_token.shape == shape
    assert all(out.shape == shape for out in backend.gae(x, x, on, None, 0.99, 0.9))
    assert backend.value_loss(x, x, x, x, on, 0.2)[0] == 0
    backend.scale(torch.zeros(*shape, 37), torch.tensor(2.0))
    assert not accesses.outside
