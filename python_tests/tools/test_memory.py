"""Peak memory, asserted: nothing as large as the logits where the library says so, by a measurement that would see it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.tools.memory.peak import PeakMemory, peak_memory
from grpo_kernels.tools.providers.batch import produced

B, T, V = 8, 64, 49152
N = B * T
ROW_BYTES = 64  # a loss with its gradient, beyond the logits: everything per token, all forms
FORWARD_ROW_BYTES = 32
CONSTANT = 16 << 10  # what grows with neither tokens nor vocabulary: metrics, per-sequence weights, 0-d tensors
SCRATCH = 8 << 20  # resident: thread stacks and blocks in C++, page granularity; the logits are 48 MiB and more

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
FORMS = {
    "clip": {},
    "kl+entropy": {"kl_coef": 0.04, "entropy_coef": 0.01, "dual_clip": 3.0},
    "trl": {"entropy_coef": 0.01, "entropy_aggregation": "token_mean", "entropy_mask_bonus": True},
    "sequence": {"ratio_level": "sequence", "aggregation": "sequence_mean", "kl_coef": 0.04},
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


class Tokens:
    """Per-token inputs, [B, T] or packed [N]."""

    def __init__(self, *shape: int):
        generator = torch.Generator().manual_seed(0)
        self.targets = torch.randint(V, shape, generator=generator)
        self.advantages = torch.randn(shape, generator=generator)
        self.mask = torch.rand(shape, generator=generator) < 0.8
        self.keywords = {name: torch.randn(shape, generator=generator) - 10 for name in ("old_logps", "ref_logps")}


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(B, T)


@functools.cache
def logits_of(dtype: torch.dtype) -> Tensor:
    """Shared by all tests, in-place ones too: only how much memory is touched matters here, not what is in it."""
    return torch.randn(B, T, V).mul_(3).to(dtype)


def loss_and_gradient(
    logits: Tensor, tokens: Tokens, form: str = "clip", upstream: float = 1.0, **options: object
) -> Callable:
    config = gk.LossConfig(**FORMS[form])

    def run() -> tuple[Tensor, ...]:
        head = produced(logits)
        out = gk.grpo_loss(
            head,
            tokens.targets,
            tokens.advantages,
            tokens.mask,
            **tokens.keywords,
            config=config,
            backend="cpu",
            **options,
        )
        return *out, *torch.autograd.grad(out.loss, head, torch.tensor(upstream))

    return run


def assert_small(peak: PeakMemory, limit: int) -> None:
    assert peak.tensor_bytes <= limit + CONSTANT, f"{peak.tensor_bytes:,} bytes, {peak.tensor_bytes / N:.1f} a row"
    if peak.resident_bytes is not None:
        assert peak.resident_bytes <= limit + SCRATCH, f"{peak.resident_bytes:,} bytes"


# ---- the measurement sees what it must ----


def eager(logits: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
    logps = logits.float().log_softmax(-1).gather(-1, tokens.targets[..., None])[..., 0]
    loss = -((logps - tokens.keywords["old_logps"]).exp() * tokens.advantages)[tokens.mask].mean()
    return loss, *torch.autograd.grad(loss, logits)


@DTYPES
def test_eager_is_seen_to_hold_several_float32_matrices(dtype: torch.dtype, tokens: Tokens) -> None:
    logits = logits_of(dtype)
    peak = peak_memory(lambda: eager(produced(logits), tokens))
    assert peak.largest_tensor_bytes == N * V * 4
    assert peak.tensor_bytes >= 2 * N * V * 4
    assert peak.resident_bytes is None or peak.resident_bytes >= 2 * N * V * 4 - SCRATCH


def test_memory_of_an_operator_is_seen_though_its_result_is_dropped() -> None:
    logits = produced(logits_of(torch.bfloat16)[:1])
    targets = torch.zeros(1, T, dtype=torch.int64)
    peak = peak_memory(lambda: gk.grpo_loss(logits, targets, torch.ones(1), backend="cpu") and None)
    assert T * V * 2 <= peak.tensor_bytes <= T * V * 2 + CONSTANT


def test_tensors_freed_before_the_peak_do_not_count_but_results_do() -> None:
    def run() -> Tensor:
        torch.ones(1 << 20)
        torch.ones(1 << 20)
        return torch.ones(1 << 18)

    peak = peak_memory(run)
    assert (peak.tensor_bytes, peak.largest_tensor_bytes) == (4 << 20, 4 << 20)


def test_what_was_there_before_does_not_count() -> None:
    there = [torch.ones(1 << 20)]

    def run() -> Tensor:
        there.clear()
        return torch.ones(1 << 19)

    assert peak_memory(run, setup=lambda: there.append(torch.ones(1 << 20))).tensor_bytes == 2 << 20


def test_resident_memory_falls_back_to_sampling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setattr("grpo_kernels.tools.memory.peak._CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    resident = peak_memory(lambda: torch.ones(16 << 20)).resident_bytes
    assert resident is not None
    assert (64 << 20) - SCRATCH <= resident <= (64 << 20) + SCRATCH


# ---- from logits ----


@DTYPES
@EVERY_FORM
@pytest.mark.parametrize("single_pass", [True, False])
def test_in_place_needs_only_per_token_memory(dtype: torch.dtype, form: str, single_pass: bool, tokens: Tokens) -> None:
    peak = peak_memory(loss_and_gradient(logits_of(dtype), tokens, form, inplace=True, single_pass=single_pass))
    assert_small(peak, ROW_BYTES * N)


@DTYPES
@pytest.mark.parametrize("single_pass", [True, False])
def test_in_place_with_an_upstream_gradient(dtype: torch.dtype, single_pass: bool, tokens: Tokens) -> None:
    run = loss_and_gradient(logits_of(dtype), tokens, upstream=0.25, inplace=True, single_pass=single_pass)
    assert_small(peak_memory(run), ROW_BYTES * N)


@pytest.mark.parametrize("single_pass", [True, False])
def test_one_more_position_and_strides_cost_no_copy(single_pass: bool, tokens: Tokens) -> None:
    logits = torch.randn(B, T + 1, V + 8).bfloat16()[..., :V]
    peak = peak_memory(loss_and_gradient(logits, tokens, inplace=True, single_pass=single_pass))
    assert_small(peak, ROW_BYTES * N)


@pytest.mark.parametrize("form", ["clip", "sequence"])
def test_packed_needs_only_per_token_memory(form: str) -> None:
    packed, boundaries = Tokens(N), torch.arange(0, N + 1, T)
    peak = peak_memory(
        loss_and_gradient(logits_of(torch.bfloat16).view(N, V), packed, form, inplace=True, cu_seqlens=boundaries)
    )
    assert_small(peak, ROW_BYTES * N)


@DTYPES
@EVERY_FORM
@pytest.mark.parametrize("single_pass", [True, False])
def test_out_of_place_allocates_the_gradient_alone(
    dtype: torch.dtype, form: str, single_pass: bool, tokens: Tokens
) -> None:
    peak = peak_memory(loss_and_gradient(logits_of(dtype), tokens, form, single_pass=single_pass))
    assert peak.largest_tensor_bytes == N * V * dtype.itemsize
    assert_small(peak, N * V * dtype.itemsize + ROW_BYTES * N)


def test_a_leaf_takes_the_gradient_without_a_copy(tokens: Tokens) -> None:
    logits = logits_of(torch.bfloat16).detach().requires_grad_()

    def run() -> None:
        gk.grpo_loss(logits, tokens.targets, tokens.advantages, tokens.mask, backend="cpu").loss.backward()

    peak = peak_memory(run, setup=lambda: setattr(logits, "grad", None))
    assert_small(peak, N * V * 2 + ROW_BYTES * N)


@DTYPES
def test_token_logps_forward(dtype: torch.dtype, tokens: Tokens) -> None:
    logits = logits_of(dtype)
    with torch.no_grad():
        peak = peak_memory(
            lambda: gk.token_logps(
                logits, tokens.targets, mask=tokens.mask, return_entropy=True, return_sum_p2=True, backend="cpu"
            )
        )
    assert_small(peak, FORWARD_ROW_BYTES * N)


# ---- from hidden states ----

CHUNK, H, HEAD_V = 64, 32, 32768
WORKSPACE = 1 << 20  # of the BLAS
assert N == 8 * CHUNK


class Head:
    """hidden [B, T, H] x weight [V, H], and what one chunk of logits and the gradients may take."""

    def __init__(self, dtype: torch.dtype, *, frozen: bool = False, bias: bool = False):
        self.hidden = torch.randn(B, T, H).to(dtype).requires_grad_()
        self.weight = torch.randn(HEAD_V, H).to(dtype).requires_grad_(not frozen)
        self.bias = torch.randn(HEAD_V).to(dtype).requires_grad_() if bias else None
        self.wanted = [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]
        self.logits_bytes = N * HEAD_V * dtype.itemsize
        self.chunk_bytes = CHUNK * HEAD_V * 4
        chunks = self.chunk_bytes if dtype == torch.float32 else self.chunk_bytes * 3 // 2  # itself and widened
        sums = 0 if frozen else HEAD_V * (H + 2) * (4 if dtype == torch.float32 else 4 + 2)  # in float32, then rounded
        self.limit = chunks + 2 * self.hidden.nbytes + sums + ROW_BYTES * N + WORKSPACE
        assert 1.5 * self.limit < self.logits_bytes  # else the test would prove nothing

    def loss(self, tokens: Tokens, form: str) -> Tensor:
        return gk.linear_grpo_loss(
            self.hidden, self.weight, tokens.targets % HEAD_V, tokens.advantages, tokens.mask, bias=self.bias,
            chunk_rows=CHUNK, **tokens.keywords, config=gk.LossConfig(**FORMS[form]), backend="cpu",
        ).loss  # fmt: skip

    def logps(self, tokens: Tokens) -> gk.TokenLogps:
        return gk.linear_token_logps(
            self.hidden, self.weight, tokens.targets % HEAD_V, bias=self.bias, mask=tokens.mask, chunk_rows=CHUNK,
            return_entropy=True, backend="cpu",
        )  # fmt: skip

    def check(self, run: Callable[[], object], setup: Callable[[], object] | None = None) -> None:
        peak = peak_memory(run, setup=setup, resident=False)  # the BLAS and the C library's heap make that one vary
        assert peak.largest_tensor_bytes <= max(self.chunk_bytes, HEAD_V * H * 4) < self.logits_bytes
        assert peak.tensor_bytes <= self.limit, f"{peak.tensor_bytes:,} bytes; {self.limit:,} allowed"


@DTYPES
@EVERY_FORM
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_linear_loss_never_holds_the_logits(dtype: torch.dtype, form: str, frozen: bool, tokens: Tokens) -> None:
    head = Head(dtype, frozen=frozen)
    head.check(lambda: torch.autograd.grad(head.loss(tokens, form), head.wanted))


@DTYPES
def test_linear_logps_never_hold_the_logits(dtype: torch.dtype, tokens: Tokens) -> None:
    head = Head(dtype)

    def run() -> tuple[Tensor, ...]:
        out = head.logps(tokens)
        return torch.autograd.grad(out.logps.sum() + out.entropy.sum(), head.wanted)

    head.check(run)


@DTYPES
def test_linear_logps_without_grad_hold_one_chunk(dtype: torch.dtype, tokens: Tokens) -> None:
    head = Head(dtype, frozen=True)
    with torch.no_grad():
        head.check(lambda: head.logps(tokens))


@DTYPES
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_leaf_parameters_take_the_linear_gradients_without_a_copy(
    dtype: torch.dtype, bias: bool, tokens: Tokens
) -> None:
    head = Head(dtype, bias=bias)

    def clear() -> None:
        for x in head.wanted:
            x.grad = None

    head.check(lambda: head.loss(tokens, "clip").backward(), clear)
    assert head.weight.grad is not None
