"""No Triton kernel leaves the memory of its tensors, whatever the boundaries of packed sequences say: on a GPU nobody has
looked at them. The backend is called as the operators call it, since those refuse such boundaries on the CPU."""

import pytest
import torch
from bounds import Accesses, check_accesses

import grpo_kernels as gk
from grpo_kernels.backends import triton as backend
from grpo_kernels.inputs.layout import layout_of, rows_of
from grpo_kernels.loss.policy import Advantages, LossArguments, policy_inputs

pytest.importorskip("triton")
import triton
import triton.language as tl

from grpo_kernels.backends.triton import returns, token
from grpo_kernels.backends.triton.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="checks the accesses of the interpreter")

TOKENS, BLOCK = 60, 16  # of the kernels per token: several of them a sequence
LOWEST, HIGHEST = -(2**63), 2**63 - 1
LEGAL = {"whole": [0, 20, 60], "tail": [0, 3, 3, 6], "nothing": [0, 0]}
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


# ---- boundaries ----


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


def test_the_tail_of_many_blocks_is_shared(accesses):
    """Zeros to the end, by all programs in turn."""
    rewards, active, cu = packed(cu_seqlens=[0, 4, 6])
    outputs = (*backend.gae(rewards, rewards, active, cu, 0.99, 0.9), *token_policy([0, 4, 6], "sequence")[1:4])
    assert all((x[0, 6:] == 0).all() and (x[0, :6] != 0).any() for x in outputs) and not accesses.outside


# ---- no false alarm, nor a true one, in legal launches of the other kernels ----


def row_policy(rows, config):
    batch, tokens = rows.targets.shape
    x = torch.zeros(batch, tokens)
    inputs = policy_inputs(
        layout_of(rows.targets.shape, None), rows.active, torch.float32, config, Advantages(x + 1),
        LossArguments(ref_logps=x),
    )  # fmt: skip
    backend.row_policy(rows, inputs, rows.logits)


@pytest.mark.parametrize("shape", [(1, 2, 2600), (2, 3, 2600), (2, 3, 37)], ids=str)  # shared, whole and short rows
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
    """Each element once, whole accesses or not; what is not the matrix's stays."""
    wide = columns + {"dense": 0, "rows apart": 3, "aligned rows apart": -columns % 8 + 8, "anywhere": 9}[layout]
    begin = 1 if layout == "anywhere" else 0
    memory = torch.randn(2, 3, wide, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = memory.clone()
    expected[..., begin : begin + columns] *= 1.5
    backend.scale(memory[..., begin : begin + columns], torch.tensor(1.5))
    assert torch.equal(memory, expected)
    assert accesses.inside["scale_kernel"] > 0 and not accesses.outside
