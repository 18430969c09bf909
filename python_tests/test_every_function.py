"""What every public function promises whatever it computes: it leaves its inputs alone, shares no memory, keeps no graph
and gives the same gradient however it is asked for."""

import dataclasses
import gc
import weakref

import pytest
import torch
from conftest import BACKENDS_HERE
from test_quick import CALLS, CASES, Inputs, asks_for_a_backend, scalar_of, tensors

import grpo_kernels as gk
from grpo_kernels.testing.inputs import make_batch

SMALL = [b for b in BACKENDS_HERE if b in ("cpu", "reference")]  # what every backend shares is in Python
EACH = [
    pytest.param(case, backend, id=f"{' '.join(filter(None, case[:2]))}{' packed' * case[2]} {backend or ''}".strip())
    for case in CASES
    for backend in (SMALL if asks_for_a_backend(case[0]) else [None])
    if case[:2] not in [("rollout_correction", p) for p in CALLS["rollout_correction"] if p.startswith("verl_")][1:]
]


def called(case, backend, dtype=torch.float32, leaves=(), mask=None):
    name, form, packed = case
    x = Inputs(dtype, packed, leaves=leaves)
    if mask is not None:
        x.mask = x.mask.to(mask)
    given = [v for v in [*vars(x).values(), *x.a_token.values(), *x.layout.values()] if isinstance(v, torch.Tensor)]
    before = [v.clone() for v in given]
    found = CALLS[name][form](x, **({} if backend is None else {"backend": backend}))
    given, before = [*given, *x.leaves], [*before, *(v.detach().clone() for v in x.leaves)]
    return x, found, given, before


def span(x):
    """The addresses between the first and the last element of a tensor."""
    elements = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + elements * x.element_size()


def overlap(x, y):
    (a, b), (c, d) = span(x), span(y)
    return x.numel() and y.numel() and a < d and c < b


@pytest.mark.parametrize("case, backend", EACH)
def test_inputs_stay_and_outputs_have_memory_of_their_own(case, backend):
    for dtype, mask in ((torch.float32, None), (torch.float64, torch.float32)):
        x, found, given, before = called(case, backend, dtype, mask=mask)
        outputs = tensors(found)
        if (total := scalar_of(outputs)) is not None:
            total.backward()
        for now, then in zip(given, before, strict=True):
            assert torch.equal(now, then)  # NaN is nowhere in them
        for i, y in enumerate(outputs):
            assert not any(overlap(y, v) for v in given)
            assert not any(overlap(y, other) for other in outputs[:i])
            assert not any(leaf.grad is not None and overlap(y, leaf.grad) for leaf in x.leaves)


@pytest.mark.parametrize("case, backend", EACH)
def test_detached_outputs_keep_no_graph(case, backend):
    """And may be overwritten before the backward: it takes no notice, or raises."""
    x, found, *_ = called(case, backend)
    if not x.leaves:
        assert not any(y.requires_grad for y in tensors(found))
        return
    leaves = [leaf.detach().requires_grad_() for leaf in x.leaves]
    intermediates = [leaf * 1 for leaf in leaves]
    _, found, *_ = called(case, backend, leaves=intermediates)
    dead = [weakref.ref(y) for y in intermediates]
    detached = [y for y in tensors(found) if not y.requires_grad]
    loss = scalar_of(tensors(found))
    (expected,) = torch.autograd.grad(loss, leaves[:1], retain_graph=True)
    for y in detached:
        y.fill_(1)
    try:
        (again,) = torch.autograd.grad(loss, leaves[:1])
        assert torch.equal(again, expected)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    del loss, found, intermediates, _
    gc.collect()
    assert all(ref() is None for ref in dead)


def losses(backend):
    """Loss of a leaf and its numbers, for each way to a gradient that kernels have."""
    b = make_batch(3, 4, 40).to(torch.float32)
    a, head = (b.targets, b.advantages, b.mask), torch.linspace(-1, 1, 40 * 8).view(40, 8)
    k = {"backend": backend}
    return {
        "single pass": (lambda x: gk.grpo_loss(x, *a, **k).loss, b.logits),
        "two sweeps": (lambda x: gk.grpo_loss(x, *a, single_pass=False, **k).loss, b.logits),
        "sequence": (lambda x: gk.grpo_loss(x, *a, config=gk.LossConfig(ratio_level="sequence"), **k).loss, b.logits),
        "linear": (lambda x: gk.linear_grpo_loss(x, head, *a, **k).loss, b.logits[..., :8].contiguous()),
        "policy": (lambda x: gk.policy_loss(x, *a[1:], old_logps=b.old_logps, **k).loss, b.old_logps + 0.1),
        "value": (lambda x: gk.value_loss(x, b.ref_logps, b.rollout_logps, b.mask, **k).loss, b.old_logps),
    }


WAYS = ("single pass", "two sweeps", "sequence", "linear", "policy", "value")
# Triton's kernels, interpreted, take seconds; what is asked here is their wrappers, which all backends share.
interpreted_in_soak = pytest.mark.soak_where(lambda backend, **_: backend == "triton")


@interpreted_in_soak
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_is_one_however_it_is_asked_for(way, backend):
    f, values = losses(backend)[way]
    x = values.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(x), x)
    assert expected.any()

    f(x).backward()
    assert torch.equal(x.grad, expected)
    x.grad, loss = None, f(x)
    for _ in range(2):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, 2 * expected, rtol=1e-6, atol=0)
    loss.backward()
    torch.testing.assert_close(x.grad, 3 * expected, rtol=1e-6, atol=0)

    for scale in (0.5, 1024.0, 0.0, -1.0):  # powers of two round nothing
        (g,) = torch.autograd.grad(f(x) * scale, x)
        assert torch.equal(g, expected * scale)
    both = f(x), f(2 * x)
    (second,) = torch.autograd.grad(f(2 * x), x)
    (g,) = torch.autograd.grad(both[0] + 3 * both[1], x)
    torch.testing.assert_close(g, expected + 3 * second, rtol=1e-5, atol=1e-8)


@interpreted_in_soak
@pytest.mark.parametrize("way", WAYS)
def test_what_is_done_to_a_gradient_does_not_reach_the_next(way, backend):
    """Of a retained graph: the gradient of a loss is 1, where the kernels' own memory could be handed out."""
    f, values = losses(backend)[way]
    x = values.clone().requires_grad_()
    loss = f(x)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], expected)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@interpreted_in_soak
@pytest.mark.parametrize("function", ["token_logps", "linear_token_logps", "kl_divergence"])
def test_upstream_gradients_of_any_strides(function, backend):
    """A mean's is expanded, a transposed output's strided."""
    if function == "kl_divergence" and backend != "cpu":
        pytest.skip("plain torch, no backend")
    b, k = make_batch(3, 4, 40).to(torch.float32), {"backend": backend}
    x, f = {
        "token_logps": (b.logits, lambda x: gk.token_logps(x, b.targets, return_entropy=True, **k)[:2]),
        "linear_token_logps": (
            b.logits[..., :8].contiguous(),
            lambda x: gk.linear_token_logps(x, b.logits[0, 0, :40, None].expand(40, 8) * 1, b.targets, return_entropy=True, **k)[:2],
        ),
        "kl_divergence": (b.old_logps, lambda x: (gk.kl_divergence(x, b.ref_logps),)),
    }[function]  # fmt: skip
    x = x.clone().requires_grad_()
    upstream = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    forms = {
        "expanded": torch.tensor(0.3).expand(3, 4),
        "a row for all": upstream[:1].expand(3, 4),
        "a column for all": upstream[:, :1].expand(3, 4),
        "transposed": upstream.t().contiguous().t(),
        "every second": upstream.repeat_interleave(2, 1)[:, ::2],
    }
    for form, g in forms.items():
        assert form == "dense" or not g.is_contiguous()
        pairs = [torch.autograd.grad(f(x), x, [u] * len(f(x)))[0] for u in (g, g.contiguous())]
        assert torch.equal(*pairs) and pairs[0].any(), form


def test_logits_that_hold_their_gradient_are_refused():
    """A second loss in place would take the gradient of the first for logits."""
    b = make_batch(3, 4, 40).to(torch.float32)
    a = (b.targets, b.advantages, b.mask)
    for shape in ((3, 4), (12,)):
        x = b.logits.clone().requires_grad_()
        z = (x * 1).view(*shape, 40)
        args = (a[0].view(shape), a[1].repeat_interleave(4) if len(shape) == 1 else a[1], a[2].view(shape))
        gk.grpo_loss(z, *args, inplace=True)
        for call in (lambda z=z, args=args: gk.grpo_loss(z, *args), lambda z=z, args=args: gk.token_logps(z, args[0])):
            with pytest.raises(RuntimeError, match=r"hold their gradient.*pass inplace=False"):
                call()
        with torch.no_grad():
            z.copy_(b.logits.view(z.shape))
        gk.token_logps(z, args[0])  # somebody has written logits there
    x = b.logits.clone().requires_grad_()
    y = x * 1
    for i in range(3):  # parts of one tensor, each once
        rows = slice(i, i + 1)
        gk.grpo_loss(y[rows], b.targets[rows], torch.ones(1), inplace=True).loss.backward(retain_graph=i < 2)
    assert x.grad.flatten(1).any(1).all()


@pytest.mark.parametrize("kind", ["flat", "padded"])
def test_copies_are_made_only_where_memory_would_be_shared(kind):
    b, k = make_batch(3, 4, 40), {}
    if kind == "flat":
        k = {"cu_seqlens": torch.tensor([0, 4, 12])}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        logps = b.old_logps.to(dtype).flatten() if kind == "flat" else b.old_logps.to(dtype)
        mask = b.mask.flatten() if kind == "flat" else b.mask
        advantages = b.advantages[:2].to(dtype) if kind == "flat" else b.advantages.to(dtype)
        out = gk.policy_loss(logps, advantages, mask, entropy=logps, return_entropy=True, **k)
        c = gk.rollout_correction(logps, logps, mask, **k)
        assert torch.equal(out.logps, logps.to(out.logps.dtype)) and torch.equal(c.mask, mask)
        for mine, given in ((out.logps, logps), (out.entropy, logps), (out.logps, out.entropy), (c.mask, mask)):
            assert not overlap(mine, given)


def test_every_case_is_asked():
    assert {case.values[0][0] for case in EACH} == set(CALLS)
    assert not any(dataclasses.is_dataclass(getattr(gk, name)) for name in CALLS)
