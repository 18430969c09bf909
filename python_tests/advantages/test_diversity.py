"""group_diversity against brute force over Python sets, and results that must be exact."""

import random
import time

import pytest
import torch
from conftest import BACKENDS_HERE
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_kernels as gk
from grpo_kernels.config import LossConfig
from grpo_kernels.ops import advantages as ops

GARBAGE = [-1, -100, 1 << 62, -(1 << 63), 7]


def ngrams(tokens, n):
    n = min(n, len(tokens))
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)} if n else set()


def brute_force(samples, groups, threshold, n):
    keep, similarity, weights = [], [], []
    kept, cluster, leaders = {}, {}, []
    for i, (tokens, group) in enumerate(zip(samples, groups, strict=True)):
        mine, best, leader = ngrams(tokens, n), -1.0, i
        for j, other in kept.setdefault(group, []):
            either = len(mine | other)
            s = len(mine & other) / either if either else 1.0
            if s > best:
                best, leader = s, j
        keep.append(best < threshold)
        similarity.append(max(best, 0.0))
        if keep[-1]:
            kept[group].append((i, mine))
            leader = i
        leaders.append(leader)
        cluster[leader] = cluster.get(leader, 0) + 1
    weights = [1 / cluster[leader] for leader in leaders]
    return torch.tensor(keep, dtype=torch.bool), torch.tensor(similarity), torch.tensor(weights)


def padded(samples, rng, dtype=torch.int64, width=None):
    """Each completion's tokens in order, at random columns of a row whose other columns are masked garbage."""
    width = width or max(map(len, samples), default=0) + 3
    ids, mask = torch.zeros(len(samples), width, dtype=dtype), torch.zeros(len(samples), width)
    limit = torch.iinfo(dtype)
    for i, tokens in enumerate(samples):
        garbage = [g for g in GARBAGE if limit.min <= g <= limit.max]
        ids[i] = torch.tensor([rng.choice(garbage) for _ in range(width)], dtype=dtype)
        places = sorted(rng.sample(range(width), len(tokens)))
        ids[i, places] = torch.tensor(tokens, dtype=dtype)
        mask[i, places] = 0.5
    return ids, mask


def packed(samples):
    ids = torch.tensor([t for tokens in samples for t in tokens], dtype=torch.int64)
    return ids, torch.tensor([0, *map(len, samples)]).cumsum(0)


def mutated_samples(rng, count, longest=24, vocab=30):
    """Ragged completions, many of them similar to another one."""
    samples = []
    for _ in range(count):
        if samples and rng.random() < 0.6:
            tokens = [t if rng.random() < 0.9 else rng.randrange(vocab) for t in rng.choice(samples)]
        else:
            tokens = [rng.randrange(vocab) for _ in range(rng.randrange(longest))]
        samples.append(tokens)
    return samples


def check(out, expected):
    assert torch.equal(out.keep, expected[0])
    assert torch.equal(out.similarity, expected[1])
    assert torch.equal(out.weights, expected[2])


@pytest.fixture(params=BACKENDS_HERE)
def backend(request):
    return request.param


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_brute_force(backend, threshold, n):
    rng = random.Random(n)
    samples = mutated_samples(rng, 60)
    groups = [rng.randrange(7) * 1_000_003 - 5 for _ in samples]
    ids, mask = padded(samples, rng)
    for grouping, of in (
        ({"group_ids": torch.tensor(groups)}, groups),
        ({"group_size": 12}, [i // 12 for i in range(60)]),
    ):
        expected = brute_force(samples, of, threshold, n)
        options = dict(threshold=threshold, ngram=n, backend=backend, **grouping)
        check(gk.group_diversity(ids, mask, **options), expected)
        flat, bounds = packed(samples)
        check(gk.group_diversity(flat, cu_seqlens=bounds, **options), expected)
        kept_in = {g: sum(bool(k) for k, h in zip(expected[0], of, strict=True) if h == g) for g in of}
        for g, number in kept_in.items():
            of_group = torch.tensor([h == g for h in of])
            assert expected[2][of_group].sum().item() == pytest.approx(number, rel=1e-6)


@given(
    st.lists(st.lists(st.integers(-3, 5), max_size=9), max_size=14),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 2 / 3, 0.9, 1.0]),
    st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_any_completions(samples, n, threshold, seed):
    rng = random.Random(seed)
    groups = [rng.randrange(3) for _ in samples]
    ids, mask = padded(samples, rng, torch.int32)
    expected = brute_force(samples, groups, threshold, n)
    for backend in BACKENDS_HERE:
        options = dict(group_ids=torch.tensor(groups, dtype=torch.int64), threshold=threshold, ngram=n, backend=backend)
        check(gk.group_diversity(ids, mask, **options), expected)


# ---- large groups: blocks, tiles, hash buckets, rare and frequent n-grams ----


def large_samples(count=700, tokens=90, seed=0):
    """Some tokens are in nearly every sample, some in a few, most in one; near-duplicates of every similarity."""
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        if samples and rng.random() < 0.5:
            rate = rng.choice([0.0, 0.02, 0.1, 0.4])
            samples.append([t if rng.random() > rate else rng.randrange(100_000) for t in rng.choice(samples)])
        else:
            spread = rng.choice([150, 3000, 100_000])
            samples.append([rng.randrange(spread) for _ in range(rng.randrange(tokens))])
    return samples


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_one_large_group(instruction_set, threshold, n):
    samples = large_samples()
    flat, bounds = packed(samples)
    out = gk.group_diversity(flat, cu_seqlens=bounds, group_size=len(samples), threshold=threshold, ngram=n)
    check(out, brute_force(samples, [0] * len(samples), threshold, n))
    assert 50 < out.keep.sum() < 650


def test_many_hash_buckets():
    """So many n-grams that the kernel divides them into buckets; some samples are identical or half identical."""
    ids = torch.randint(0, 1 << 40, (40, 4000), generator=torch.Generator().manual_seed(0))
    ids[7], ids[30, :2000] = ids[3].flip(0), ids[11, :2000]
    out = gk.group_diversity(ids, group_size=40)
    check(out, brute_force(ids.tolist(), [0] * 40, 0.9, 1))
    assert out.similarity[7] == 1 and abs(out.similarity[30] - 1 / 3) < 1e-3


def test_number_of_threads_changes_no_bit():
    samples = large_samples(seed=1)
    flat, bounds = packed(samples)
    ids = torch.tensor([0 if i % 3 else i % 50 for i in range(len(samples))])  # one large group, many small ones
    results = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(gk.group_diversity(flat, cu_seqlens=bounds, group_ids=ids, threshold=0.6))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        check(other, results[0])
    check(results[0], brute_force(samples, ids.tolist(), 0.6, 1))


def test_other_groups_change_no_bit(backend):
    rng = random.Random(3)
    samples = mutated_samples(rng, 40)
    ids, mask = padded(samples, rng)
    alone = gk.group_diversity(ids[10:20], mask[10:20], group_size=10, backend=backend)
    together = gk.group_diversity(ids, mask, group_size=10, backend=backend)
    check(gk.GroupDiversity(*(x[10:20] for x in together)), alone)


# ---- layouts and edges ----


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_dtypes_and_strides(backend, dtype):
    rng = random.Random(4)
    samples = mutated_samples(rng, 24)
    ids, mask = padded(samples, rng, torch.int16)
    ids = torch.where(mask != 0, ids, 3).to(dtype)
    expected = brute_force(samples, [i // 8 for i in range(24)], 0.6, 2)
    wide = torch.full((24, 2 * ids.shape[1]), 9, dtype=dtype)
    wide[:, ::2] = ids
    for view in (ids, wide[:, ::2], ids.t().contiguous().t()):
        for m in (mask, mask != 0, mask.to(torch.int32).add(mask.ceil().int()), mask.t().contiguous().t()):
            check(gk.group_diversity(view, m, group_size=8, threshold=0.6, ngram=2, backend=backend), expected)
    flat, bounds = packed(samples)
    strided = torch.stack([flat, flat], 1)[:, 0].to(torch.int32)
    out = gk.group_diversity(
        strided, cu_seqlens=bounds.int(), group_size=8, threshold=0.6, ngram=2, backend=backend
    )  # fmt: skip
    check(out, expected)


def test_first_of_equals_leads(backend):
    """The last sample is equally similar to both kept samples, and joins the cluster of the first."""
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 5, 6]])
    out = gk.group_diversity(ids, group_size=3, threshold=1 / 3, backend=backend)
    assert out.keep.tolist() == [True, True, False] and out.weights.tolist() == [0.5, 1.0, 0.5]
    assert out.similarity.tolist() == [0.0, 0.0, torch.tensor(1 / 3).item()]


def test_dropped_samples_drop_no_others(backend):
    """A chain in which each sample is similar to its predecessor: only kept samples are compared with."""
    ids = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]])
    out = gk.group_diversity(ids, group_size=3, threshold=0.6, backend=backend)
    assert out.keep.tolist() == [True, False, True]


def test_empty_and_short_completions(backend):
    ids = torch.tensor([[0, 0, 0], [1, 2, 3], [9, 9, 9], [1, 2, 0], [1, 2, 5], [2, 1, 0]])
    mask = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]])
    out = gk.group_diversity(ids, mask, group_size=6, ngram=3, backend=backend)
    assert out.keep.tolist() == [True, True, False, True, False, True]
    assert out.similarity.tolist() == [0, 0, 1, 0, 1, 0]
    nothing = gk.group_diversity(ids, mask * 0, group_size=6, threshold=1.0, backend=backend)
    assert nothing.keep.tolist() == [True] + [False] * 5 and nothing.weights.eq(torch.tensor(1 / 6)).all()


def test_no_structure_of_small_tokens_collides(backend):
    """Every pair of the first tokens and every single one is a distinct n-gram: no two samples have one in common."""
    tokens = torch.arange(30 if backend != "emulated" else 8)
    pairs = torch.cartesian_prod(tokens, tokens)
    ids = torch.cat([pairs, torch.stack([tokens, torch.zeros_like(tokens)], 1)])
    mask = torch.ones_like(ids)
    mask[len(pairs) :, 1] = 0
    out = gk.group_diversity(ids, mask, group_size=len(ids), ngram=2, threshold=0.5, backend=backend)
    assert out.keep.all() and not out.similarity.any()


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_no_samples_or_no_tokens(backend, shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    out = gk.group_diversity(ids, torch.ones(shape), group_size=2, backend=backend)
    assert [x.shape for x in out] == [(shape[0],)] * 3
    assert [x.dtype for x in out] == [torch.bool, torch.float32, torch.float32]
    assert out.keep.tolist() == [i % 2 == 0 for i in range(shape[0])]
    flat = torch.zeros(0, dtype=torch.int64)
    empty = gk.group_diversity(flat, cu_seqlens=torch.tensor([0]), group_size=2, backend=backend)
    assert empty.keep.shape == (0,)
    check(gk.group_diversity(flat, cu_seqlens=torch.zeros(5).int(), group_size=2, backend=backend),
          gk.group_diversity(torch.zeros(4, 0).long(), group_size=2, backend=backend))  # fmt: skip


def test_int32_tokens_equal_int64_ones(backend):
    ids = torch.tensor([[-5, 2**31 - 1, 7], [-5, 7, 2**31 - 1], [2**32 - 5, 2**31 - 1, 7]])
    wide = gk.group_diversity(ids, group_size=3, backend=backend)
    assert wide.keep.tolist() == [True, False, True]
    narrow = gk.group_diversity(ids.int(), group_size=3, backend=backend)
    assert narrow.keep.tolist() == [True, False, False]


# ---- in a loss ----


def test_weights_and_keep_in_the_loss():
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (8, 6))
    ids[3], ids[5], ids[6] = ids[1], ids[4], ids[4]
    mask = torch.ones(8, 6)
    logits, rewards = torch.randn(8, 6, 11, dtype=torch.float64), torch.randn(8)
    out = gk.group_diversity(ids, mask, group_size=4, threshold=1.0)
    advantages = gk.group_advantages(rewards, group_size=4, valid=out.keep).advantages
    config = LossConfig(aggregation="sequence_mean")

    def loss(*of, **options):
        return gk.grpo_loss(logits, ids, advantages, *of, config=config, **options)

    each = loss(mask).per_token_loss.mean(1)
    weighted = loss(mask, sequence_weights=out.weights, denominator=out.weights.sum()).loss
    clusters = [[0], [1, 3], [2], [4, 5, 6], [7]]
    expected = torch.stack([each[c].mean() for c in clusters]).mean()
    torch.testing.assert_close(weighted, expected)
    kept = loss(mask * out.keep[:, None], denominator=out.keep.sum()).loss
    torch.testing.assert_close(kept, each[[0, 1, 2, 4, 7]].mean())


def test_opcheck_and_compile():
    ids, mask = torch.randint(0, 5, (8, 6)), torch.rand(8, 6) > 0.3
    for backend in BACKENDS_HERE:
        torch.library.opcheck(ops.group_diversity, (ids, mask, None, None, 4, 1, 0.6, backend))
        bounds = torch.arange(0, 49, 6)
        torch.library.opcheck(ops.group_diversity, (ids.view(1, -1), None, bounds, bounds[1:] % 4, 1, 2, 0.6, backend))

        def step(ids, mask, backend=backend):
            out = gk.group_diversity(ids, mask, group_size=4, threshold=0.6, backend=backend)
            return out.weights * out.keep + out.similarity

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ids, mask), step(ids, mask))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "exactly one"),
        ({"group_size": 4, "group_ids": torch.zeros(8).long()}, ValueError, "exactly one"),
        ({"group_size": 3}, ValueError, "divide the 8 samples; got 3"),
        ({"group_size": 0}, ValueError, "at least 1.*got 0"),
        ({"group_ids": torch.zeros(7).long()}, ValueError, r"\(8,\).*\(7,\)"),
        ({"group_ids": torch.zeros(8)}, TypeError, "group_ids must be integers.*float32"),
        ({"group_size": 4, "threshold": 1.5}, ValueError, "from 0 to 1.*1.5"),
        ({"group_size": 4, "threshold": float("nan")}, ValueError, "from 0 to 1.*nan"),
        ({"group_size": 4, "ngram": 0}, ValueError, "ngram.*got 0"),
        ({"group_size": 4, "ngram": 1.5}, ValueError, "ngram.*got 1.5"),
        ({"group_size": 4, "mask": torch.ones(8)}, ValueError, r"mask.*\(8, 6\).*\(8,\)"),
        ({"group_size": 4, "cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens goes with flat"),
        ({"group_size": 4, "token_ids": torch.zeros(8, 6)}, TypeError, "token_ids.*float32"),
        ({"group_size": 4, "token_ids": torch.zeros(8, 6).bool()}, TypeError, "token_ids.*bool"),
        ({"group_size": 4, "token_ids": torch.zeros(48).long()}, ValueError, r"cu_seqlens.*\(48,\)"),
        ({"group_size": 4, "token_ids": torch.zeros(2, 3, 4).long()}, ValueError, r"\(2, 3, 4\)"),
        (
            {"group_size": 1, "token_ids": torch.zeros(4).long(), "cu_seqlens": torch.tensor([0, 5])},
            ValueError,
            "rise from 0 to at most the 4",
        ),
        ({"group_size": 4, "backend": "tpu"}, ValueError, "tpu"),
    ],
    ids=str,
)
def test_user_errors(arguments, error, message):
    arguments = {"token_ids": torch.zeros(8, 6).long(), **arguments}
    with pytest.raises(error, match=message):
        gk.group_diversity(arguments.pop("token_ids"), **arguments)


def test_devices_must_agree():
    with pytest.raises(ValueError, match=r"mask.*on cpu; got meta"):
        gk.group_diversity(torch.zeros(4, 3).long(), torch.ones(4, 3, device="meta"), group_size=2)


# ---- speed ----


@pytest.mark.slow
@pytest.mark.parametrize("near_duplicates", [False, True])
def test_a_group_of_4096_completions_is_quick(near_duplicates):
    """Seconds on two cores (benchmarks/bench_losses.py measures it), where pairwise merging would take minutes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 150_000, (4096, 4096), generator=generator)
    if near_duplicates:
        noise = torch.rand(ids.shape, generator=generator) < 0.07
        ids = torch.where(noise, ids, ids[:32].repeat(128, 1))
    begin = time.perf_counter()
    out = gk.group_diversity(ids, group_size=4096)
    assert time.perf_counter() - begin < 20
    assert out.keep.all() and (out.similarity[32:] > 0.7).all() == near_duplicates
