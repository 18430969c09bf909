"""Sizes at the ends of what is allowed, calls by the thousand, and how cost grows with the size."""

import gc
import statistics
import time

import pytest
import torch
from conftest import BACKENDS_HERE

import grpo_kernels as gk
from grpo_kernels.testing.compare import assert_as_accurate
from grpo_kernels.tools.providers.batch import produced

GIB = 1 << 30
COMPILED = [b for b in BACKENDS_HERE if b in ("cpu", "emulated")]
STEP_OPTIONS = {"single pass": {}, "two sweeps": {"single_pass": False}, "in place": {"inplace": True}}


def batch(sequences, tokens, vocab, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(sequences, tokens, vocab, generator=g).to(dtype)
    targets = torch.randint(vocab, (sequences, tokens), generator=g)
    return logits, targets, torch.randn(sequences, generator=g)


def outcome(logits, targets, advantages, backend, **options):
    x = logits.clone().requires_grad_()
    out = gk.grpo_loss(x * 1, targets, advantages, return_entropy=True, backend=backend, **options)
    out.loss.backward()
    return out.loss.detach(), out.logps, out.entropy, x.grad


SHAPES = {  # where an index, a grid or a sum could end
    "70,000 tokens": (1, 70_000, 3),
    "70,000 sequences": (70_000, 1, 3),
    "a vocabulary of one": (3, 5, 1),
    "a vocabulary of a million": (2, 2, 1_000_000),
}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("options", STEP_OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.soak_where(
    lambda backend, shape, options: (
        shape != "a vocabulary of one" and (backend == "emulated" or options != "single pass")
    )
)
def test_extreme_shapes(backend, options, shape):
    inputs = batch(*SHAPES[shape])
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    for a, b, c in zip(
        outcome(*inputs, backend, **STEP_OPTIONS[options]),
        outcome(*inputs, "reference"),
        outcome(*exact, "reference"),
        strict=True,
    ):
        assert_as_accurate(a, b, c, what=shape)


def test_a_vocabulary_of_one_is_certain():
    loss, logps, entropy, gradient = outcome(*batch(3, 5, 1), "cpu")
    assert not logps.any() and not entropy.any() and not gradient.any() and loss.isfinite()


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def nodes():
    """Tensors and Python's autograd nodes that are alive."""
    gc.collect()
    return sum(isinstance(x, (torch.Tensor, torch.autograd.graph.Node)) for x in gc.get_objects())


def steps(count):
    """Three calls each: a way to a loss, forward and backward, the loss of its log-probs, and one without a backward."""
    logits, targets, advantages = batch(4, 8, 64)
    hidden, head = torch.randn(4, 8, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    for i in range(count):
        x = logits.clone().requires_grad_()
        k = list(STEP_OPTIONS.values())[i % 3]
        if i % 4 == 3:
            out = gk.linear_grpo_loss(hidden, head, targets, advantages)
        else:
            out = gk.grpo_loss(x * 1, targets, None, rewards=advantages, group_size=2, **k)
        out.loss.backward()
        gk.policy_loss(out.logps.requires_grad_(), advantages, old_logps=out.logps.detach()).loss.backward()
        gk.grpo_loss(x, targets, advantages).metrics["kl"].item()  # a graph that no backward frees


@pytest.mark.parametrize("calls", [600, pytest.param(10_000, marks=pytest.mark.soak)])
def test_calls_leave_nothing_behind(calls):
    count = calls // 3
    steps(count // 5)  # what is allocated once: pools of threads, caches
    before, alive = resident(), nodes()
    steps(count)
    assert nodes() <= alive + 5
    grown = resident() - before
    print(f"{calls} calls: {grown / 1024:.0f} KiB more resident memory")
    assert grown < 4 << 20  # 400 bytes per call, of 10,000


@pytest.mark.soak
@pytest.mark.parametrize("axis", ["N", "V", "G"])
def test_cost_is_linear(axis):
    """Four times the size takes about four times as long, from where a call's own cost no longer shows."""
    base = {"N": (8, 64, 8192), "V": (8, 64, 8192), "G": (64, 8, 8192)}[axis]

    def seconds(factor):
        b, t, v = base
        shape = {"N": (b, t * factor, v), "V": (b, t, v * factor), "G": (b * factor, t, v)}[axis]
        logits, targets, advantages = batch(*shape, dtype=torch.bfloat16)
        k = {"rewards": advantages, "group_size": shape[0]} if axis == "G" else {"advantages": advantages}
        x, taken = logits.requires_grad_(), []
        for _ in range(7):
            began = time.process_time()
            torch.autograd.grad(gk.grpo_loss(x, targets, **k).loss, x)
            taken.append(time.process_time() - began)
        return statistics.median(taken)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread that waits for another spins, which is CPU time too
    try:
        seconds(4)
        ratios = [seconds(16) / seconds(4) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    print(f"{axis} x 4: CPU time x {statistics.median(ratios):.2f} {[round(r, 2) for r in ratios]}")
    assert 2.5 < statistics.median(ratios) < 6


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("options", STEP_OPTIONS)
def test_rows_further_apart_than_32_bits_reach(backend, options):
    """Of memory that is reserved and, but for the rows, never touched."""
    apart = 2**31 + 16
    logits, targets, advantages = batch(2, 3, 300, torch.float16)
    far = torch.empty(apart + 3 * 300, dtype=torch.float16).as_strided((2, 3, 300), (apart, 300, 1))
    k, found = STEP_OPTIONS[options] | {"backend": backend}, []
    for x in (far.copy_(logits), logits.clone()):
        x = x.requires_grad_(not k.get("inplace"))
        if k.get("inplace"):
            x = produced(x)
        out = gk.grpo_loss(x, targets, advantages, scale=2.0, **k)
        (gradient,) = torch.autograd.grad(out.loss, x)
        found.append((out.logps, gradient.contiguous()))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.any()


@pytest.mark.soak
def test_more_than_2_to_the_31_logits():
    """4.3 GB of bfloat16 in place: the rows at both ends are those of a small batch."""
    rows, vocab = 2**31 // 131_072 + 8, 131_072
    with open("/proc/meminfo") as f:
        available = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    if available < 8 * GIB:
        pytest.skip(f"needs 8 GiB of free memory; there are {available / GIB:.1f}")
    logits = torch.empty(1, rows, vocab, dtype=torch.bfloat16)
    block = torch.randn(64, vocab, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for i in range(0, rows, 64):
        logits[0, i : i + 64] = block[: min(64, rows - i)]
    targets = torch.arange(rows)[None] * 7 % vocab
    x = produced(logits)
    assert x.numel() > 2**31
    out = gk.grpo_loss(x, targets, torch.ones(1), inplace=True, denominator=64.0)
    out.loss.backward()
    for begin in (0, rows // 64 // 2 * 64, (rows - 64) // 64 * 64):
        y = block[None].clone().requires_grad_()
        few = gk.grpo_loss(y, targets[:, begin : begin + 64], torch.ones(1), denominator=64.0)
        few.loss.backward()
        assert torch.equal(out.logps[:, begin : begin + 64], few.logps)
        assert torch.equal(logits[:, begin : begin + 64], y.grad)
    with open("/proc/self/status") as f:
        peak = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    assert peak < 14 * GIB
