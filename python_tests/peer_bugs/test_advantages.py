"""Peers' bugs in advantages, returns and KL rewards."""

import itertools
import math

import pytest
import torch
from conftest import BACKENDS_HERE
from oracle_cases import one_thread as one_thread

import grpo_kernels as gk
from grpo_kernels.inputs.grouping import SCALES

NAN = math.nan


@pytest.fixture(params=BACKENDS_HERE)
def every_backend(request):
    return request.param


def advantages(rewards, backend, **options):
    options = {"group_size": len(rewards), **options} if "group_ids" not in options else options
    return gk.group_advantages(torch.tensor(rewards), backend=backend, **options).advantages


def test_r7_near_equal_rewards_keep_their_advantage(every_backend):
    """verl #6348: a floor under the variance takes 99 % of it."""
    near = advantages([0.5, 0.5 + 2**-12, 0.5 + 2**-11, 0.5 + 3 * 2**-12], every_backend, eps=0.0)
    torch.testing.assert_close(near, advantages([0.0, 1.0, 2.0, 3.0], every_backend, eps=0.0), rtol=1e-5, atol=0)


def test_r8_leave_one_out_deviation_of_all_but_one_equal(every_backend):
    """NeMo-RL #4158: E[x^2] - E[x]^2 left a residue where the others are equal, and the advantage was -2075."""
    for x, y in ((0.1, 0.7), (1 / 3, -5.0), (1e4, 1e4 + 1)):
        a = advantages([y] + [x] * 7, every_backend, baseline="leave_one_out", scale="leave_one_out", eps=0.0)
        r = torch.tensor([y] + [x] * 7).double()
        others = r[:-1]
        expected = torch.cat([(r[:1] - r[1]), ((x := r[-1]) - others.mean()).expand(7) / others.std()])
        torch.testing.assert_close(a.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7, 1e8])
def test_g11_equal_rewards_are_exactly_0(every_backend, scale, value):
    """NeMo-RL #4161: rounding errors of equal rewards divided by a deviation of nearly nothing, 1000- to 4000-fold."""
    options = {} if scale in ("mean", "none") else {"eps": 0.0}
    assert not advantages([value] * 7, every_backend, scale=scale, **options).any()


def test_r9_a_value_under_the_mask_does_not_bootstrap(every_backend):
    """ROLL #447: the critic's value of a masked token entered the tokens before it."""
    rewards, values = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    mask = torch.tensor([[1, 0, 1, 1]])
    results = [
        gk.gae(rewards, torch.where(mask != 0, values, bad), mask, gamma=0.9, lam=0.8, backend=every_backend)
        for bad in (0.2, 1e6, NAN)
    ]
    short = gk.gae(rewards[:, [0, 2, 3]], values[:, [0, 2, 3]], gamma=0.9, lam=0.8, backend=every_backend)
    for out in results:
        assert torch.equal(out.advantages, results[0].advantages) and out.advantages[0, 1] == 0
        torch.testing.assert_close(out.advantages[:, [0, 2, 3]], short.advantages)


def test_r10_an_outcome_reward_before_a_trailing_tool_token(every_backend):
    """miles #1827, verl #7278: put on the tool's token it was decayed, or lost."""
    mask, values = torch.tensor([[1, 1, 1, 0, 0]]), torch.zeros(1, 5)
    out = gk.gae(torch.tensor([2.0]), values, mask, gamma=0.5, lam=1.0, backend=every_backend)
    assert out.advantages.tolist() == [[0.5, 1.0, 2.0, 0.0, 0.0]]
    plain = gk.reinforce_plus_plus(torch.tensor([2.0]), mask, gamma=0.5, backend=every_backend)
    assert plain.returns.tolist() == [[0.5, 1.0, 2.0, 0.0, 0.0]]
    remax = gk.remax(torch.tensor([2.0]), torch.tensor([0.5]), mask, backend=every_backend)
    assert remax.advantages.tolist() == [[1.5, 1.5, 1.5, 0.0, 0.0]]


@pytest.mark.parametrize("bad", [100.0, NAN, math.inf])
def test_x11_kl_under_the_mask_is_no_reward(every_backend, bad):
    """SkyRL #1633, verl #6361, open-instruct #535: `kl * mask` lets a NaN through, and no mask at all its number."""
    mask, kl = torch.tensor([[1, 1, 0, 1]]), torch.tensor([[0.1, 0.2, bad, 0.4]])
    clean = torch.where(mask != 0, kl, 0.0)
    results = [
        gk.reinforce_plus_plus(torch.tensor([1.0]), mask, kl=x, kl_coef=0.5, backend=every_backend) for x in (kl, clean)
    ]
    assert torch.equal(results[0].advantages, results[1].advantages)
    torch.testing.assert_close(results[0].returns, torch.tensor([[0.65, 0.7, 0.0, 0.8]]))
    given = gk.kl_divergence(torch.full((1, 4), -1.0), torch.where(mask != 0, -1.1, bad), mask=mask)
    assert given.isfinite().all() and given[0, 2] == 0


def test_r11_rejected_samples_are_not_in_their_groups_statistics(every_backend):
    """verl #6375, #6452: rows that were masked out entirely stayed in the mean and the deviation."""
    valid = torch.tensor([1, 0, 1, 1])
    out = gk.group_advantages(
        torch.tensor([1.0, 99.0, 2.0, 3.0]), group_size=4, valid=valid, eps=0.0, backend=every_backend
    )
    assert out.advantages.tolist() == [-1.0, 0.0, 0.0, 1.0] and (out.mean == 2).all()
    nan = gk.group_advantages(torch.tensor([1.0, NAN, 2.0, 3.0]), group_size=4, eps=0.0, backend=every_backend)
    assert torch.equal(nan.advantages, out.advantages)


def test_r12_group_ids_are_any_integers(every_backend):
    """verl #7150: negative ids index from the end, sparse ones allocate slots; singletons differ by the path."""
    rewards = [1.0, 2.0, 4.0, 8.0, 5.0]
    ids = torch.tensor([10**15, -7, 10**15, -7, 0])
    for single in ("zero", "raw"):
        a = advantages(rewards, every_backend, group_ids=ids, eps=0.0, single=single)
        low, high = -(0.5**0.5), 0.5**0.5
        torch.testing.assert_close(a, torch.tensor([low, low, high, high, 5.0 if single == "raw" else 0.0]))
        alone = advantages(rewards, every_backend, group_size=1, single=single)
        assert alone.tolist() == (rewards if single == "raw" else [0.0] * 5)


def test_h11_the_order_of_samples_is_nothing(every_backend):
    rewards, ids = [1.0, NAN, 4.0, 8.0, 5.0, 0.1], [3, 3, -1, -1, 3, 9]
    plain = advantages(rewards, every_backend, group_ids=torch.tensor(ids))
    for p in itertools.islice(itertools.permutations(range(6)), 0, 720, 240):
        moved = advantages([rewards[i] for i in p], every_backend, group_ids=torch.tensor([ids[i] for i in p]))
        assert torch.equal(moved, plain[list(p)])
