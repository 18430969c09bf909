"""verl's own estimators and value loss, run in float64, decide what ours compute."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from oracle_cases import assert_near, poisoned
from oracle_cases import one_thread as one_thread
from torch import Tensor

import grpo_kernels as gk

REASON = "the oracle is verl itself: pip install verl==0.9.1"
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason=REASON)
verl_torch = pytest.importorskip("verl.utils.torch_functional", reason=REASON)

GAMMA, LAM, TURNS = 0.97, 0.9, 12
SIZES = {40: 4, -3: 1, 7: 3, 0: 2, 1000: 5, 5: 1, 6: 4}  # samples of each group id; 7 and 6 are constant
WEIGHTS = [1.0, 0.25, -0.5]
BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float32, torch.float64]


class Batch(NamedTuple):
    """Groups in random order; most rows have two runs of active tokens, one row has no token."""

    ids: Tensor
    rewards: Tensor  # [S]
    components: Tensor  # [S, K]
    baselines: Tensor  # [S]
    mask: Tensor  # [S, T] int64
    token_rewards: Tensor  # 0 at masked tokens
    values: Tensor
    logps: Tensor
    sum_p2: Tensor
    weights: Tensor

    @property
    def uids(self) -> numpy.ndarray:
        return numpy.array([f"prompt {i}" for i in self.ids.tolist()], dtype=object)

    @property
    def outcome(self) -> Tensor:
        """[S, T], with each reward on some token: verl sums over the tokens."""
        return torch.nn.functional.pad(self.rewards[:, None], (3, TURNS - 4))


def make_batch(seed: int = 8) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor([i for i, n in SIZES.items() for _ in range(n)])
    ids = ids[torch.randperm(len(ids), generator=g)]
    shape = (len(ids), TURNS)
    rewards, components = torch.randn(shape[0], generator=g), torch.randn(shape[0], len(WEIGHTS), generator=g)
    rewards[(ids == 7) | (ids == 6)] = 0.5
    rewards[3] = 0.0
    lengths = torch.randint(2, TURNS + 1, (shape[0], 1), generator=g)
    mask = (torch.arange(TURNS) < lengths) & (torch.rand(shape, generator=g) > 0.25)
    mask[torch.arange(shape[0]), lengths[:, 0] - 1] = True  # some groups have a unique longest sequence
    mask[5] = False
    draw = [torch.randn(shape, generator=g) for _ in range(5)]
    logps = -draw[2].abs()
    sum_p2 = logps.exp() ** 2 + draw[3].abs() * 0.1
    floats = (rewards, components, torch.randn(shape[0], generator=g), draw[0] * mask, draw[1], logps, sum_p2)
    rewards, components, baselines, token_rewards, values, logps, sum_p2 = (x.double() for x in floats)
    return Batch(
        ids, rewards, components, baselines, mask.long(), token_rewards, values, logps, sum_p2,
        draw[4].exp().double(),
    )  # fmt: skip


B = make_batch()
WIDE = B.mask.double()  # with an integer mask, verl's n / (n - 1) is float32


def verl(name: str, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    inputs = [x.clone() if isinstance(x, Tensor) else x for x in args]
    return core_algos.get_adv_estimator_fn(name)(*inputs, **options)


def cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Tensors per token get NaN and infinities at masked tokens."""
    return [(poisoned(x, B.mask) if x.shape == B.mask.shape else x).to(dtype) for x in tensors]


def tolerance(dtype: torch.dtype, theirs: float = 1e-9) -> float:
    return 3e-6 if dtype == torch.float32 else theirs


def assert_tokens(got: Tensor, exact: Tensor, allowed: float, what: str) -> None:
    assert not got[B.mask == 0].any(), f"{what}: a masked token is not 0"
    assert_near(got, exact.double() * B.mask, allowed, what)


# ---- one advantage per sample ----

NO_STD = {"norm_adv_by_std_in_grpo": False}
Ours = Callable[..., gk.GroupAdvantages]
PER_SAMPLE: dict[str, tuple[str, dict[str, Any], Ours, dict[str, Any]]] = {
    "grpo": ("grpo", {}, gk.group_advantages, {"eps": 1e-6, "single": "raw"}),
    "grpo_no_std": ("grpo", NO_STD, gk.group_advantages, {"scale": "none", "single": "raw"}),
    "grpo_vectorized": ("grpo_vectorized", {}, gk.group_advantages, {"eps": 1e-6, "single": "raw"}),
    "grpo_vectorized_no_std": ("grpo_vectorized", NO_STD, gk.group_advantages, {"scale": "none", "single": "raw"}),
    "rloo": ("rloo", {}, gk.group_advantages, {"baseline": "leave_one_out", "scale": "none", "single": "raw"}),
    "rloo_vectorized": ("rloo_vectorized", {}, gk.group_advantages, {"baseline": "leave_one_out", "scale": "none"}),
    "opo": (
        "opo", {}, gk.group_advantages,
        {"baseline": "length_weighted", "scale": "none", "single": "raw", "lengths": B.mask.sum(-1)},
    ),
    "gpg": ("gpg", {}, gk.gpg_advantages, {"single": "raw"}),
    "gpg_f_norm": ("gpg", {"f_norm": 2.5}, gk.gpg_advantages, {"single": "raw", "f_norm": 2.5}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", PER_SAMPLE)
def test_per_sample(estimator: str, backend: str, dtype: torch.dtype) -> None:
    name, options, ours, changes = PER_SAMPLE[estimator]
    mask = torch.ones_like(B.mask)
    if estimator == "opo":
        mask = B.mask
    exact, _ = verl(name, B.outcome, mask, B.uids, **options)
    kept = mask.any(-1)
    exact = exact.gather(1, mask.argmax(-1, keepdim=True))[:, 0]
    if name.startswith("grpo") and not options:  # verl divides a lone reward by float32(1 + 1e-6)
        single = torch.isin(B.ids, torch.tensor([-3, 5]))
        exact = torch.where(single, exact * (torch.ones(()) + 1e-6).double(), exact)
    got = ours(B.rewards.to(dtype), group_ids=B.ids, backend=backend, **changes).advantages
    computed_in = torch.float32 if name == "grpo_vectorized" else dtype
    theirs = 1e-7 if name == "gpg" else 1e-9  # alpha is float32 there
    assert_near(got[kept], exact[kept], tolerance(computed_in, theirs), estimator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_std", [True, False])
def test_grpo_passk(by_std: bool, backend: str, dtype: torch.dtype) -> None:
    kept = ~torch.isin(B.ids, torch.tensor([-3, 5]))  # verl refuses groups of one
    exact, _ = verl(
        "grpo_passk", B.outcome[kept], torch.ones_like(B.mask)[kept], B.uids[kept.numpy()],
        config={"norm_adv_by_std_in_grpo": by_std},
    )  # fmt: skip
    choice = {"eps": 1e-6} if by_std else {"scale": "none"}
    got = gk.pass_at_k_advantages(B.rewards.to(dtype), group_ids=B.ids, backend=backend, **choice)
    assert not got.advantages[~kept].any() and not got.informative[~kept].any()
    assert_near(got.advantages[kept], exact[:, 0], tolerance(dtype), "grpo_passk")
    assert (exact != 0).any()
    better = torch.stack([(got.advantages[B.ids == i] > 0).any() for i in B.ids])
    assert torch.equal(got.informative, better)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_std", [True, False])
def test_gdpo(by_std: bool, backend: str, dtype: torch.dtype) -> None:
    """verl takes the components from its data and whitens over tokens."""
    keys = [f"reward {k}" for k in range(len(WEIGHTS))]
    config = {"gdpo_reward_keys": keys, "gdpo_reward_weights": WEIGHTS}
    components = B.components.float()  # verl's dtype for them
    exact, _ = verl(
        "gdpo", B.token_rewards, B.mask, B.uids, epsilon=1e-6, norm_adv_by_std_in_grpo=by_std, config=config,
        non_tensor_batch={key: components[:, k].numpy() for k, key in enumerate(keys)},
        batch={"prompts": torch.zeros(len(B.ids), 2), "attention_mask": torch.ones(len(B.ids), 2 + TURNS).long()},
    )  # fmt: skip
    choice = {"eps": 1e-6} if by_std else {"scale": "none"}
    got = gk.gdpo_advantages(
        components.to(dtype), group_ids=B.ids, reward_weights=WEIGHTS, single="raw", lengths=B.mask.sum(-1),
        batch_eps=1e-8, batch_eps_mode="variance", backend=backend, **choice,
    )  # fmt: skip
    assert_tokens(got.advantages[:, None] * B.mask, exact, 3e-6, "gdpo")  # float32 computed_in verl
    assert got.mean.shape == got.std.shape == B.components.shape


# ---- one advantage per token ----


def packed(values: Tensor) -> Tensor:
    return torch.cat([values.flatten(), values.new_full((3,), 7)])


def boundaries() -> Tensor:
    return torch.arange(0, B.mask.numel() + 1, TURNS)


def unpacked(out: gk.TokenAdvantages) -> gk.TokenAdvantages:
    assert not out.advantages[-3:].any() and not out.returns[-3:].any()
    return gk.TokenAdvantages(*(x[:-3].view(B.mask.shape) for x in out))


LAYOUTS = ["padded", "packed"]
MARKS = [
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("layout", LAYOUTS),
]


def for_each_layout(test: Callable) -> Callable:
    for mark in MARKS:
        test = mark(test)
    return test


def run(function: Callable, layout: str, tensors: list[Tensor], **options: Any) -> gk.TokenAdvantages:
    """Packs the per-token tensors, and `mask` if it is among the options."""
    if layout == "padded":
        return function(*tensors, **options)
    options = {k: packed(v) if k in ("mask", "kl") else v for k, v in options.items()}
    tensors = [packed(x) if x.shape == B.mask.shape else x for x in tensors]
    return unpacked(function(*tensors, cu_seqlens=boundaries(), **options))


@for_each_layout
def test_gae(layout: str, backend: str, dtype: torch.dtype) -> None:
    whitened, returns = verl("gae", B.token_rewards, B.values, WIDE, GAMMA, LAM)
    inputs = cast(dtype, B.token_rewards, B.values)
    got = run(gk.gae, layout, inputs, mask=B.mask, gamma=GAMMA, lam=LAM, backend=backend)
    assert_tokens(got.returns, returns, tolerance(dtype), "returns")
    assert_tokens(got.advantages, returns - B.values, tolerance(dtype), "advantages")
    white = gk.whiten(got.advantages, B.mask)
    assert_tokens(white, whitened, tolerance(dtype), "whitened")


@for_each_layout
def test_reinforce_plus_plus(layout: str, backend: str, dtype: torch.dtype) -> None:
    exact = verl("reinforce_plus_plus", B.token_rewards, WIDE, config=SimpleNamespace(gamma=GAMMA))
    got = run(gk.reinforce_plus_plus, layout, cast(dtype, B.token_rewards), mask=B.mask, gamma=GAMMA, backend=backend)
    for mine, theirs, what in zip(got, exact, ("advantages", "returns"), strict=True):
        assert_tokens(mine, theirs, tolerance(dtype), what)


@for_each_layout
def test_reinforce_plus_plus_baseline(layout: str, backend: str, dtype: torch.dtype) -> None:
    exact, _ = verl("reinforce_plus_plus_baseline", B.outcome, WIDE, B.uids)
    got = run(
        gk.reinforce_plus_plus_baseline, layout, cast(dtype, B.rewards), mask=B.mask, group_ids=B.ids, single="raw",
        backend=backend,
    )  # fmt: skip
    assert_tokens(got.advantages, exact, tolerance(dtype), "advantages")


@for_each_layout
def test_remax(layout: str, backend: str, dtype: torch.dtype) -> None:
    exact = verl("remax", B.token_rewards, B.baselines, B.mask)
    got = run(gk.remax, layout, cast(dtype, B.token_rewards, B.baselines), mask=B.mask, backend=backend)
    for mine, theirs, what in zip(got, exact, ("advantages", "returns"), strict=True):
        assert_tokens(mine, theirs, tolerance(dtype), what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", ["optimal_token_baseline", "tir_optimal_token_baseline"])
@pytest.mark.parametrize("groups", ["ids", "size"])
def test_optimal_token_baseline(
    groups: str, name: str, weighted: bool, tail: bool, backend: str, dtype: torch.dtype
) -> None:
    uids = B.uids if groups == "ids" else numpy.arange(len(B.ids)) // 5
    weights = {"rollout_is_weights": B.weights} if weighted else {}
    exact = verl(name, B.token_rewards, B.mask, uids, B.logps, B.sum_p2, handle_zero_tail=tail, **weights)
    rewards, logps, sum_p2, own = cast(dtype, B.token_rewards, B.logps, B.sum_p2, B.weights)
    choice = {"group_ids": B.ids} if groups == "ids" else {"group_size": 5}
    got = gk.optimal_token_baseline(
        rewards, logps, sum_p2, B.mask, token_weights=own if weighted else None, zero_tail=tail,
        multi_turn=name.startswith("tir"), backend=backend, **choice,
    )  # fmt: skip
    for mine, theirs, what in zip(got, exact, ("advantages", "returns"), strict=True):
        assert_tokens(mine, theirs, tolerance(dtype), what)


def test_every_estimator_is_tested() -> None:
    """Fails for a new estimator in verl, or one that has lost its test."""
    tested = {row[0] for row in PER_SAMPLE.values()} | {
        "gae", "gdpo", "grpo_passk", "optimal_token_baseline", "reinforce_plus_plus", "reinforce_plus_plus_baseline",
        "remax", "tir_optimal_token_baseline",
    }  # fmt: skip
    registered = {getattr(name, "value", name) for name in core_algos.ADV_ESTIMATOR_REGISTRY}
    assert registered <= tested and len(tested) == 14


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shift_mean: bool) -> None:
    exact = verl_torch.masked_whiten(B.values, WIDE, shift_mean=shift_mean)
    for dtype in DTYPES:
        got = gk.whiten(*cast(dtype, B.values), B.mask, shift_mean=shift_mean)
        assert_tokens(got, exact, tolerance(dtype), "whitened")


# ---- the value loss ----

AGGREGATIONS = {
    "token-mean": "token_mean", "token-sum": "token_sum", "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "fixed_length", "seq-mean-token-mean": "sequence_mean",
}  # fmt: skip


@pytest.mark.parametrize("clip", [0.5, 0.05])
@pytest.mark.parametrize("mode", AGGREGATIONS)
@for_each_layout
def test_value_loss(layout: str, backend: str, dtype: torch.dtype, mode: str, clip: float) -> None:
    g = torch.Generator().manual_seed(2)
    old = (B.values + 0.3 * torch.randn(B.values.shape, generator=g)).float().double()
    returns = (B.values + torch.randn(B.values.shape, generator=g)).float().double()
    leaf = B.values.clone().requires_grad_()
    exact, fraction = core_algos.compute_value_loss(leaf, returns, old, B.mask, clip, mode)
    exact.backward()
    assert 0 < fraction < 1
    mine = poisoned(B.values, B.mask).to(dtype).requires_grad_()
    values, past, target, mask = mine, *cast(dtype, old, returns), B.mask
    options: dict[str, Any] = {"cu_seqlens": boundaries()} if layout == "packed" else {}
    if layout == "packed":
        values, past, target, mask = (packed(x) for x in (values, past, target, mask))
    got = gk.value_loss(
        values, past, target, mask, clip=clip, aggregation=AGGREGATIONS[mode], count_empty_sequences=False,
        max_length=TURNS if "norm" in mode else None, backend=backend, **options,
    )  # fmt: skip
    got.loss.backward()
    allowed = max(tolerance(dtype), 2e-8 if mode == "seq-mean-token-mean" else 0)
    assert_near(got.loss.detach(), exact.detach(), allowed, "loss")
    assert_tokens(mine.grad, leaf.grad, allowed, "gradient")
    assert_near(got.metrics["clip_fraction"], fraction, tolerance(dtype, 1e-7), "clip fraction")


# ---- mutations ----


def test_mutations() -> None:
    """The comparison fails when one thing is wrong."""
    wrong = {
        "ddof": {"eps": 1e-6, "single": "raw", "ddof": 0}, "single": {"eps": 1e-6}, "eps": {"single": "raw"},
        "scale": {"scale": "none", "single": "raw"},
        "baseline": {"eps": 1e-6, "single": "raw", "baseline": "leave_one_out"},
    }  # fmt: skip
    exact, _ = verl("grpo", B.outcome, torch.ones_like(B.mask), B.uids)
    for options in wrong.values():
        with pytest.raises(AssertionError):
            got = gk.group_advantages(B.rewards, group_ids=B.ids, **options)
            assert_near(got.advantages, exact[:, 0], 2e-6, "wrong")
    _, returns = verl("gae", B.token_rewards, B.values, WIDE, GAMMA, LAM)
    for changes in ({"gamma": 1.0, "lam": LAM}, {"gamma": GAMMA, "lam": 1.0}):
        with pytest.raises(AssertionError):
            assert_tokens(gk.gae(B.token_rewards, B.values, B.mask, **changes).returns, returns, 1e-6, "wrong")
    with pytest.raises(AssertionError):
        got = gk.gae(B.token_rewards, B.values * B.mask, gamma=GAMMA, lam=LAM)
        assert_tokens(got.returns * B.mask, returns, 1e-6, "masked tokens not skipped")


@pytest.mark.slow
def test_much_faster_than_the_loops() -> None:
    """At the sizes of a training step. Measured: over 100 times; required: less, for busy machines."""
    rewards = torch.randn(16384)
    ids = torch.arange(16384) // 16
    uids = numpy.array([f"prompt {i}" for i in ids.tolist()], dtype=object)
    scores, mask = rewards[:, None], torch.ones(16384, 1)
    by_sample = _seconds(lambda: core_algos.compute_grpo_outcome_advantage(scores, mask, uids), 1)
    assert by_sample > 20 * _seconds(lambda: gk.group_advantages(rewards, group_ids=ids), 20)
    rewards, values, mask = torch.randn(512, 4096), torch.randn(512, 4096), torch.ones(512, 4096)
    by_token = _seconds(lambda: core_algos.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95), 1)
    assert by_token > 10 * _seconds(lambda: gk.gae(rewards, values, mask, gamma=1.0, lam=0.95), 10)


def _seconds(call: Callable[[], Any], rounds: int) -> float:
    """The minimum of some rounds."""
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)
