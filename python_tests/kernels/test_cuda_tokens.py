"""The CUDA kernels per token and per sample, where the tests of all backends do not reach: sequences of several blocks,
of one token and of none, groups of any size, and bits that depend on nothing but the values."""

import math

import pytest
import torch
from conftest import BACKENDS_HERE
from forms import FORMS, with_everything

import grpo_kernels as gk
from grpo_kernels.backends import implementation
from grpo_kernels.testing.compare import assert_as_accurate

TOKENS_PER_TILE = 2048  # tokens of a block


HERE = {name: implementation(name) for name in ("cuda", "emulated") if name in BACKENDS_HERE}
if "emulated" in HERE:
    import emulated
pytestmark = pytest.mark.skipif(not HERE, reason="the CUDA kernels are neither built for a GPU nor emulated")


@pytest.fixture(params=HERE)
def backend(request):
    return request.param


def on_device(x, backend):
    return x.to("cuda") if backend == "cuda" and isinstance(x, torch.Tensor) else x


def tokens(shape, seed=0):
    """Log-probs, a mask and the other log-probs, in float64 but exact in float32; NaN where masked."""
    g = torch.Generator().manual_seed(seed)

    def exact(x, mask):
        return x.float().double().masked_fill(~mask, math.nan)

    mask = torch.rand(shape, generator=g) < 0.8
    logps = -3 * torch.rand(shape, generator=g)
    others = {
        f"{name}_logps": exact(logps + 0.3 * torch.randn(shape, generator=g), mask)
        for name in ("old", "ref", "rollout")
    }
    others["token_weights"] = torch.rand(shape, generator=g).double()
    return exact(logps, mask), mask, others


def policy_loss(form, logps, advantages, mask, others, dtype, backend):
    def moved(x):
        return on_device(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x, backend)

    leaf, entropy = moved(logps).requires_grad_(), moved(-logps).requires_grad_()
    config = gk.LossConfig(**with_everything(form), aggregation="sequence_mean")
    out = gk.policy_loss(
        leaf, moved(advantages), moved(mask), entropy=entropy, config=config, backend=backend,
        **{k: moved(v) for k, v in others.items()},
    )  # fmt: skip
    gradients = torch.autograd.grad(out.loss, (leaf, entropy))
    return [
        x.cpu() for x in (out.loss.detach(), out.per_token_loss, torch.stack(list(out.metrics.values())), *gradients)
    ]


def compare(form, backend, *inputs):
    mine, eager, exact = (
        policy_loss(form, *inputs, dtype, b)
        for dtype, b in ((torch.float32, backend), (torch.float32, "reference"), (torch.float64, "reference"))
    )
    for name, a, b, c in zip(("loss", "per token", "metrics", "g_logps", "g_entropy"), mine, eager, exact, strict=True):
        assert_as_accurate(a, b, c, what=name)


def near(logps, others):
    """Log-probs so close that the product of thousands of ratios is still finite."""
    return {k: logps + 0.003 * (v - logps) if k == "old_logps" else v for k, v in others.items()}


SHAPES = [(1, 2 * TOKENS_PER_TILE + 3), (2, TOKENS_PER_TILE), (9, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_sequences_of_any_length(backend, name, shape):
    logps, mask, others = tokens(shape)
    advantages = torch.linspace(-1, 1, shape[0], dtype=torch.float64) + 0.25
    compare(FORMS[name], backend, logps, advantages, mask, near(logps, others))


@pytest.mark.parametrize("name", ["token", "sequence", "gmpo", "vespo"])
def test_packed_sequences_of_every_length(backend, name):
    lengths = [0, 1, 0, TOKENS_PER_TILE, 1, TOKENS_PER_TILE + 1, 2 * TOKENS_PER_TILE + 7, 5, 0]
    logps, mask, others = tokens((sum(lengths) + TOKENS_PER_TILE + 50,))  # the rest belongs to no sequence
    mask[1 : TOKENS_PER_TILE // 2] = False
    others["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    advantages = torch.linspace(-1, 1, len(lengths), dtype=torch.float64) + 0.1
    compare(FORMS[name], backend, logps, advantages, mask, near(logps, others))


@pytest.mark.parametrize("name", ["sequence", "gmpo"])
def test_a_sequence_does_not_depend_on_the_others(backend, name):
    logps, mask, others = tokens((3, 2 * TOKENS_PER_TILE + 100))
    advantages = torch.tensor([0.5, -1.0, 2.0])
    form = {**FORMS[name], "aggregation": "token_sum"}

    def gradient(rows):
        leaf = on_device(logps[rows].float(), backend).requires_grad_()
        kept = {k: on_device(v[rows].float(), backend) for k, v in others.items()}
        out = gk.policy_loss(
            leaf, on_device(advantages[rows], backend), on_device(mask[rows], backend), config=gk.LossConfig(**form),
            backend=backend, **kept,
        )  # fmt: skip
        return torch.cat([out.per_token_loss, *torch.autograd.grad(out.loss, leaf)])

    together, alone = gradient([0, 1, 2]), gradient([1])
    assert torch.equal(together[[1, 4]], alone)


@pytest.mark.parametrize("form", ["token", "sequence", "gmpo"])
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (3, 7)], ids=str)
def test_no_active_token_gives_zero_loss(backend, form, shape):
    out = gk.policy_loss(
        on_device(torch.full(shape, math.nan), backend), on_device(torch.ones(shape[0]), backend),
        on_device(torch.zeros(shape), backend), config=gk.LossConfig(**FORMS[form]), backend=backend,
    )  # fmt: skip
    assert out.loss == 0 and not out.per_token_loss.any()
    assert out.metrics["tokens"] == 0 and out.metrics["ratio_mean"] == 1


def test_rewards_in_the_launch_give_the_same_advantages(backend):
    _, mask, others = tokens((12, 9))
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 3.0, math.nan, -1.0, 2.0])
    config = gk.LossConfig(ratio_level="sequence")
    expected = gk.group_advantages(rewards, group_size=4).advantages
    logits = torch.randn(12, 9, 33, generator=torch.Generator().manual_seed(0))
    targets, old = torch.zeros(12, 9, dtype=torch.long), others["old_logps"].float()
    arguments = [on_device(x, backend) for x in (logits, targets, mask, old)]
    from_rewards, from_advantages = (
        gk.grpo_loss(
            arguments[0], arguments[1], mask=arguments[2], old_logps=arguments[3], config=config, backend=b, **a
        )
        for b, a in (
            (backend, {"rewards": on_device(rewards, backend), "group_size": 4}),
            ("reference", {"advantages": on_device(expected, backend)}),
        )
    )
    torch.testing.assert_close(from_rewards.per_token_loss, from_advantages.per_token_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 4096, 4096 + 24, 4099])
def test_scale(backend, dtype, columns):
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, 4, columns + 8, generator=g).to(dtype)
    expected = matrix.clone()
    expected[:, 1:3, :columns] *= 0.3
    moved = on_device(matrix.clone(), backend)
    for factor in (1.0, 0.3):
        HERE[backend].scale(moved[:, 1:3, :columns], on_device(torch.tensor(factor), backend))
        assert torch.equal(moved.cpu(), matrix if factor == 1 else expected)
    one = on_device(torch.tensor([math.inf, 2.0, math.nan], dtype=dtype), backend)
    HERE[backend].scale(one.view(1, 1, -1), on_device(torch.tensor(1.0), backend))
    assert torch.equal(one.cpu()[:2], torch.tensor([math.inf, 2.0], dtype=dtype))


# ---- returns ----


@pytest.mark.parametrize("length", [1, 255, TOKENS_PER_TILE, TOKENS_PER_TILE + 1, 3 * TOKENS_PER_TILE + 5])
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.97), (1.0, 1.0), (0.5, 0.0)])
def test_gae_over_several_blocks(backend, length, gamma, lam):
    values, mask, others = tokens((2, length))
    # A value and a running sum are carried over a block without tokens.
    mask[0, TOKENS_PER_TILE // 2 : 2 * TOKENS_PER_TILE + 9] = False
    rewards = others["ref_logps"]
    mine, eager, exact = (
        gk.gae(*(on_device(x, b) for x in (rewards.to(dtype), values.to(dtype), mask)), gamma=gamma, lam=lam, backend=b)
        for dtype, b in ((torch.float32, backend), (torch.float32, "reference"), (torch.float64, "reference"))
    )
    for a, b, c in zip(mine, eager, exact, strict=True):
        assert_as_accurate(a.cpu(), b, c)


def test_gae_over_more_tiles_than_a_block_has_threads(backend):
    values, mask, others = tokens((300 * TOKENS_PER_TILE,))
    rewards, values, mask = (on_device(x[None], backend) for x in (others["ref_logps"].float(), values.float(), mask))
    gamma = 1 - 2**-11  # a sum reaches over several tiles; exact in float32, as its rounding would show
    mine = gk.gae(rewards, values, mask, gamma=gamma, lam=1.0, backend=backend)
    exact = gk.gae(rewards.double().cpu(), values.double().cpu(), mask.cpu(), gamma=gamma, lam=1.0, backend="cpu")
    for a, b in zip(mine, exact, strict=True):
        assert (a.cpu().double() - b).abs().max() < 1e-5 * b.abs().max()


def test_packed_gae_is_each_sequence_alone(backend):
    cu = torch.tensor([0, 5, 5, 6, TOKENS_PER_TILE + 6, 4 * TOKENS_PER_TILE, 4 * TOKENS_PER_TILE + 1])
    values, mask, others = tokens((5 * TOKENS_PER_TILE,))
    rewards, values, mask, bounds = (
        on_device(x, backend) for x in (others["old_logps"].float(), values.float(), mask, cu)
    )
    out = gk.gae(rewards, values, mask, gamma=0.9, lam=0.8, cu_seqlens=bounds, backend=backend)
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        one = gk.gae(rewards[None, a:b], values[None, a:b], mask[None, a:b], gamma=0.9, lam=0.8, backend=backend)
        assert torch.equal(out.advantages[a:b], one.advantages[0]) and torch.equal(out.returns[a:b], one.returns[0])
    assert not out.advantages[cu[-1] :].any() and not out.returns[cu[-1] :].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (2, TOKENS_PER_TILE + 1)], ids=str)
def test_value_loss_and_whitening(backend, shape):
    values, mask, others = tokens(shape)
    old, targets = others["old_logps"], others["ref_logps"]

    def run(dtype, b):
        x, o, r, m = (on_device(x, b) for x in (values.to(dtype), old.to(dtype), targets.to(dtype), mask))
        leaf = x.clone().requires_grad_()
        out = gk.value_loss(leaf, o, r, m, clip=0.1, backend=b)
        whitened = gk.whiten(x + 100, m, backend=b)
        gradient = torch.autograd.grad(out.loss, leaf)
        return [x.detach().cpu() for x in (out.loss, torch.stack(list(out.metrics.values())), *gradient, whitened)]

    runs = [(torch.float32, backend), (torch.float32, "reference"), (torch.float64, "reference")]
    for a, b, c in zip(*(run(*r) for r in runs), strict=True):
        assert_as_accurate(a, b, c)


@pytest.mark.parametrize("value", [0.1, 1e8])
@pytest.mark.parametrize("count", [1, TOKENS_PER_TILE + 1])
def test_equal_values_whiten_to_exactly_zero(backend, value, count):
    assert not gk.whiten(on_device(torch.full((count,), value), backend), eps=0.0, backend=backend).any()


# ---- groups ----


def samples(count, seed=1):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(count, 2, generator=g) + 2  # a mean away from 0, by which one scale divides
    rewards[::7, 0], rewards[3] = math.nan, math.nan
    critic = torch.randn(count, generator=g)
    critic[::5] = math.nan
    return rewards, critic, torch.randint(1, 9, (count,), generator=g), torch.arange(count) % 11 != 0


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "length_weighted", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "leave_one_out", "mean", "none"])
@pytest.mark.parametrize("grouping", ["ragged", "a warp per group", "a block per group"])
def test_groups_with_everything_in_any_order(backend, grouping, baseline, scale):
    rewards, critic, lengths, valid = samples(600)
    size = {"ragged": 40, "a warp per group": 40, "a block per group": 300}[grouping]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2))
    shuffled = (torch.arange(0, 600, size)[:, None] + order).flatten()
    ids = torch.arange(600) // size * 1_000_003 - 5
    if grouping == "ragged":
        ids[:100] = ids[0]
        shuffled = torch.randperm(600, generator=torch.Generator().manual_seed(3))

    def run(b, at, dtype=torch.float32):
        inputs = {"rewards": rewards[at].to(dtype), "critic_values": critic[at], "valid": valid[at]}
        if baseline == "length_weighted":
            inputs["lengths"] = lengths[at]
        inputs |= {"group_ids": ids[at]} if grouping == "ragged" else {}
        out = gk.group_advantages(
            **{k: on_device(v, b) for k, v in inputs.items()}, baseline=baseline, scale=scale, critic_weight=0.3,
            reward_weights=[1.0, 0.5], clip=(-1.5, 2.0), backend=b,
            **({} if grouping == "ragged" else {"group_size": size}),
        )  # fmt: skip
        return [x.cpu() for x in out]

    every = torch.arange(600)
    mine, moved = run(backend, every), run(backend, shuffled)
    eager, exact = run("reference", every), run("cpu", every, torch.float64)
    for a, b, c, d in zip(mine, moved, eager, exact, strict=True):
        assert torch.equal(a[shuffled], b)
        assert_as_accurate(a, c, d.double())


def test_an_outlier_does_not_cost_the_others_precision(backend):
    rewards = on_device(torch.tensor([1.0, 2.0, 3.0, 1e20]), backend)
    out = gk.group_advantages(rewards, group_size=4, baseline="leave_one_out", scale="leave_one_out", backend=backend)
    assert out.std[3] == 1


DIVERSITY = {
    "one group": {"group_size": 24},
    "groups": {"group_size": 6},
    "ragged": {"group_ids": torch.arange(24) // 3 * 7 % 5 - 2},
}


@pytest.mark.parametrize("grouping", DIVERSITY)
@pytest.mark.parametrize("length", [0, 1, 700, 4400])
def test_diversity_of_completions_of_any_length(backend, grouping, length):
    """The table of the longest does not fit into shared memory."""
    g = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 1 << 40, (24, length), generator=g)
    mask = torch.rand(24, length, generator=g) < 0.9
    for i in range(1, 24):  # more and more like its predecessor, except for every third
        same = torch.rand(length, generator=g) < (i / 24 if i % 3 else 0)
        ids[i], mask[i] = torch.where(same, ids[i - 1], ids[i]), mask[i - 1]
    options = {"threshold": 0.3, "ngram": 2, **DIVERSITY[grouping]}
    exact = gk.group_diversity(ids, mask, **options, backend="cpu")
    options = {k: on_device(v, backend) for k, v in options.items()}
    mine = gk.group_diversity(on_device(ids, backend), on_device(mask, backend), **options, backend=backend)
    assert length < 700 or 5 < exact.keep.sum() < 24
    for a, b in zip(mine, exact, strict=True):
        assert torch.equal(a.cpu(), b)


# ---- schedules ----


@pytest.mark.skipif("emulated" not in HERE, reason="a GPU has its own schedule")
@pytest.mark.parametrize("schedule", emulated.SCHEDULES[1:] if "emulated" in HERE else ())
def test_bits_do_not_depend_on_the_schedule(schedule):
    """Neither the threads of a block nor the blocks of a grid run in a guaranteed order."""
    logps, mask, others = tokens((3, TOKENS_PER_TILE + 70))
    rewards, critic, _, _ = samples(60)
    ids = torch.randint(0, 40, (9, 300), generator=torch.Generator().manual_seed(0))
    ids[4] = ids[1]

    def everything():
        for form in ("token", "sequence", "gmpo"):
            yield from policy_loss(
                FORMS[form], logps, torch.tensor([1.0, -1.0, 0.5]), mask, others, torch.float32, "emulated"
            )
        x, r = logps.float(), others["old_logps"].float()
        yield from gk.gae(r, x, mask, gamma=0.99, lam=0.9, backend="emulated")
        yield gk.value_loss(x, r, r + 1, mask, backend="emulated").loss
        yield gk.whiten(x, mask, backend="emulated")
        for grouping in ({"group_size": 20}, {"group_ids": torch.arange(60) % 7}):
            yield from gk.group_advantages(
                rewards, critic_values=critic, critic_weight=0.5, scale="batch", backend="emulated", **grouping
            )
        yield from gk.group_diversity(ids, group_size=3, threshold=0.5, backend="emulated")

    plain = list(everything())
    with emulated.machine(schedule=schedule):
        assert all(torch.equal(a, b) for a, b in zip(plain, everything(), strict=True))
