"""policy_loss and grpo_loss: every form against the reference in float64, single pass against two, packed against padded."""

import itertools
import math

import pytest
import torch
from conftest import DTYPES, KERNELS_HERE, NO_FLOAT64, dtype_name
from forms import FORMS, OBJECTIVES, with_everything

import grpo_kernels as gk
from grpo_kernels.config import AGGREGATIONS, KL_ESTIMATORS, KL_GRADIENTS, METRICS, RATIO_LEVELS
from grpo_kernels.inputs.layout import acc_dtype
from grpo_kernels.testing.compare import assert_as_accurate, relative_l2
from grpo_kernels.testing.inputs import make_batch

FULL = {"delta": 1.6, "dual_clip": 1.4, "eps_high": 0.28, "kl_coef": 0.1, "entropy_coef": 0.05}
CONFIGS = {
    **{name: {**options, "kl_coef": 0.1, "entropy_coef": 0.05} for name, options in OBJECTIVES.items()},
    **{
        f"{name}-{agg}": {**OBJECTIVES[name], "aggregation": agg}
        for name, agg in itertools.product(("gmpo", "vespo", "ipo"), AGGREGATIONS)
    },
    **{
        f"{name}-{gradient}": {**options, "kl_coef": 0.1, "kl_gradient": gradient}
        for (name, options), gradient in itertools.product(OBJECTIVES.items(), KL_GRADIENTS)
    },
    **{
        f"{name}-{level}": {**OBJECTIVES[name], "ratio_level": level, "kl_coef": 0.1, "kl_gradient": "importance_weighted"}
        for name, level in itertools.product(("cispo", "sapo"), RATIO_LEVELS)
    },
    **{f"{name}-clamped": {**options, "log_ratio_clamp": 0.2} for name, options in OBJECTIVES.items() if name != "reinforce"},
    **{f"{level}-{agg}": {"ratio_level": level, "aggregation": agg} for level, agg in itertools.product(RATIO_LEVELS, AGGREGATIONS)},
    **{
        f"{level}-{kl}-{gradient}": {"ratio_level": level, "kl_coef": 0.1, "kl_estimator": kl, "kl_gradient": gradient}
        for level, kl, gradient in itertools.product(RATIO_LEVELS, KL_ESTIMATORS[1:], KL_GRADIENTS)
    },
    **{f"{level}-full": {"ratio_level": level, **FULL} for level in RATIO_LEVELS},
    "clamps": {"log_ratio_clamp": 0.2, "kl_coef": 0.1, "kl_input_clamp": 0.3, "kl_output_clamp": 0.03},
    "clamps-straight": {"kl_coef": 0.1, "kl_gradient": "straight_through", "kl_input_clamp": 0.3, "kl_output_clamp": 0.03},
    "clamps-sequence": {"ratio_level": "sequence", "log_ratio_clamp": 0.2, "sequence_log_ratio_max": 0.05},
    "clamps-sequence_token": {"ratio_level": "sequence_token", "sequence_log_ratio_max": 0.05},
    "entropy-own": {"entropy_coef": 0.1, "entropy_aggregation": "sequence_mean", "entropy_mask_bonus": True},
    "non-empty": {"aggregation": "sequence_mean", "count_empty_sequences": False},
}  # fmt: skip


def config_of(options):
    extra = {"max_length": 9} if options.get("aggregation") == "fixed_length" else {}
    return gk.LossConfig(**options, **extra)


def run(batch, config, dtype, backend, logits_of=lambda x: x, **options):
    """Loss, per-token terms, metrics and the gradient in the logits."""
    b = batch.to(dtype)
    x = b.logits.clone().requires_grad_()
    out = gk.grpo_loss(
        logits_of(x), b.targets, b.advantages, b.mask, config=config, backend=backend, **b.keywords(), **options
    )
    (g,) = torch.autograd.grad(out.loss, x)
    return out.loss.detach(), out.per_token_loss, torch.stack(list(out.metrics.values())), g


def compare(batch, config, dtype, backend, what="", **options):
    mine = run(batch, config, dtype, backend, **options)
    eager = run(batch, config, dtype, "reference", **options)
    exact = run(batch.to(dtype).to(torch.float64), config, torch.float64, "reference", **options)
    for name, a, b, c in zip(("loss", "per token", "metrics", "gradient"), mine, eager, exact, strict=True):
        assert_as_accurate(a, b, c, what=f"{what} {name}")
    assert relative_l2(mine[3], exact[3]) <= 2 * relative_l2(eager[3], exact[3]) + 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_every_form(backend, name):
    slow = backend in ("triton", "emulated")  # an interpreter; one coroutine per thread
    batch = make_batch(sequences=4, tokens=4) if slow else make_batch()
    if backend == "triton":  # float64 is the same code in another type
        dtypes = (torch.float32, torch.float64) if name in OBJECTIVES or name.endswith("-full") else (torch.float32,)
    else:
        dtypes = (torch.float32,) if backend in NO_FLOAT64 else (torch.float64, torch.float32)
    for dtype in dtypes:
        compare(batch, config_of(CONFIGS[name]), dtype, backend, temperature=0.8)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_dtypes_and_instruction_sets(instruction_set, dtype, level):
    batch = make_batch(vocab=1031)
    compare(batch, gk.LossConfig(ratio_level=level, **FULL), dtype, "cpu", what=f"{instruction_set} {dtype}")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_single_pass_is_two_passes_bitwise(instruction_set, dtype, inplace):
    batch, config = make_batch(vocab=5003), gk.LossConfig(**FULL)
    two = run(batch, config, dtype, "cpu", single_pass=False)
    one = run(batch, config, dtype, "cpu", logits_of=lambda x: x * 1, inplace=inplace)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("g", [0.5, 0.0, 3.0, 1.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_gradient_is_scale(backend, inplace, g):
    b = make_batch(tokens=4)
    x = torch.nn.functional.pad(b.logits, (0, 0, 0, 1)).requires_grad_()  # [B, T + 1, V], of which T positions are used
    options = {"config": gk.LossConfig(**FULL), "inplace": inplace, "backend": backend, **b.keywords()}

    def loss(scale):
        return gk.grpo_loss(x * 1, b.targets, b.advantages, b.mask, scale=scale, **options).loss

    (a,) = torch.autograd.grad(loss(1.0) * g, x)
    (c,) = torch.autograd.grad(loss(g), x)
    torch.testing.assert_close(a, c, rtol=1e-12, atol=0)
    assert not a[:, -1].any()


@pytest.mark.parametrize("linear", [False, True])
def test_several_backwards_of_one_loss(backend, linear):
    """While the graph is kept, no backward may overwrite what the next one needs."""
    b = make_batch(sequences=3, tokens=4, vocab=50)
    values = [b.logits.clone().requires_grad_()]
    if linear:
        values = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4, 8), (50, 8), (50,))]
        out = gk.linear_grpo_loss(*values[:2], b.targets, b.advantages, b.mask, bias=values[2], backend=backend)
    else:
        out = gk.grpo_loss(values[0] * 1, b.targets, b.advantages, b.mask, backend=backend)
    grads = []
    for g, keep in ((0.0, True), (3.0, True), (1.0, True), (0.5, False)):
        grads.append(torch.autograd.grad(out.loss, values, torch.tensor(g, dtype=torch.float64), retain_graph=keep))
    for zero, three, one, half in zip(*grads, strict=True):
        assert one.any() and not zero.any() and torch.equal(half, one / 2)
        torch.testing.assert_close(three, one * 3, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_scale_over_several_blocks(backend, dtype):
    from grpo_kernels.backends import implementation

    if dtype == torch.float64 and backend in NO_FLOAT64:
        pytest.skip("no float64")
    factor = torch.tensor(1 / 3, dtype=acc_dtype(dtype))
    full = torch.randn(3, 3, 9001).to(dtype)
    rest = full[:, 2].clone()
    for view in (full[:, :2], full[0, :2].clone().view(1, 1, -1), full[1, 1].clone().view(1, 1, -1)):
        expected = view * factor
        implementation(backend).scale(view, factor)
        assert torch.equal(view, expected)
    assert torch.equal(full[:, 2], rest)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.soak_where(
    lambda backend, form, aggregation: backend == "triton" and aggregation != "token_mean" and form != FORMS["sequence"]
)
def test_packed_is_padded(backend, form, aggregation):
    """Python computes an aggregation's weights, so Triton's interpreter runs all of them for one ratio level only."""
    b = make_batch(sequences=6, vocab=17)
    config = config_of({**with_everything(form), "aggregation": aggregation})
    valid = torch.arange(7) < torch.tensor([7, 6, 4, 5, 0, 2])[:, None]
    b = b._replace(mask=b.mask & valid)
    cu_seqlens = torch.nn.functional.pad(valid.sum(-1).cumsum(0), (1, 0)).to(torch.int32)
    weights = torch.rand(6, dtype=torch.float64)
    padded = gk.grpo_loss(
        b.logits,
        b.targets,
        b.advantages,
        b.mask,
        config=config,
        sequence_weights=weights,
        backend=backend,
        **b.keywords(),
    )
    rest = {k: v[valid] for k, v in b.keywords().items()}
    x = b.logits[valid].requires_grad_()
    packed = gk.grpo_loss(
        x,
        b.targets[valid],
        b.advantages,
        b.mask[valid],
        config=config,
        sequence_weights=weights,
        cu_seqlens=cu_seqlens,
        backend=backend,
        **rest,
    )
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(packed.per_token_loss, padded.per_token_loss[valid], rtol=1e-12, atol=1e-14)
    for name, value in padded.metrics.items():
        torch.testing.assert_close(packed.metrics[name], value, rtol=1e-12, atol=1e-14, msg=name)
    y = b.logits.clone().requires_grad_()
    again = gk.grpo_loss(
        y, b.targets, b.advantages, b.mask, config=config, sequence_weights=weights, backend=backend, **b.keywords()
    )
    (gx,), (gy,) = torch.autograd.grad(packed.loss, x), torch.autograd.grad(again.loss, y)
    torch.testing.assert_close(gx, gy[valid], rtol=1e-12, atol=1e-14)


def test_tokens_past_the_last_boundary_are_masked(backend):
    b = make_batch(sequences=1, tokens=10)
    x = b.logits[0].requires_grad_()
    cu = torch.tensor([0, 3, 6])
    config = gk.LossConfig(ratio_level="sequence", aggregation="sequence_mean")
    out = gk.grpo_loss(
        x, b.targets[0], torch.ones(2), old_logps=b.old_logps[0], cu_seqlens=cu, config=config, backend=backend
    )
    (g,) = torch.autograd.grad(out.loss, x)
    assert (g[6:] == 0).all() and (g[:6] != 0).any() and (out.per_token_loss[6:] == 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_by_hand(backend, aggregation):
    b = make_batch()
    terms = gk.policy_loss(b.old_logps, b.advantages, b.mask, config=gk.LossConfig(), backend=backend).per_token_loss
    n = b.mask.sum(-1).clamp(min=1)
    w = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    rows = terms.sum(-1) * w
    expected = {
        "token_mean": rows.sum() / b.mask.sum(),
        "token_sum": rows.sum(),
        "sequence_mean": (rows / n).sum() / 5,
        "sequence_sum": rows.sum() / 5,
        "fixed_length": rows.sum() / (5 * 9),
    }[aggregation]
    config = config_of({"aggregation": aggregation})
    own = gk.policy_loss(b.old_logps, b.advantages, b.mask, config=config, sequence_weights=w, backend=backend)
    torch.testing.assert_close(own.loss, expected, rtol=1e-12, atol=0)
    given = gk.policy_loss(
        b.old_logps,
        b.advantages,
        b.mask,
        config=config,
        sequence_weights=w,
        denominator=torch.tensor(7),
        scale=0.25,
        backend=backend,
    )
    unnormalised = (rows / n if aggregation == "sequence_mean" else rows).sum()
    torch.testing.assert_close(given.loss, unnormalised * 0.25 / 7, rtol=1e-12, atol=0)


def test_accumulating_with_a_denominator_is_the_whole_batch():
    b, config = make_batch(sequences=6), gk.LossConfig(**FULL)
    full = gk.grpo_loss(b.logits, b.targets, b.advantages, b.mask, config=config, **b.keywords()).loss
    total = 0.0
    for part in (slice(0, 2), slice(2, 6)):
        rest = {k: v[part] for k, v in b.keywords().items()}
        total += gk.grpo_loss(
            b.logits[part],
            b.targets[part],
            b.advantages[part],
            b.mask[part],
            config=config,
            denominator=b.mask.sum(),
            **rest,
        ).loss
    torch.testing.assert_close(total, full, rtol=1e-12, atol=0)


def test_boundaries_of_the_clip(backend):
    """Ratios exactly at, just inside and just outside each bound, with both signs of A: the gradient is -A r or 0."""
    bounds = [0.8, 1.2, 2.5, 4.0]
    ratios = torch.tensor([r * f for r in bounds for f in (1 - 1e-9, 1.0, 1 + 1e-9)] + [1.0], dtype=torch.float64)
    config = gk.LossConfig(delta=2.5, dual_clip=4.0)
    for a in (-1.5, 0.0, 1.5):
        x = ratios.log().requires_grad_()
        r = x.detach().exp()
        out = gk.policy_loss(x, torch.full_like(r, a), old_logps=torch.zeros_like(r), config=config, backend=backend)
        (g,) = torch.autograd.grad(out.loss * len(r), x)
        passes = r <= 1.2 if a > 0 else (r >= 0.8) & (r <= 2.5)
        torch.testing.assert_close(g, torch.where(passes, -a * r, 0.0), rtol=1e-12, atol=0)


# The other objectives multiply by a weight without gradient: their gradient is not the derivative of their value.
DIFFERENTIABLE = ("token", "sequence", "sequence_product", "sapo", "gmpo", "tv_mask", "ipo", "dro")


@pytest.mark.parametrize("form", DIFFERENTIABLE)
def test_gradcheck(backend, form):
    b, config = make_batch(sequences=3, tokens=4, vocab=9), gk.LossConfig(**with_everything(FORMS[form]))
    keywords = {**b.keywords(), "mask": b.mask, "config": config, "backend": backend}

    def loss(x):
        return gk.grpo_loss(x, b.targets, b.advantages, **keywords).loss

    fast = backend == "triton"  # one direction: the interpreter needs a minute for all
    assert torch.autograd.gradcheck(loss, b.logits.requires_grad_(), fast_mode=fast)


def test_policy_loss_gradients_in_logps_and_entropy(backend):
    b, config = make_batch(), gk.LossConfig(**FULL)
    outs = []
    for name in (backend, "reference"):
        lp, h = (b.old_logps + 0.1).requires_grad_(), torch.rand_like(b.old_logps).fill_(0.7).requires_grad_()
        out = gk.policy_loss(
            lp, b.advantages, b.mask, entropy=h, config=config, backend=name, return_entropy=True, **b.keywords()
        )
        outs.append((out.loss.detach(), out.entropy, *torch.autograd.grad(out.loss, (lp, h))))
    for a, c in zip(*outs, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)


def test_on_policy_is_a_ratio_of_one(backend):
    b = make_batch()
    x = b.logits.clone().requires_grad_()
    out = gk.grpo_loss(x, b.targets, b.advantages, b.mask, backend=backend)
    assert out.metrics["ratio_min"] == out.metrics["ratio_max"] == 1 and out.metrics["approx_kl"] == 0
    torch.testing.assert_close(out.per_token_loss, torch.where(b.mask, -b.advantages[:, None], 0.0), rtol=1e-12, atol=0)
    assert torch.autograd.grad(out.loss, x)[0].abs().max() > 0


@pytest.mark.parametrize("scale", ["group", "none", "mean", "batch"])
def test_rewards_instead_of_advantages(backend, scale):
    b = make_batch(sequences=6)
    rewards = torch.tensor([1.0, 0.0, 0.25, 1.0, 3.0, 1.0], dtype=torch.float64)
    a = gk.group_advantages(rewards, group_size=3, scale=scale, backend=backend).advantages
    for fn, first in (
        (gk.grpo_loss, (b.logits,)),
        (gk.linear_grpo_loss, (b.logits, torch.eye(133, dtype=torch.float64))),
    ):
        mine = fn(*first, b.targets, mask=b.mask, rewards=rewards, group_size=3, advantage_scale=scale, backend=backend)
        assert torch.equal(mine.loss, fn(*first, b.targets, a, b.mask, backend=backend).loss)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_rewards_of_all_kinds_of_groups(backend, level, scale, dtype):
    """The bits of advantages from a separate launch: groups of one, of all samples, constant, with a NaN, strided."""
    config, nan = gk.LossConfig(ratio_level=level, aggregation="sequence_mean"), math.nan
    b = make_batch(sequences=12, tokens=3, vocab=50).to(dtype)
    rewards = torch.tensor([0.1, 0.1, 0.1, nan, 1e4, 1e4 + 1, nan, nan, -2, 0.3, nan, 7]).to(dtype)
    strided = rewards.repeat_interleave(2)[::2]
    for size in (1, 4, 12):
        a = gk.group_advantages(rewards, group_size=size, scale=scale, backend=backend).advantages
        assert a.isfinite().all() and (size == 1 or a.any())
        results = []
        for given in ({"advantages": a}, {"rewards": strided, "group_size": size, "advantage_scale": scale}):
            x = b.logits.clone().requires_grad_()
            options = {"mask": b.mask, "old_logps": b.old_logps, "config": config, "backend": backend}
            out = gk.grpo_loss(x, b.targets, **given, **options)
            results.append((out.loss.detach(), out.per_token_loss, *torch.autograd.grad(out.loss, x)))
        assert all(map(torch.equal, *results))


def test_rewards_need_no_separate_launch_on_a_gpu(monkeypatch):
    from grpo_kernels.backends import fuses_group_advantages, implementation

    b = make_batch(sequences=6, tokens=3, vocab=50)
    for name in filter(fuses_group_advantages, KERNELS_HERE):
        with monkeypatch.context() as m:
            m.setattr(implementation(name), "group_advantages", None)
            gk.grpo_loss(b.logits, b.targets, mask=b.mask, rewards=b.advantages, group_size=3, backend=name)


def test_rewards_are_checked(backend):
    b = make_batch(sequences=6, tokens=3, vocab=50)
    for options, message in (
        ({"rewards": b.advantages, "group_size": 4}, "divide the 6 samples; got 4"),
        ({"rewards": b.advantages}, "exactly one of group_size and group_ids"),
        ({"rewards": b.advantages[:4], "group_size": 2}, r"rewards must have shape \(6,\); got \(4,\)"),
        ({"rewards": b.advantages, "group_size": 3, "advantage_eps": -1.0}, "eps must be a finite number"),
        ({"rewards": b.advantages, "group_size": 3, "advantage_scale": "std"}, "scale must be one of"),
        ({"rewards": b.advantages, "group_size": 3, "advantage_scale": "none", "advantage_eps": 1.0}, "eps must be"),
        ({"rewards": b.advantages, "group_size": 3, "advantages": b.advantages}, "either advantages or rewards"),
        ({}, "either advantages or rewards"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.grpo_loss(b.logits, b.targets, mask=b.mask, backend=backend, **options)


def test_modules():
    b = make_batch()
    config = gk.LossConfig(aggregation="sequence_mean")
    module = gk.GRPOLoss(config, temperature=0.5)
    assert torch.equal(
        module(b.logits, b.targets, b.advantages, b.mask).loss,
        gk.grpo_loss(b.logits, b.targets, b.advantages, b.mask, config=config, temperature=0.5).loss,
    )
    linear = gk.LinearGRPOLoss(config, chunk_rows=3)
    weight = torch.eye(133, dtype=torch.float64)
    assert torch.equal(
        linear(b.logits, weight, b.targets, b.advantages, b.mask).loss,
        gk.linear_grpo_loss(b.logits, weight, b.targets, b.advantages, b.mask, config=config, chunk_rows=3).loss,
    )
    assert "sequence_mean" in repr(module) and "temperature=0.5" in repr(module)


def test_outputs_are_detached_and_complete(backend):
    b = make_batch()
    out = gk.grpo_loss(b.logits.requires_grad_(), b.targets, b.advantages, b.mask, backend=backend)
    assert out.loss.requires_grad and out.loss.dim() == 0 and out.entropy is None
    assert not any(x.requires_grad for x in (out.logps, out.per_token_loss, *out.metrics.values()))
    assert tuple(out.metrics) == METRICS and all(x.dim() == 0 for x in out.metrics.values())
    assert gk.grpo_loss(
        b.logits, b.targets, b.advantages, b.mask, return_entropy=True, backend=backend
    ).entropy.shape == (5, 7)
    parts = sum(out.metrics[k] for k in ("policy_loss", "kl_loss", "entropy_loss"))
    torch.testing.assert_close(parts, out.loss.detach(), rtol=1e-12, atol=0)
    assert math.isclose(float(out.metrics["tokens"]), float(b.mask.sum()))


@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_gradient_keeps_its_precision(inplace):
    """A bf16 gradient is multiplied by 1/3, not by 1/3 rounded to bf16."""
    torch.manual_seed(0)
    x, targets, advantages = torch.randn(64, 500).bfloat16().requires_grad_(), torch.randint(500, (64,)), torch.ones(64)
    grads = []
    for factor in (1.0, 1 / 3):
        out = gk.grpo_loss(x * 1, targets, advantages, inplace=inplace)
        grads.append(torch.autograd.grad(out.loss * factor, x)[0].double().clamp(min=0).sum())  # all but the targets
    assert abs(float(grads[1] / grads[0]) * 3 - 1) < 5e-4  # bf16(1/3) * 3 is 1.00195
