"""linear_token_logps and linear_grpo_loss against materialised logits in float64; frozen parts, chunks, autocast."""

import itertools

import pytest
import torch
from conftest import dtype_name
from forms import FORMS

import grpo_kernels as gk
from grpo_kernels.ops import linear_chunks
from grpo_kernels.testing.compare import assert_as_accurate, relative_l2
from grpo_kernels.testing.inputs import make_batch

H, V = 24, 133


def tensors(dtype, seed=0):
    torch.manual_seed(seed)
    return [x.to(dtype) for x in (torch.randn(5, 7, H), torch.randn(V, H) / 3, torch.randn(V) / 3)]


def run(loss, values, needs):
    leaves = [x.detach().clone().requires_grad_(need) for x, need in zip(values, needs, strict=True)]
    out = loss(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x.requires_grad])]


def materialised(hidden, weight, bias, batch, config, **options):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return gk.grpo_loss(
        logits,
        batch.targets,
        batch.advantages,
        batch.mask,
        config=config,
        backend="reference",
        **batch.keywords(),
        **options,
    ).loss


@pytest.mark.parametrize("single_pass", [True, False])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.soak_where(lambda backend, dtype, **_: backend == "triton" and dtype in (torch.float64, torch.float16))
def test_accuracy(backend, dtype, form, single_pass):
    """With k2, since k3's error is the log-prob's times e^u, here up to 40: the comparison would depend on which of two
    roundings is luckier."""
    batch, config = make_batch(), gk.LossConfig(**{"kl_estimator": "k2", **form}, kl_coef=0.1, entropy_coef=0.05)
    b, values = batch.to(torch.float32 if dtype.itemsize == 2 else dtype), tensors(dtype)

    def mine(h, w, c):
        return gk.linear_grpo_loss(
            h,
            w,
            b.targets,
            b.advantages,
            b.mask,
            bias=c,
            chunk_rows=4,
            config=config,
            single_pass=single_pass,
            temperature=0.9,
            backend=backend,
            **b.keywords(),
        ).loss

    ours = run(mine, values, [True] * 3)
    eager = run(lambda *x: materialised(*x, b, config, temperature=0.9), values, [True] * 3)
    wide = b.to(torch.float64)
    exact = run(lambda *x: materialised(*x, wide, config, temperature=0.9), [x.double() for x in values], [True] * 3)
    for name, x, y, z in zip(("loss", "hidden", "weight", "bias"), ours, eager, exact, strict=True):
        assert x.dtype == (dtype if name != "loss" else b.advantages.dtype)
        assert_as_accurate(x, y, z, what=name)
        assert relative_l2(x, z) <= 2 * relative_l2(y, z) + 1e-6, name


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("single_pass", [True, False])
def test_frozen_parts(needs, single_pass):
    b, config, values = make_batch(), gk.LossConfig(), tensors(torch.float64)

    def mine(h, w, c):
        return gk.linear_grpo_loss(
            h, w, b.targets, b.advantages, b.mask, bias=c, config=config, single_pass=single_pass, old_logps=b.old_logps
        ).loss

    everything = run(mine, values, [True] * 3)
    some = run(mine, values, needs)
    kept = [everything[0], *(g for g, need in zip(everything[1:], needs, strict=True) if need)]
    for a, c in zip(some, kept, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("chunk_rows", [1, 3, 35, 1000, None])
def test_chunks_change_nothing(chunk_rows):
    b, values = make_batch(), tensors(torch.float64)

    def mine(chunk):
        return lambda h, w, c: gk.linear_grpo_loss(h, w, b.targets, b.advantages, b.mask, bias=c, chunk_rows=chunk).loss

    for a, c in zip(run(mine(chunk_rows), values, [True] * 3), run(mine(7), values, [True] * 3), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-15)


def test_logps_entropy_and_sum_p2(backend):
    b, (h, w, c) = make_batch(), tensors(torch.float64)
    full = gk.token_logps(h @ w.t() + c, b.targets, mask=b.mask, return_entropy=True, return_sum_p2=True)
    mine = gk.linear_token_logps(
        h, w, b.targets, bias=c, mask=b.mask, return_entropy=True, return_sum_p2=True, chunk_rows=3, backend=backend
    )
    for x, y in zip(mine[:3], full, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_one_position_more_and_temperature_per_token(backend):
    b, (h, w, _) = make_batch(), tensors(torch.float64)
    temperature = torch.rand(5, 7, dtype=torch.float64) + 0.5
    longer = torch.cat([h, torch.full_like(h[:, :1], float("nan"))], 1).requires_grad_()
    out = gk.linear_grpo_loss(longer, w, b.targets, b.advantages, b.mask, temperature=temperature, backend=backend)
    plain = gk.grpo_loss(h @ w.t(), b.targets, b.advantages, b.mask, temperature=temperature)
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-12, atol=0)
    (g,) = torch.autograd.grad(out.loss, longer)
    assert (g[:, -1] == 0).all() and (g[:, :-1] != 0).any()


def test_gradcheck():
    b, (h, w, c) = make_batch(vocab=9), tensors(torch.float64)
    h, w, c = h[:2, :3, :4], w[:9, :4], c[:9]
    args = (b.targets[:2, :3], b.advantages[:2], b.mask[:2, :3])

    def loss(h, w, c):
        return gk.linear_grpo_loss(
            h, w, *args, bias=c, chunk_rows=2, config=gk.LossConfig(entropy_coef=0.1), old_logps=b.old_logps[:2, :3]
        ).loss

    def logps(h, w, c):
        return gk.linear_token_logps(h, w, args[0], bias=c, mask=args[2], chunk_rows=2, return_entropy=True)[:2]

    leaves = [x.contiguous().requires_grad_() for x in (h, w, c)]
    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradcheck(logps, leaves)


def test_tied_embedding_accumulates():
    """The weight is used twice, as a tied lm_head is: autograd adds the two gradients."""
    b, (_, w, _) = make_batch(), tensors(torch.float64)
    grads = []
    for fn in (gk.linear_grpo_loss, None):
        tied = w.clone().requires_grad_()
        hidden = tied[b.targets]
        out = (
            fn(hidden, tied, b.targets, b.advantages, b.mask)
            if fn
            else gk.grpo_loss(hidden @ tied.t(), b.targets, b.advantages, b.mask)
        )
        grads.append(torch.autograd.grad(out.loss, tied)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_autocast_casts_as_linear_does():
    b, (h, w, _) = make_batch().to(torch.float32), tensors(torch.float32)
    h, w = h.requires_grad_(), w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = gk.linear_grpo_loss(h, w, b.targets, b.advantages, b.mask)
        out.loss.backward()
    cast = gk.linear_grpo_loss(h.detach().bfloat16(), w.detach().bfloat16(), b.targets, b.advantages, b.mask)
    assert torch.equal(out.loss, cast.loss) and h.grad.dtype == w.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        plain = gk.linear_token_logps(h.double(), w.double(), b.targets).logps
    assert plain.dtype == torch.float32


def test_many_rows_accumulate_in_float32():
    """A bf16 weight gradient over many chunks must not drift: the sum is rounded once."""
    torch.manual_seed(0)
    n, v, h = 4096, 64, 8
    hidden, weight = torch.randn(n, h).bfloat16(), (torch.randn(v, h) / 3).bfloat16()
    targets, adv = torch.randint(v, (n,)), torch.ones(n)

    def loss(dtype, chunk):
        w = weight.to(dtype).requires_grad_()
        out = gk.linear_grpo_loss(
            hidden.to(dtype), w, targets, adv, chunk_rows=chunk, config=gk.LossConfig(aggregation="token_sum")
        )
        return torch.autograd.grad(out.loss, w)[0].double()

    exact = loss(torch.float64, 4096)
    assert relative_l2(loss(torch.bfloat16, 16), exact) <= 1.5 * relative_l2(loss(torch.bfloat16, 4096), exact) + 2**-9


def test_products_added_by_the_matmul_itself(monkeypatch):
    """As on a GPU where torch has `out_dtype`: a stand-in must give the sums that the widened columns give here."""
    addmm, calls = torch.addmm, []

    def stand_in(total, a, b, out_dtype=None, out=None):
        if out_dtype is None:
            return addmm(total, a, b, out=out)
        calls.append(a.dtype)
        return out.copy_(total + a.to(out_dtype) @ b.to(out_dtype))

    b = make_batch().to(torch.bfloat16)
    values = [x.bfloat16().requires_grad_() for x in (torch.randn(5, 7, 8), torch.randn(133, 8), torch.randn(133))]

    def gradients():
        h, w, c = values
        loss = gk.linear_grpo_loss(h, w, b.targets, b.advantages.float(), b.mask, bias=c, chunk_rows=4).loss
        return torch.autograd.grad(loss, values)

    assert not linear_chunks.adds_in_float32(torch.device("cpu"), torch.bfloat16)
    widened = gradients()
    monkeypatch.setattr(torch, "addmm", stand_in)
    monkeypatch.setattr(linear_chunks, "adds_in_float32", lambda *_: True)
    for mine, theirs in zip(gradients(), widened, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert len(calls) > 1 and set(calls) == {torch.bfloat16}


def test_a_second_chunk_only_where_it_saves_memory():
    """A second chunk holds the weight's gradient in float32 in addition to the rounded one: as much as 2 H rows in half
    precision."""
    choose, half = linear_chunks.default_chunk_rows, torch.bfloat16
    budget = linear_chunks.CHUNK_BYTES // (151936 * 2)
    assert choose(151936, 896, half, False, budget + 1792, True) >= budget + 1792
    assert choose(151936, 896, half, False, budget + 1793, True) == budget
    assert choose(151936, 896, half, False, 1000, False) == budget  # nothing is summed
    assert choose(151936, 896, torch.float32, False, 1000, True) == budget // 2  # float32 sums need no second gradient
    assert choose(151936, 896, half, True, 10**6, True) == linear_chunks.GPU_CHUNK_BYTES // (151936 * 2)
    assert choose(2**40, 8, half, False, 10**6, True) == 1


R = 3  # the rank of LoRA's matrices


def lora_tensors(dtype):
    """Hidden states, weight, bias, A and B."""
    torch.manual_seed(1)
    return [*tensors(dtype), torch.randn(R, H).to(dtype) / 3, torch.randn(V, R).to(dtype)]


def with_lora(b, config, *, chunk_rows=4, single_pass=True, **options):
    def loss(h, w, c, lora_a, lora_b):
        return gk.linear_grpo_loss(
            h, w, b.targets, b.advantages, b.mask, bias=c, lora=(lora_a, lora_b, 0.7), chunk_rows=chunk_rows,
            single_pass=single_pass, config=config, **b.keywords(), **options,
        ).loss  # fmt: skip

    return loss


def merged(b, config, **options):
    def loss(h, w, c, lora_a, lora_b):
        return materialised(h, w + 0.7 * lora_b @ lora_a, c, b, config, **options)

    return loss


@pytest.mark.parametrize("single_pass", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
def test_lora(backend, dtype, single_pass):
    batch, config, values = make_batch(), gk.LossConfig(kl_coef=0.1, entropy_coef=0.05), lora_tensors(dtype)
    b, wide = batch.to(torch.float32 if dtype.itemsize == 2 else dtype), batch.to(torch.float64)

    def as_peft(h, w, c, lora_a, lora_b):  # the adapter's own two products, each in the model's dtype
        logits = torch.nn.functional.linear(h, w, c) + 0.7 * (h @ lora_a.t()) @ lora_b.t()
        keywords = {**b.keywords(), "config": config, "backend": "reference"}
        return gk.grpo_loss(logits, b.targets, b.advantages, b.mask, **keywords).loss

    everything = [True] * 5
    ours = run(with_lora(b, config, single_pass=single_pass, backend=backend), values, everything)
    eager = run(as_peft, values, everything)
    exact = run(merged(wide, config), [x.double() for x in values], everything)
    for name, x, y, z in zip(("loss", "hidden", "weight", "bias", "A", "B"), ours, eager, exact, strict=True):
        assert x.dtype == (dtype if name != "loss" else b.advantages.dtype)
        assert_as_accurate(x, y, z, what=name)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=5))[:-1], ids=str)
@pytest.mark.parametrize("single_pass", [True, False])
@pytest.mark.parametrize("chunk_rows", [4, None])
def test_frozen_parts_with_lora(needs, single_pass, chunk_rows):
    b, config, values = make_batch(), gk.LossConfig(), lora_tensors(torch.float64)
    everything = run(merged(b, config), values, [True] * 5)
    some = run(with_lora(b, config, single_pass=single_pass, chunk_rows=chunk_rows), values, needs)
    kept = [everything[0], *(g for g, need in zip(everything[1:], needs, strict=True) if need)]
    for a, c in zip(some, kept, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-13)


def test_lora_of_masked_rows_is_not_read(backend):
    b, values = make_batch(), lora_tensors(torch.float64)
    clean = run(with_lora(b, None, backend=backend), values, [True] * 5)
    values[0][b.mask == 0] = float("nan")
    for a, c in zip(run(with_lora(b, None, backend=backend), values, [True] * 5), clean, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-15)


def test_lora_under_autocast_and_compile():
    b, config = make_batch().to(torch.float32), gk.LossConfig(kl_coef=0.1)
    values = lora_tensors(torch.float32)
    loss = with_lora(b, config)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(loss, values, [True] * 5)
    by_hand = run(loss, [x.bfloat16() for x in values], [True] * 5)
    for a, c in zip(cast, by_hand, strict=True):
        torch.testing.assert_close(a, c.to(a.dtype), rtol=0, atol=0)
    for a, c in zip(
        run(torch.compile(loss, fullgraph=True), values, [True] * 5), run(loss, values, [True] * 5), strict=True
    ):
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "lora, error, message",
    [
        ("no", TypeError, r"lora must be \(A, B, scale\) or None; got str"),
        ((torch.zeros(R, H), torch.zeros(V, R)), TypeError, "got tuple"),
        ((torch.zeros(R, H + 1), torch.zeros(V, R), 1.0), ValueError, r"lora\[0\] must be A, \[r, 24\]; got"),
        ((torch.zeros(R, H), torch.zeros(V, R + 1), 1.0), ValueError, r"lora\[1\] must be B, \[133, 3\]; got"),
        ((torch.zeros(R, H), torch.zeros(R, V), 1.0), ValueError, r"lora\[1\] must be B"),
        ((torch.zeros(R, H).bfloat16(), torch.zeros(V, R), 1.0), TypeError, r"lora\[0\] must be torch.float32"),
        ((torch.zeros(R, H), None, 1.0), TypeError, r"lora\[1\] must be a tensor; got NoneType"),
        ((torch.zeros(R, H, device="meta"), torch.zeros(V, R), 1.0), ValueError, r"lora\[0\] must be where"),
        ((torch.zeros(R, H), torch.zeros(V, R), float("nan")), ValueError, r"lora\[2\] must be a finite number"),
        ((torch.zeros(R, H), torch.zeros(V, R), torch.ones(2)), ValueError, r"lora\[2\]"),
    ],
)
def test_lora_that_does_not_fit(lora, error, message):
    b, (h, w, _) = make_batch().to(torch.float32), tensors(torch.float32)
    with pytest.raises(error, match=message):
        gk.linear_token_logps(h, w, b.targets, lora=lora)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", ["number", "per token"])
def test_top1_and_mean_logits(backend, softcap, temperature, monkeypatch):
    monkeypatch.setattr(linear_chunks, "WIDENED_COLUMNS", 50)  # several blocks of columns
    b, (h, w, c) = make_batch(), tensors(torch.float64)
    per_token = 0.5 + torch.rand(b.targets.shape, dtype=torch.float64) if temperature == "per token" else 0.9
    logits = torch.nn.functional.linear(h, w, c)
    targets = torch.where(torch.rand(b.targets.shape) < 0.5, logits.argmax(-1), b.targets)
    mine = gk.linear_token_logps(
        h, w, targets, bias=c, mask=b.mask, temperature=per_token, logit_scale=1.3, softcap=softcap, chunk_rows=4,
        return_is_top1=True, return_mean_logits=True, backend=backend,
    )  # fmt: skip
    z = logits * 1.3
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (per_token[..., None] if temperature == "per token" else per_token)
    active = b.mask != 0
    assert mine.is_top1.dtype == torch.bool and not mine.mean_logits.requires_grad
    assert 0 < mine.is_top1.sum() < active.sum()
    torch.testing.assert_close(mine.is_top1, (z.argmax(-1) == targets) & active)
    torch.testing.assert_close(mine.mean_logits, torch.where(active, z.mean(-1), 0.0))
    assert mine.entropy is None and mine.sum_p2 is None


def test_of_equal_logits_the_first_is_top1(backend):
    weight = torch.tensor([[1.0], [2.0], [2.0]])
    found = gk.linear_token_logps(
        torch.ones(1, 3, 1), weight, torch.tensor([[0, 1, 2]]), return_is_top1=True, backend=backend
    )
    assert found.is_top1.tolist() == [[False, True, False]]
    assert found.mean_logits is None
