"""Edge cases: masked values are not read, empty inputs give exact zeros, errors name the offending value."""

import math

import pytest
import torch
from forms import FORMS, with_everything

import grpo_kernels as gk
from grpo_kernels.testing.inputs import make_batch

FULL = {"delta": 1.6, "dual_clip": 1.4, "kl_coef": 0.1, "entropy_coef": 0.05}
POISON = [math.nan, math.inf, -math.inf]


def both_paths(batch, config, **options):
    """grpo_loss on the logits, and linear_grpo_loss with the logits as hidden states and the identity as lm_head."""
    eye = torch.eye(batch.logits.shape[-1], dtype=batch.logits.dtype)
    yield lambda x, **kw: gk.grpo_loss(x, batch.targets, config=config, **{**options, **kw})
    yield lambda x, **kw: gk.linear_grpo_loss(x, eye, batch.targets, config=config, chunk_rows=4, **{**options, **kw})


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("single_pass", [True, False])
def test_masked_tokens_are_not_read(backend, form, single_pass):
    b = make_batch(4, 4, 37) if backend == "triton" else make_batch()
    config = gk.LossConfig(**with_everything(form))
    targets = b.targets.masked_fill(~b.mask, -7)  # illegal, but masked
    poisoned = {k: torch.where(b.mask, v, POISON[i % 3]) for i, (k, v) in enumerate(b.keywords().items())}
    logits = torch.where(b.mask[..., None], b.logits, math.nan)
    for clean, dirty in zip(both_paths(b, config), both_paths(b._replace(targets=targets), config), strict=True):
        x, y = b.logits.clone().requires_grad_(), logits.clone().requires_grad_()
        options = {"mask": b.mask, "advantages": b.advantages, "backend": backend, "single_pass": single_pass}
        one, two = clean(x, **options, **b.keywords()), dirty(y, **options, **poisoned)
        (gx,), (gy,) = torch.autograd.grad(one.loss, x), torch.autograd.grad(two.loss, y)
        assert torch.equal(one.loss, two.loss) and torch.equal(gx, gy)
        assert (gy[~b.mask] == 0).all() and (two.logps[~b.mask] == 0).all() and (two.per_token_loss[~b.mask] == 0).all()
        assert all(v.isfinite() for v in two.metrics.values())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype(dtype):
    b = make_batch()
    mask = (b.mask * 2).to(dtype)  # any non-zero is 1
    assert torch.equal(
        gk.grpo_loss(b.logits, b.targets, b.advantages, mask).loss,
        gk.grpo_loss(b.logits, b.targets, b.advantages, b.mask).loss,
    )


def test_ignore_index_is_masked():
    b = make_batch()
    marked = b.targets.masked_fill(~b.mask, -100)
    config = gk.LossConfig(aggregation="sequence_mean")
    a = gk.grpo_loss(b.logits, marked, b.advantages, config=config, old_logps=b.old_logps)
    c = gk.grpo_loss(b.logits, b.targets, b.advantages, b.mask, config=config, old_logps=b.old_logps)
    assert torch.equal(a.loss, c.loss) and a.metrics["tokens"] == b.mask.sum()
    assert torch.equal(
        gk.token_logps(b.logits, marked, ignore_index=-100).logps,
        torch.where(b.mask, gk.token_logps(b.logits, b.targets).logps, 0.0),
    )


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0), (0, 0)])
def test_nothing_active_is_exactly_zero(backend, form, shape):
    config = gk.LossConfig(**with_everything(form), aggregation="sequence_mean")
    targets = torch.zeros(shape, dtype=torch.int64)
    keywords = {
        "mask": torch.zeros(shape),
        "old_logps": torch.zeros(shape),
        "ref_logps": torch.zeros(shape),
        "rollout_logps": torch.zeros(shape),
        "backend": backend,
    }
    b = make_batch()._replace(targets=targets)
    for loss in both_paths(b, config):
        x = torch.randn(*shape, 133, dtype=torch.float64, requires_grad=True)
        out = loss(x, advantages=torch.ones(shape[0]), **keywords)
        out.loss.backward()
        assert out.loss == 0 and x.grad.shape == x.shape and (x.grad == 0).all()
        assert all(v.isfinite() for v in out.metrics.values())


def test_an_empty_batch_may_have_any_strides(backend):
    """torch.tensor of an empty numpy array has strides of 0."""
    x = torch.empty_strided((0, 33), (0, 0)).requires_grad_()
    out = gk.grpo_loss(x, torch.zeros(0, dtype=torch.int64), torch.zeros(0), backend=backend)
    out.loss.backward()
    assert out.loss == 0 and x.grad.shape == (0, 33)


def test_zero_length_sequence_among_packed(backend):
    b = make_batch(sequences=1, tokens=6)
    config = gk.LossConfig(ratio_level="sequence", aggregation="sequence_mean")
    cu = torch.tensor([0, 2, 2, 6])
    out = gk.grpo_loss(
        b.logits[0],
        b.targets[0],
        torch.ones(3),
        old_logps=b.old_logps[0],
        cu_seqlens=cu,
        config=config,
        backend=backend,
    )
    assert out.loss.isfinite()
    assert (
        gk.policy_loss(
            torch.zeros(0), torch.zeros(0), cu_seqlens=torch.tensor([0]), config=config, backend=backend
        ).loss
        == 0
    )


def test_illegal_target(backend):
    b = make_batch(vocab=20)
    for bad in (20, -3, 10**12):
        targets = b.targets.clone()
        targets[0, 2] = bad
        for loss in both_paths(b._replace(targets=targets), gk.LossConfig()):
            with pytest.raises(ValueError, match=rf"target {bad} at position \(0, 2\)"):
                loss(b.logits, advantages=b.advantages, backend=backend)
        x = (b.logits.requires_grad_() * 1).detach().requires_grad_() * 1
        before = x.detach().clone()
        with pytest.raises(ValueError, match="outside the vocabulary of 20"):
            gk.grpo_loss(x, targets, b.advantages, inplace=True)
        assert torch.equal(x, before)  # refused before anything was written


def test_nan_stays_in_its_row(backend):
    b = make_batch()
    logits = b.logits.clone()
    logits[0, 0, 3] = math.nan
    for dirty, clean in zip(
        both_paths(b, gk.LossConfig(), old_logps=b.old_logps),
        both_paths(b, gk.LossConfig(), old_logps=b.old_logps),
        strict=True,
    ):
        x, y = logits.clone().requires_grad_(), b.logits.clone().requires_grad_()
        out, good = (f(v, mask=b.mask, advantages=b.advantages, backend=backend) for f, v in ((dirty, x), (clean, y)))
        assert out.loss.isnan() and out.logps[0, 0].isnan() and out.logps.isnan().sum() == 1
        (gx,), (gy,) = torch.autograd.grad(out.loss, x), torch.autograd.grad(good.loss, y)
        assert gx[0, 0].isnan().all()
        rest = torch.ones(5, 7, dtype=torch.bool)
        rest[0, 0] = False
        assert torch.equal(gx[rest], gy[rest])


def rows_at_the_lowest_number(vocab, dtype):
    """Columns at finfo.min: all but the target and one, all, some with -inf, the first half; and the targets."""
    g = torch.Generator().manual_seed(vocab)
    lowest, z = torch.finfo(dtype).min, torch.randn(1, 4, vocab, generator=g).to(dtype)
    z[0, 0, 1:-1] = lowest
    z[0, 1] = lowest
    z[0, 2] = torch.where(torch.rand(vocab, generator=g) < 0.8, lowest, z[0, 2])
    z[0, 2] = torch.where(torch.rand(vocab, generator=g) < 0.4, -math.inf, z[0, 2])
    z[0, 3, : vocab // 2] = lowest
    z[0, 2, -1] = 1.0
    return z, torch.tensor([[0, vocab // 2, vocab - 1, vocab - 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.5])  # below 1 the quotient overflows
def test_columns_at_the_lowest_number_are_columns_without_probability(backend, dtype, temperature):
    for vocab in (2, 3, 300, 5003) if backend == "emulated" else (2, 300):
        z, targets = rows_at_the_lowest_number(vocab, dtype)
        results = []
        for x, name in ((z, backend), (z.double().clamp(min=-1e300), "reference")):
            x.requires_grad_()
            keywords = {"temperature": temperature, "return_entropy": True, "return_sum_p2": True}
            out = gk.token_logps(x, targets, backend=name, **keywords)
            weights = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=out.logps.dtype)
            (gradient,) = torch.autograd.grad((out.logps * weights - 0.3 * out.entropy).sum(), x)
            results.append([v.detach().double() for v in (out.logps, out.entropy, out.sum_p2, gradient)])
        precise = dtype == torch.float32
        for got, exact in zip(*results, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-5 if precise else 1e-2, atol=1e-5 if precise else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inplace(dtype):
    b, config = make_batch(), gk.LossConfig(**FULL)
    leaf = torch.cat([b.logits, b.logits[:, :1]], 1).to(dtype).requires_grad_()  # one position more
    args, keywords = (b.targets, b.advantages, b.mask), {**b.keywords(), "config": config}
    (expected,) = torch.autograd.grad(gk.grpo_loss(leaf, *args, **keywords).loss, leaf)
    logits = leaf * 1
    loss = gk.grpo_loss(logits, *args, inplace=True, **keywords).loss
    assert torch.equal(logits.detach(), expected)  # the logits are their gradient now
    (g,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(g, expected)
    with pytest.raises(RuntimeError, match="propagated once"):
        torch.autograd.grad(loss, leaf)


def test_inplace_refuses_what_would_be_wrong():
    b = make_batch()
    leaf = b.logits.clone().requires_grad_()
    for bad in (leaf, leaf[1:]):
        for single_pass in (True, False):
            with pytest.raises(ValueError, match="leaf"):
                gk.grpo_loss(
                    bad, b.targets[: len(bad)], b.advantages[: len(bad)], inplace=True, single_pass=single_pass
                )
    logits = leaf * 1
    other = logits.square().sum()  # another node that saved the logits
    loss = gk.grpo_loss(logits, b.targets, b.advantages, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_inplace_without_grad_writes_nothing():
    b = make_batch()
    before = b.logits.clone()
    with torch.no_grad():
        gk.grpo_loss(b.logits.requires_grad_(), b.targets, b.advantages, inplace=True)
    gk.grpo_loss(b.logits.detach(), b.targets, b.advantages, inplace=True)
    with torch.inference_mode():
        gk.grpo_loss(before.clone(), b.targets, b.advantages, inplace=True)
    assert torch.equal(b.logits, before)


def test_out_of_place_allows_two_backwards():
    b = make_batch()
    x = b.logits.clone().requires_grad_()
    loss = gk.grpo_loss(x, b.targets, b.advantages, b.mask).loss
    first, second = (torch.autograd.grad(loss * s, x, retain_graph=True)[0] for s in (1.0, 2.0))
    assert torch.equal(2 * first, second)


def test_large_offsets():
    """More than 2^31 logits without the memory for them: all rows are expanded from one."""
    row = torch.randn(1, 1, 40_000)
    logits = row.expand(1, 70_000, 40_000)  # T > 65,535 and 2.8e9 elements
    mask = torch.zeros(1, 70_000, dtype=torch.bool)
    mask[0, [0, 65_537, 69_999]] = True
    targets = torch.full((1, 70_000), 17)
    out = gk.token_logps(logits, targets, mask=mask).logps
    expected = gk.token_logps(row, targets[:, :1]).logps[0, 0]
    assert torch.equal(out[mask], expected.expand(3)) and (out[~mask] == 0).all()


@pytest.mark.slow
def test_large_memory_offsets():
    """The same with memory behind every row: the last of 2.2e9 bf16 logits is read, and its gradient written."""
    logits = torch.empty(55_000, 40_000, dtype=torch.bfloat16)
    logits[-1] = torch.randn(40_000)
    mask, targets = torch.zeros(55_000), torch.full((55_000,), 5)
    mask[-1] = 1
    x = logits[-1:].clone().requires_grad_()
    (expected,) = torch.autograd.grad(gk.grpo_loss(x, targets[-1:], torch.ones(1)).loss, x)
    big = logits.requires_grad_()[...]
    with torch.no_grad():
        out = gk.token_logps(logits, targets, mask=mask)
    assert out.logps[-1] == gk.token_logps(x.detach(), targets[-1:]).logps[0]
    gradient = torch.autograd.grad(gk.grpo_loss(big, targets, torch.ones(55_000), mask).loss, big)[0]
    assert torch.equal(gradient[-1:], expected) and (gradient[0] == 0).all()


L, T = torch.randn(3, 5, 11), torch.zeros(3, 5, dtype=torch.int64)
WRONG = {
    "targets shape": (lambda: gk.token_logps(L, T[:, :3]), ValueError, r"\(3, 3\).*\(3, 5, 11\)"),
    "targets dtype": (lambda: gk.token_logps(L, T.float()), TypeError, "integers.*float32"),
    "logits dtype": (lambda: gk.token_logps(L.int(), T), TypeError, "float32.*got torch.int32"),
    "logits layout": (lambda: gk.token_logps(L.transpose(1, 2).contiguous().transpose(1, 2), T), ValueError, "dense in the vocabulary"),
    "no vocabulary": (lambda: gk.token_logps(L[..., :0], T), ValueError, "empty last dimension"),
    "mask shape": (lambda: gk.token_logps(L, T, mask=T[0]), ValueError, r"mask.*\(3, 5\).*\(5,\)"),
    "temperature": (lambda: gk.token_logps(L, T, temperature=0.0), ValueError, "temperature.*above 0.*0.0"),
    "temperature shape": (lambda: gk.token_logps(L, T, temperature=torch.ones(4)), ValueError, r"temperature.*\(4,\)"),
    "softcap": (lambda: gk.token_logps(L, T, softcap=-1.0), ValueError, "softcap.*-1.0"),
    "logit_scale": (lambda: gk.token_logps(L, T, logit_scale=math.nan), ValueError, "logit_scale.*nan"),
    "backend": (lambda: gk.token_logps(L, T, backend="cudnn"), ValueError, "'cpu'.*got 'cudnn'"),
    "missing backend": (lambda: gk.token_logps(L, T, backend="cuda"), RuntimeError, "'cuda' is not here"),
    "tp_group": (lambda: gk.token_logps(L, T, tp_group=object()), NotImplementedError, "tp_group"),
    "advantages shape": (lambda: gk.grpo_loss(L, T, torch.ones(4)), ValueError, r"advantages.*\(3, 5\) or \(3,\).*\(4,\)"),
    "no advantages": (lambda: gk.grpo_loss(L, T), ValueError, "either advantages or rewards"),
    "both": (lambda: gk.grpo_loss(L, T, torch.ones(3), rewards=torch.ones(3), group_size=3), ValueError, "either"),
    "group_size alone": (lambda: gk.grpo_loss(L, T, torch.ones(3), group_size=3), ValueError, "group_size must be None with advantages.*; got 3"),
    "old shape": (lambda: gk.grpo_loss(L, T, torch.ones(3), old_logps=torch.ones(3)), ValueError, "old_logps"),
    "no ref": (lambda: gk.grpo_loss(L, T, torch.ones(3), config=gk.LossConfig(kl_coef=0.1)), ValueError, "ref_logps.*None"),
    "no rollout": (
        lambda: gk.grpo_loss(L, T, torch.ones(3), ref_logps=L[..., 0], config=gk.LossConfig(kl_coef=0.1, kl_gradient="behaviour_weighted")),
        ValueError, "rollout_logps.*None",
    ),
    "no entropy": (lambda: gk.policy_loss(L[..., 0], torch.ones(3), config=gk.LossConfig(entropy_coef=0.1)), ValueError, "entropy.*None"),
    "no max_length": (lambda: gk.grpo_loss(L, T, torch.ones(3), config=gk.LossConfig(aggregation="fixed_length")), ValueError, "max_length"),
    "flat gmpo": (lambda: gk.grpo_loss(L[0], T[0], torch.ones(5), config=gk.LossConfig(objective="gmpo")), ValueError, "gmpo.*cu_seqlens"),
    "ipo without rollout": (lambda: gk.grpo_loss(L, T, torch.ones(3), config=gk.LossConfig(objective="ipo")), ValueError, "rollout_logps; got None"),
    "flat sequences": (lambda: gk.grpo_loss(L[0], T[0], torch.ones(5), config=gk.LossConfig(ratio_level="sequence")), ValueError, "cu_seqlens"),
    "flat aggregation": (lambda: gk.grpo_loss(L[0], T[0], torch.ones(5), config=gk.LossConfig(aggregation="sequence_mean")), ValueError, "cu_seqlens"),
    "flat advantages": (lambda: gk.grpo_loss(L[0], T[0], torch.ones(2)), ValueError, "need cu_seqlens"),
    "padded cu_seqlens": (lambda: gk.grpo_loss(L, T, torch.ones(3), cu_seqlens=torch.tensor([0, 5])), ValueError, "flat"),
    "cu_seqlens dtype": (lambda: gk.grpo_loss(L[0], T[0], torch.ones(1), cu_seqlens=torch.tensor([0.0, 5.0])), TypeError, "int32 or int64"),
    "cu_seqlens order": (lambda: gk.grpo_loss(L[0], T[0], torch.ones(2), cu_seqlens=torch.tensor([0, 4, 3])), ValueError, r"rise.*\[0, 4, 3\]"),
    "cu_seqlens past": (lambda: gk.grpo_loss(L[0], T[0], torch.ones(1), cu_seqlens=torch.tensor([0, 6])), ValueError, "at most the 5"),
    "sequence_weights": (lambda: gk.grpo_loss(L, T, torch.ones(3), sequence_weights=torch.ones(2)), ValueError, r"sequence_weights.*\(3,\).*\(2,\)"),
    "weight shape": (lambda: gk.linear_token_logps(L, torch.ones(4, 10), T), ValueError, r"weight.*\[V, 11\].*\(4, 10\)"),
    "weight dtype": (lambda: gk.linear_token_logps(L, torch.ones(4, 11).double(), T), TypeError, "weight must be torch.float32.*float64"),
    "bias shape": (lambda: gk.linear_token_logps(L, torch.ones(4, 11), T, bias=torch.ones(3)), ValueError, r"bias must be \[4\]"),
    "chunk_rows": (lambda: gk.linear_token_logps(L, torch.ones(4, 11), T, chunk_rows=0), ValueError, "chunk_rows.*0"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", WRONG.values(), ids=WRONG.keys())
def test_user_errors_name_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
