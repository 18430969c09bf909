"""Invalid boundaries of packed sequences, which nothing checks on a GPU: the CUDA kernels terminate, write only into
their results, and act as if the boundaries had been clamped so that they rise."""

import contextlib
import functools
import math

import pytest
import torch
from forms import FORMS
from test_cuda_tokens import HERE, TOKENS_PER_TILE, on_device, tokens

import grpo_kernels as gk
from grpo_kernels.inputs.layout import Layout

pytestmark = pytest.mark.skipif(not HERE, reason="the CUDA kernels are neither built for a GPU nor emulated")
TOKENS, ROOM = 3 * TOKENS_PER_TILE - 100, 4 * TOKENS_PER_TILE


def of_any_integers(count, seed):
    g = torch.Generator().manual_seed(seed)
    wide = torch.randint(-(2**63), 2**63 - 1, (count,), generator=g)
    return (wide >> torch.randint(0, 63, (count,), generator=g)).tolist()


def around_the_tokens(count, seed):
    return torch.randint(-2000, 8000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


UNCHECKED = {
    "past the end": [0, 20_000],
    "past both ends": [-7, 9_000, 100, 100_000],
    "descending": [0, 5_000, 4_999, 3_000, 1_000, 0],
    "before the first": [-300, -200, -100],
    "behind the last": [TOKENS + 1, TOKENS + 2, TOKENS + 3],
    "not from 0": [100, 2_500, TOKENS],
    "the widest": [0, 2**63 - 1, -(2**63), 2**63 - 1, -1, 2**62],
    "no sequence": [5],
    **{f"any integers {i}": of_any_integers(3 + 7 * i, i) for i in range(2)},
    **{f"around the tokens {i}": around_the_tokens(3 + 7 * i, i) for i in range(2)},
}
PLACE = {"token_policy": 3, "gae": 3, "group_diversity": 2}  # the position of cu_seqlens among a backend's arguments


def clamped_boundaries(boundaries):
    """As gk::Boundaries: each boundary clamped to the range that a binary search has reached, the first to 0."""
    rising = [0, *boundaries[1:]]

    def split(first, after, begin, end):
        if after - first > 1:
            middle = first + (after - first) // 2
            rising[middle] = min(max(boundaries[middle], begin), end)
            split(first, middle, begin, rising[middle])
            split(middle, after, rising[middle], end)

    split(0, len(boundaries), 0, TOKENS)
    return rising


@pytest.mark.parametrize("name", UNCHECKED)
def test_clamped_boundaries_rise(name):
    boundaries, rising = UNCHECKED[name], clamped_boundaries(UNCHECKED[name])
    clamped = [min(max(b, 0), TOKENS) for b in boundaries[1:]]
    assert rising == sorted(rising) and rising[0] == 0 and rising[-1] <= TOKENS
    assert clamped != sorted(clamped) or rising[1:] == clamped


def test_sums_over_sequences_stay_within_the_tokens():
    layout = Layout(torch.Size([6]), torch.tensor([-5, 2, 2**40]))  # on a GPU an index out of range ends the process
    assert layout.sequence_sums(torch.ones(1, 6, dtype=torch.int64)).tolist() == [2, 4]


@pytest.fixture(params=HERE)
def backend(request):
    return request.param


class Guarded:
    """Allocates a kernel's memory between guard zones. All bytes but those of zeros are 0xFF, a NaN in floats."""

    def __init__(self):
        self.all = []

    def make(self, shape, dtype, device, zeros):
        count = math.prod(shape)
        padded = torch.full(((count + 2 * ROOM) * dtype.itemsize,), 0xFF, dtype=torch.uint8, device=device).view(dtype)
        if zeros:
            padded[ROOM : ROOM + count] = 0
        self.all.append((padded, count))
        return padded[ROOM : ROOM + count].view(shape)

    def check(self):
        for padded, count in self.all:
            for guard in (padded[:ROOM], padded[ROOM + count :]):
                assert (guard.contiguous().view(torch.uint8) == 0xFF).all()

    @contextlib.contextmanager
    def memory_of(self, implementation):
        def of_torch(zeros):
            return lambda shape, dtype, device: self.make(
                (shape,) if isinstance(shape, int) else shape, dtype, device, zeros
            )

        def new_matrix(like, shape, dtype=None):
            return self.make(shape, dtype or like.dtype, like.device, False)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch, "empty", of_torch(False))
            patched.setattr(torch, "zeros", of_torch(True))
            patched.setattr(implementation, "new_matrix", new_matrix)
            yield


@contextlib.contextmanager
def unchecked(backend, boundaries):
    """Passes these boundaries to the kernels only, with guarded memory that is checked afterwards."""
    implementation, guarded = HERE[backend], Guarded()
    given = on_device(torch.tensor(boundaries), backend)

    def with_boundaries(function, place):
        def called(*args):
            with guarded.memory_of(implementation):
                return function(*args[:place], given, *args[place + 1 :])

        return called

    with pytest.MonkeyPatch.context() as patched:
        for name, place in PLACE.items():
            patched.setattr(implementation, name, with_boundaries(getattr(implementation, name), place))
        yield
    assert guarded.all
    guarded.check()


def loss(form, backend, cu_seqlens):
    logps, mask, others = tokens((TOKENS,))
    old = logps + 0.003 * (others["old_logps"] - logps)
    leaf, mask, old = (on_device(x, backend) for x in (logps.float(), mask, old.float()))
    leaf.requires_grad_()
    advantages = torch.linspace(-1, 1, TOKENS, device=leaf.device)
    config = gk.LossConfig(**{**FORMS[form], "kl_coef": 0.0, "aggregation": "token_sum"})
    out = gk.policy_loss(leaf, advantages, mask, old_logps=old, cu_seqlens=cu_seqlens, config=config, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return out.loss.detach(), out.per_token_loss, torch.stack(list(out.metrics.values())), gradient


def gae(backend, cu_seqlens):
    values, mask, others = tokens((TOKENS,))
    rewards, values, mask = (on_device(x, backend) for x in (others["ref_logps"].float(), values.float(), mask))
    return gk.gae(rewards, values, mask, gamma=0.99, lam=0.97, cu_seqlens=cu_seqlens, backend=backend)


def diversity(backend, cu_seqlens):
    ids = on_device(torch.randint(0, 7, (TOKENS,), generator=torch.Generator().manual_seed(0)), backend)
    size = max(len(cu_seqlens) - 1, 1)
    return gk.group_diversity(ids, group_size=size, ngram=3, threshold=0.5, cu_seqlens=cu_seqlens, backend=backend)


CALLS = {name: functools.partial(loss, name) for name in ("token", "sequence")}
CALLS |= {"gae": gae, "diversity": diversity}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", UNCHECKED)
def test_kernels_take_them_for_boundaries_that_rise(backend, name, call):
    boundaries, legal = UNCHECKED[name], [0] * len(UNCHECKED[name])
    legal[-1] = TOKENS if len(legal) > 1 else 0
    results = []
    for given in (boundaries, clamped_boundaries(boundaries)):
        with unchecked(backend, given):
            results.append([x.cpu() for x in CALLS[call](backend, on_device(torch.tensor(legal), backend))])
    for mine, expected in zip(*results, strict=True):
        assert not mine.isnan().any() and torch.equal(mine, expected)
