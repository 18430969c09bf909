"""Logits that are overwritten by their gradient: which layouts allow it, and that all others are refused."""

import itertools
import random

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.inputs.layout import check_rows_apart
from grpo_kernels.testing.inputs import make_batch

B, T, V = 4, 5, 6
OVERLAPPING = {
    "expanded batch": lambda x: x[:1].expand(B, -1, -1),
    "expanded tokens": lambda x: x[:, :1].expand(-1, T, -1),
    "windows of tokens": lambda x: x.as_strided((B, T, V), (V, V, 1)),
    "windows of columns": lambda x: x.as_strided((B, T, V), (T * V, V - 1, 1)),
    "interlaced, one column too near": lambda x: x.as_strided((2, 3, V), (3 * V, 2 * V - 1, 1)),
}
APART = {
    "contiguous": lambda x: x,
    "slice of the batch": lambda x: x[1:3],
    "every second token": lambda x: x[:, ::2],
    "without the last token": lambda x: x[:, :-1],
    "part of the vocabulary": lambda x: x[..., 1:],
    "batch and tokens exchanged": lambda x: x.transpose(0, 1),
    "one row, expanded": lambda x: x[:1, :1].expand(1, 1, -1),
    "one sequence of stride 0": lambda x: x.as_strided((1, T, V), (0, V, 1)),
    "one token of stride 0": lambda x: x.as_strided((B, 1, V), (T * V, 0, 1)),
    "interlaced": lambda x: x.as_strided((2, 3, V), (3 * V, 2 * V, 1)),
    "no rows": lambda x: x[:0],
}
LOSSES = {
    "single pass": lambda z, *a: gk.grpo_loss(z, *a, inplace=True).loss,
    "two sweeps": lambda z, *a: gk.grpo_loss(z, *a, inplace=True, single_pass=False).loss,
    "log-probs": lambda z, targets, _: gk.token_logps(z, targets, inplace_backward=True).logps.sum(),
}
OUT_OF_PLACE = {
    "single pass": lambda z, *a: gk.grpo_loss(z, *a).loss,
    "two sweeps": lambda z, *a: gk.grpo_loss(z, *a, single_pass=False).loss,
    "log-probs": lambda z, targets, _: gk.token_logps(z, targets).logps.sum(),
}


def arguments(shape):
    g = torch.Generator().manual_seed(0)
    return torch.randint(min(V - 1, shape[-1]), shape[:2], generator=g), torch.randn(shape[0], generator=g)


def logits():
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("view", OVERLAPPING)
def test_rows_that_share_memory_are_refused(loss, view):
    x = OVERLAPPING[view](logits() * 1)
    with pytest.raises(ValueError, match=r"must not share memory: strides \("):
        LOSSES[loss](x, *arguments(x.shape))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("view", APART)
def test_rows_apart_give_the_gradient_of_a_copy(loss, view):
    gradients = []
    for losses in (LOSSES, OUT_OF_PLACE):
        x = logits()
        rows = APART[view](x * 1)
        losses[loss](rows, *arguments(rows.shape)).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert view == "no rows" or gradients[0].any()


def test_flat_tokens():
    x, targets = torch.randn(T, V, requires_grad=True), torch.zeros(T, dtype=torch.int64)
    gk.token_logps(x * 1, targets, inplace_backward=True).logps.sum().backward()
    with pytest.raises(ValueError, match="share memory"):
        gk.token_logps((x * 1)[:1].expand(T, -1), targets, inplace_backward=True)


def test_overlap_is_detected_exactly():
    """Compared with the addresses of every row's elements."""
    rng, counts = random.Random(0), {True: 0, False: 0}
    for _ in range(3000):
        batch, tokens, vocab = rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 4)
        strides = (rng.randint(0, 14), rng.randint(0, 14))
        x = torch.empty(200).as_strided((batch, tokens, vocab), (*strides, 1))
        places = [b * strides[0] + t * strides[1] + v
                  for b, t, v in itertools.product(range(batch), range(tokens), range(vocab))]  # fmt: skip
        overlap = len(set(places)) < len(places)
        counts[overlap] += 1
        if overlap:
            with pytest.raises(ValueError, match="share memory"):
                check_rows_apart(x)
        else:
            check_rows_apart(x)
    assert min(counts.values()) > 500


@pytest.mark.parametrize("single_pass", [True, False])
def test_a_graph_refuses_at_run_time(single_pass):
    """The graph's strides may be symbolic, so the operator checks them when it runs."""
    b = make_batch(vocab=V)

    @torch.compile(fullgraph=True, backend="eager")
    def step(z):
        return gk.grpo_loss(z, b.targets, b.advantages, inplace=True, single_pass=single_pass).loss

    torch._dynamo.reset()
    x = b.logits.clone().requires_grad_()
    step(x * 1).backward()
    assert torch.isfinite(x.grad).all()
    with pytest.raises(ValueError, match="share memory"):
        step((x[:1] * 1).expand(len(b.logits), -1, -1)).backward()
