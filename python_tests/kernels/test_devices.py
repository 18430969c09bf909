"""Arguments on another device than the tokens: what is refused, and what is accepted without a copy."""

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.aggregation import aggregation_weights
from grpo_kernels.inputs.grouping import reward_weights_of
from grpo_kernels.inputs.layout import layout_of

N, R = 6, 2


def flat(*more, dtype=torch.float32):
    return torch.zeros(N, *more, dtype=dtype)


def integers():
    return flat(dtype=torch.int64)


ones = torch.ones(R)
CALLS = {
    "policy_loss": lambda cu: gk.policy_loss(flat(), ones, cu_seqlens=cu),
    "grpo_loss": lambda cu: gk.grpo_loss(flat(5), integers(), ones, cu_seqlens=cu),
    "linear_grpo_loss": lambda cu: gk.linear_grpo_loss(flat(3), torch.ones(5, 3), integers(), ones, cu_seqlens=cu),
    "value_loss": lambda cu: gk.value_loss(flat(), flat(), flat(), cu_seqlens=cu),
    "gae": lambda cu: gk.gae(flat(), flat(), gamma=1, lam=1, cu_seqlens=cu),
    "remax": lambda cu: gk.remax(flat(), ones, cu_seqlens=cu),
    "reinforce_plus_plus": lambda cu: gk.reinforce_plus_plus(flat(), cu_seqlens=cu),
    "reinforce_plus_plus_baseline": lambda cu: gk.reinforce_plus_plus_baseline(ones, flat(), group_size=2, cu_seqlens=cu),
    "group_diversity": lambda cu: gk.group_diversity(integers(), group_size=2, cu_seqlens=cu),
    "rollout_correction": lambda cu: gk.rollout_correction(flat(), flat(), cu_seqlens=cu),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_boundaries_elsewhere_are_refused(name):
    """They would have to be copied at each call: a kernel that is given their address would read the wrong memory."""
    boundaries = torch.tensor([0, 4, N])
    CALLS[name](boundaries)
    with pytest.raises(ValueError, match="cu_seqlens must be where the other tensors are, on cpu; got meta"):
        CALLS[name](boundaries.to("meta"))


def test_a_number_on_the_cpu_weighs_tokens_elsewhere():
    like = torch.empty(2, 3, dtype=torch.bool, device="meta")
    for scale in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.5, device="meta")):
        for aggregation in ("token_mean", "token_sum", "sequence_mean"):
            weights = aggregation_weights(
                layout_of(like.shape, None), like, aggregation, gk.LossConfig(), dtype=torch.float32, scale=scale
            )
            assert weights.device.type == "meta" and weights.dtype == torch.float32 and weights.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_weighs_as_a_tensor_made_of_it_did(dtype):
    active = torch.rand(5, 7) > 0.3
    for scale in (1.0, 0.1, torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)):
        for denominator in (None, 7, 0.3, torch.tensor(11)):
            weights = aggregation_weights(
                layout_of(active.shape, None), active, "token_mean", gk.LossConfig(), dtype=dtype, scale=scale,
                denominator=denominator,
            )  # fmt: skip
            expected = torch.as_tensor(scale, dtype=dtype) / (active.sum() if denominator is None else denominator)
            assert torch.equal(weights, expected.to(dtype).expand(5, 7))


def test_reward_weights():
    rewards = torch.zeros(4, 3)
    assert reward_weights_of(None, rewards).tolist() == [1.0, 1.0, 1.0]
    for given in ([1, 0.1, -2.5], (1.0, 0.1, -2.5), torch.tensor([1, 0.1, -2.5], dtype=torch.float64)):
        weights = reward_weights_of(given, rewards)
        assert weights.dtype == torch.float64 and weights.tolist() == [1.0, 0.1, -2.5]
    for wrong in ([], [1.0], torch.ones(3, 1)):
        with pytest.raises(ValueError, match="reward_weights must be"):
            gk.group_advantages(rewards, group_size=2, reward_weights=wrong)
        with pytest.raises(ValueError, match="reward_weights must be"):
            gk.gdpo_advantages(rewards, group_size=2, reward_weights=wrong)
