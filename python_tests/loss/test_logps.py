"""token_logps against float64: values, entropy, sum p^2, gradients; every dtype, instruction set and odd vocabulary."""

import math

import pytest
import torch
from conftest import DTYPES, dtype_name
from eager_logps import check, eager, ours, run

import grpo_kernels as gk
from grpo_kernels.testing.compare import assert_as_accurate, relative_l2


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 257, 8191, 8193, 50257])  # a step, its neighbours, a block, many
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_accuracy(instruction_set, dtype, vocab):
    torch.manual_seed(vocab)
    logits, targets = (3 * torch.randn(3, vocab)).to(dtype), torch.randint(vocab, (3,))
    check(logits, targets, f"{instruction_set} {dtype} {vocab}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"logit_scale": 0.25, "temperature": 1.3}, {"softcap": 30.0}, {"softcap": 5.0, "logit_scale": 2.0, "temperature": 0.9}],
    ids=str,
)  # fmt: skip
def test_transforms(instruction_set, dtype, options):
    torch.manual_seed(1)
    check((4 * torch.randn(4, 1031)).to(dtype), torch.randint(1031, (4,)), str(options), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_peaked_rows(instruction_set, dtype):
    """One logit far above: 1 - p must not be formed from a rounded p."""
    torch.manual_seed(2)
    logits, targets = torch.randn(6, 999), torch.randint(999, (6,))
    logits[torch.arange(6), targets] = torch.tensor([5.0, 8.0, 12.0, 16.0, 24.0, 40.0])
    check(logits.to(dtype), targets, "peaked")


@pytest.mark.parametrize("shift", [-1e4, -100.0, 1e4])
def test_shifted_logits_change_nothing(instruction_set, shift):
    torch.manual_seed(3)
    logits, targets = (torch.randn(4, 500) * 8).round() / 8, torch.randint(500, (4,))  # exact under the shift
    plain, shifted = (run(ours, x, targets) for x in (logits, logits + shift))
    for a, b in zip(plain, shifted, strict=True):
        assert torch.equal(a, b)


def test_masked_vocabulary(instruction_set):
    torch.manual_seed(4)
    logits, targets = torch.randn(5, 300), torch.randint(300, (5,))
    logits[:, ::3] = -math.inf
    logits[4] = -math.inf  # no distribution: NaN, as torch
    targets[:3] = torch.tensor([1, 2, 4])
    targets[3] = 3  # masked itself: -inf
    mine, exact = run(ours, logits, targets), eager(logits.double(), targets)
    assert torch.equal(mine[0].isneginf(), torch.tensor([False, False, False, True, False]))
    assert mine[0][4].isnan() and mine[1][4].isnan()
    assert_as_accurate(mine[0][:3], exact[0][:3], exact[0][:3], what="logps")
    assert_as_accurate(mine[1][:4], exact[1][:4], exact[1][:4], what="entropy")
    logp = logits[:3].double().log_softmax(-1)  # the gradient by its formula: autograd makes NaN of 0 * -inf
    p, g, h = logp.exp(), torch.linspace(-1, 1, 5)[:3, None].double(), 0.3 * torch.linspace(1, -1, 5)[:3, None].double()
    expected = g * (torch.nn.functional.one_hot(targets[:3], 300) - p) - h * torch.where(
        p > 0, p * (logp + exact[1][:3, None]), 0.0
    )
    assert (mine[3][:3, ::3] == 0).all() and relative_l2(mine[3][:3], expected) < 1e-6


def test_extreme_logits(instruction_set):
    logits = torch.full((3, 70), -3.0e38)
    logits[0, 5], logits[1, 5], logits[2, 5] = 3.0e38, -2.9e38, 0.0
    out = gk.token_logps(logits, torch.full((3,), 5), return_entropy=True)
    assert torch.equal(out.logps, torch.zeros(3)) and torch.equal(out.entropy, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_strides_and_alignment(instruction_set, dtype):
    torch.manual_seed(5)
    wide = torch.randn(4, 6, 150).to(dtype)
    targets = torch.randint(101, (4, 6))
    for view in (
        wide[..., 3:104],
        wide.transpose(0, 1)[..., 1:102].transpose(0, 1),
        wide[:1, :, 7:108].expand(4, 6, 101),
    ):
        assert torch.equal(gk.token_logps(view, targets).logps, gk.token_logps(view.contiguous(), targets).logps)
        a, b = (
            torch.autograd.grad(gk.token_logps(x, targets).logps.sum(), x)[0]
            for x in (view.detach().requires_grad_(), view.contiguous().requires_grad_())
        )
        assert torch.equal(a, b)


def test_one_position_more_is_ignored():
    torch.manual_seed(6)
    logits, targets = torch.randn(3, 5, 40), torch.randint(40, (3, 4))
    logits[:, -1] = math.nan
    x = logits.clone().requires_grad_()
    out = gk.token_logps(x, targets)
    assert torch.equal(out.logps, gk.token_logps(logits[:, :-1], targets).logps)
    (g,) = torch.autograd.grad(out.logps.sum(), x)
    assert (g[:, -1] == 0).all() and (g[:, :-1] != 0).any()


def test_temperature_per_row_and_token():
    torch.manual_seed(7)
    logits, targets = torch.randn(3, 4, 50), torch.randint(50, (3, 4))
    per_token = torch.rand(3, 4) + 0.5
    expected = torch.stack(
        [
            gk.token_logps(logits[i, j], targets[i, j], temperature=float(per_token[i, j])).logps
            for i in range(3)
            for j in range(4)
        ]
    )
    torch.testing.assert_close(
        gk.token_logps(logits, targets, temperature=per_token).logps.flatten(), expected, rtol=0, atol=1e-6
    )
    per_row = torch.rand(3) + 0.5
    torch.testing.assert_close(
        gk.token_logps(logits, targets, temperature=per_row).logps,
        gk.token_logps(logits, targets, temperature=per_row[:, None].expand(3, 4)).logps,
    )


def test_a_row_depends_on_nothing_but_the_row(instruction_set):
    """Bitwise: whatever the other rows are, how many there are, and among how many threads the columns are split."""
    torch.manual_seed(8)
    logits, targets = torch.randn(9, 70001), torch.randint(70001, (9,))
    batched = run(ours, logits, targets)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            for i in (0, 4, 8):
                alone = gk.token_logps(logits[i : i + 1], targets[i : i + 1], return_entropy=True, return_sum_p2=True)
                assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, batched, strict=False))
            assert all(torch.equal(a, b) for a, b in zip(run(ours, logits, targets), batched, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_shapes():
    torch.manual_seed(9)
    logits, targets = torch.randn(2, 3, 4, 20), torch.randint(20, (2, 3, 4))
    out = gk.token_logps(logits, targets)
    assert out.logps.shape == (2, 3, 4) and out.entropy is None and out.sum_p2 is None
    assert torch.equal(out.logps.flatten(), gk.token_logps(logits.flatten(0, 2), targets.flatten()).logps)
    assert gk.token_logps(logits[0, 0, 0], targets[0, 0, 0]).logps.shape == ()
    for empty in ((0,), (0, 5), (5, 0)):
        x = torch.randn(*empty, 20, requires_grad=True)
        out = gk.token_logps(x, torch.zeros(empty, dtype=torch.int64)).logps
        assert out.shape == empty
        out.sum().backward()
        assert x.grad.shape == x.shape


def test_gradcheck(backend):
    torch.manual_seed(10)
    logits = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.randint(11, (2, 3)), torch.tensor([[1, 1, 0], [1, 0, 1]])
    for options in ({}, {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7}):
        assert torch.autograd.gradcheck(
            lambda x, options=options: gk.token_logps(
                x, targets, mask=mask, return_entropy=True, backend=backend, **options
            )[:2],
            logits,
        )


def test_inplace_backward():
    torch.manual_seed(11)
    leaf, targets = torch.randn(4, 33, requires_grad=True), torch.randint(33, (4,))
    (expected,) = torch.autograd.grad(gk.token_logps(leaf, targets).logps.sum(), leaf)
    logits = leaf * 1.0
    out = gk.token_logps(logits, targets, inplace_backward=True).logps
    assert torch.equal(logits, leaf)  # untouched until the backward
    (g,) = torch.autograd.grad(out.sum(), logits, retain_graph=True)
    assert torch.equal(g, expected) and g.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(out.sum(), logits)
    with pytest.raises(ValueError, match="leaf"):
        gk.token_logps(leaf, targets, inplace_backward=True)
