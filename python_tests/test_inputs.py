"""Wrong tensors: every tensor argument of every public function, walked through a list of what it must not be.

Each must raise a TypeError or a ValueError that names the argument, before a kernel sees an address.
"""

import inspect
import re
import typing

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.inputs.check import check_factor, check_number

S, T, V, H, K = 4, 3, 7, 5, 2


def floats(*shape):
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(0)) - 0.1


IDS = torch.tensor([0, 0, 1, 1])
MASK = torch.ones(S, T, dtype=torch.bool)
TOKENS = torch.tensor([[1, 2, 3]] * S)
PER_TOKEN = {
    name: floats(S, T) for name in ("old_logps", "ref_logps", "rollout_logps", "token_weights", "entropy_mask")
}
FACTORS = {"denominator": torch.tensor(4.0), "scale": torch.tensor(0.5)}
OF_LOSSES = {**PER_TOKEN, **FACTORS, "sequence_weights": floats(S), "mask": MASK}
SHAPED = {"temperature": floats(S).abs(), "mask": MASK, "targets": TOKENS}
HEAD = {"hidden": floats(S, T, H), "weight": floats(V, H), "bias": floats(V)}
CONFIG = gk.LossConfig(kl_coef=0.1, entropy_coef=0.1)
LOSS = {**OF_LOSSES, **SHAPED, "config": CONFIG}
PACKED = {"cu_seqlens": torch.tensor([0, 5, 12])}
REWARDS = {"rewards": floats(S), "group_ids": IDS, "valid": MASK[:, 0]}

# function -> one or more calls, the first tensor of each first; together they give every tensor argument.
ARGUMENTS = {
    "token_logps": [{"logits": floats(S, T, V), **SHAPED}],
    "linear_token_logps": [{**HEAD, **SHAPED}],
    "policy_loss": [
        {"logps": floats(S, T), "advantages": floats(S), **OF_LOSSES, "entropy": floats(S, T), "config": CONFIG},
        {"logps": floats(12), "advantages": floats(2), **PACKED, "sequence_weights": floats(2)},
    ],
    "grpo_loss": [
        {"logits": floats(S, T, V), "advantages": floats(S), **LOSS},
        {"logits": floats(S, T, V), "targets": TOKENS, "rewards": floats(S), "group_size": 2},
        {"logits": floats(12, V), "targets": TOKENS.flatten(), "advantages": floats(2), **PACKED},
    ],
    "linear_grpo_loss": [
        {**HEAD, "advantages": floats(S), **LOSS},
        {**HEAD, "targets": TOKENS, "rewards": floats(S), "group_size": 2},
        {**HEAD, "hidden": floats(12, H), "targets": TOKENS.flatten(), "advantages": floats(2), **PACKED},
    ],
    "group_advantages": [
        {**REWARDS, "lengths": floats(S).abs(), "baseline": "length_weighted", "critic_values": floats(S), "critic_weight": 0.5},
        {"rewards": floats(S, K), "group_size": 2, "reward_weights": floats(K)},
    ],
    "pass_at_k_advantages": [REWARDS],
    "gpg_advantages": [REWARDS],
    "gdpo_advantages": [{**REWARDS, "rewards": floats(S, K), "reward_weights": floats(K), "lengths": floats(S).abs()}],
    "process_advantages": [
        {"step_rewards": floats(S, K), "step_ends": IDS[:, None].expand(S, K), "mask": MASK, "group_ids": IDS, "valid": MASK[:, :K]}
    ],
    "group_diversity": [
        {"token_ids": TOKENS, "mask": MASK, "group_ids": IDS},
        {"token_ids": TOKENS.flatten(), **PACKED, "group_size": 2},
    ],
    "gae": [
        {"values": floats(S, T), "rewards": floats(S, T), "mask": MASK, "gamma": 1.0, "lam": 1.0},
        {"values": floats(12), "rewards": floats(12), "gamma": 1.0, "lam": 1.0, **PACKED},
    ],
    "reinforce_plus_plus": [
        {"rewards": floats(S, T), "mask": MASK, "kl": floats(S, T), "kl_coef": 0.1},
        {"rewards": floats(12), **PACKED},
    ],
    "reinforce_plus_plus_baseline": [
        {**REWARDS, "mask": MASK, "kl": floats(S, T), "kl_coef": 0.1},
        {"rewards": floats(2), "mask": torch.ones(12), "group_size": 2, **PACKED},
    ],
    "remax": [
        {"rewards": floats(S, T), "baselines": floats(S), "mask": MASK},
        {"rewards": floats(12), "baselines": floats(2), **PACKED},
    ],
    "optimal_token_baseline": [
        {
            "logps": floats(S, T), "rewards": floats(S, T), "sum_p2": floats(S, T), "mask": MASK, "group_ids": IDS,
            "token_weights": floats(S, T),
        }
    ],
    "value_loss": [
        {"values": floats(S, T), "old_values": floats(S, T), "returns": floats(S, T), "mask": MASK, **FACTORS},
        {"values": floats(12), "old_values": floats(12), "returns": floats(12), **PACKED},
    ],
    "whiten": [{"values": floats(S, T), "mask": MASK}],
    "kl_divergence": [
        {"logps": floats(S, T), "ref_logps": floats(S, T), "old_logps": floats(S, T), "rollout_logps": floats(S, T), "mask": MASK}
    ],
    "token_details": [
        {
            "logps": floats(S, T), "advantages": floats(S), "mask": MASK,
            **{n: PER_TOKEN[n] for n in ("old_logps", "rollout_logps", "token_weights", "entropy_mask")},
        },
        {"logps": floats(12), "advantages": floats(2), **PACKED},
    ],
    "rollout_correction": [
        {
            "old_logps": floats(S, T), "rollout_logps": floats(S, T), "mask": MASK, "logps": floats(S, T),
            "advantages": floats(S), "config": gk.CorrectionConfig(opsm_delta=0.1),
        },
        {"old_logps": floats(12), "rollout_logps": floats(12), **PACKED},
    ],
}  # fmt: skip

INTEGERS = {"targets", "group_ids", "step_ends", "token_ids", "cu_seqlens"}
FLOATS = {
    "logits",
    "hidden",
    "weight",
    "bias",
    "logps",
    "old_logps",
    "ref_logps",
    "rollout_logps",
    "entropy",
    "old_values",
}
DIFFERENTIABLE = {"logits", "hidden", "weight", "bias", "entropy"} | {
    (f, name)
    for f, name in (
        ("policy_loss", "logps"),
        ("token_details", "logps"),
        ("kl_divergence", "logps"),
        ("value_loss", "values"),
    )
}
COPIED = {"temperature", "reward_weights"}  # to the logits' or rewards' device, as documented


def longer(x):
    """One more along every dimension."""
    return x.expand(2) if x.dim() == 0 else torch.nn.functional.pad(x, (0, 1) * x.dim())


WRONG = {
    "not a tensor": lambda x: x.tolist() if x.dim() else None,
    "on another device": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse() if x.dim() else None,
    "of another shape": longer,
    "of floats": lambda x: x.double(),
    "of integers": lambda x: x.long(),
    "of bools": lambda x: x.bool(),
    "with grad": lambda x: x.clone().requires_grad_() if x.is_floating_point() else None,
}
MAIN = {f: next(iter(calls[0])) for f, calls in ARGUMENTS.items()}  # the others are compared with it


def applies(function, name, wrong):
    if wrong == "on another device":  # of the first tensor's device there is nothing to say
        return name not in COPIED and name != MAIN[function]
    if wrong == "of another shape":
        shared = {"group_advantages": {"rewards"}, "group_diversity": {"token_ids"}}.get(function, set())
        return name not in {MAIN[function], "cu_seqlens", "mask" if function in TOKENS_FROM_MASK else ""} | shared
    if wrong == "not a tensor":
        return name not in {"reward_weights", *FACTORS, "temperature"}
    if wrong == "of floats":
        return name in INTEGERS
    if wrong == "of bools":
        return name in INTEGERS | FLOATS
    if wrong == "of integers":
        return name in FLOATS
    if wrong == "with grad":
        return name not in DIFFERENTIABLE and (function, name) not in DIFFERENTIABLE
    return True


TOKENS_FROM_MASK = {"reinforce_plus_plus_baseline", "reinforce_plus_plus", "remax"}  # rewards may be one per sequence
CASES = [
    (function, i, name, wrong)
    for function, calls in ARGUMENTS.items()
    for i, call in enumerate(calls)
    for name, x in call.items()
    if isinstance(x, torch.Tensor)
    for wrong in WRONG
    if applies(function, name, wrong) and WRONG[wrong](x) is not None
]


def named(name, message):
    return re.search(rf"\b{name}\b", message) is not None


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]} {c[2]} {c[3]}")
def test_a_wrong_tensor_raises_and_is_named(case):
    function, i, name, wrong = case
    call = ARGUMENTS[function][i]
    with pytest.raises((TypeError, ValueError)) as error:
        getattr(gk, function)(**{**call, name: WRONG[wrong](call[name])})
    assert named(name, str(error.value)), str(error.value)


@pytest.mark.parametrize("function", ARGUMENTS)
def test_the_right_tensors_are_accepted_and_all_are_given(function):
    for call in ARGUMENTS[function]:
        getattr(gk, function)(**call)
    given = {name for call in ARGUMENTS[function] for name in call}
    hints = typing.get_type_hints(getattr(gk, function))
    tensors = {
        n
        for n in inspect.signature(getattr(gk, function)).parameters
        if torch.Tensor in (hints[n], *typing.get_args(hints[n]))
    }
    assert tensors <= given, tensors - given


def test_every_public_function_is_walked():
    from test_quick import CALLS

    others = {"GRPOLoss", "LinearGRPOLoss", "AdaptiveKLController", "AdaptiveEntropyController", "combine_metrics"}
    assert {*CALLS} - others == {*ARGUMENTS}


@pytest.mark.parametrize(
    "function", [f for f in ARGUMENTS if "backend" in inspect.signature(getattr(gk, f)).parameters]
)
def test_nothing_needs_a_gradient_where_none_is_recorded(function):
    """Under no_grad a tensor that requires grad is one like any other."""
    call = ARGUMENTS[function][0]
    with torch.no_grad():
        getattr(gk, function)(
            **{
                n: WRONG["with grad"](x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for n, x in call.items()
            }
        )


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "4", None, True])
def test_a_number_that_is_none_is_shown(value):
    with pytest.raises(ValueError, match=f"temperature must be .*; got {re.escape(repr(value))}"):
        gk.token_logps(floats(S, T, V), TOKENS, temperature=value)


def test_numbers_of_other_libraries_are_numbers():
    import numpy as np

    for half in (np.float32(0.5), np.float64(0.5)):
        out = gk.token_logps(floats(S, T, V), TOKENS, temperature=half)
        assert torch.equal(out.logps, gk.token_logps(floats(S, T, V), TOKENS, temperature=0.5).logps)


@pytest.mark.parametrize("denominator", [0, -3.0, float("nan"), float("inf"), torch.ones(2)])
def test_a_denominator_is_one_number_above_0(denominator):
    with pytest.raises(ValueError, match="denominator must be"):
        gk.policy_loss(floats(S, T), floats(S), denominator=denominator)
    check_factor("scale", -1.0, torch.device("cpu"))  # a scale may be negative


@pytest.mark.parametrize(
    "ignored",
    [{"advantage_scale": "none"}, {"advantage_scale": "nonsense"}, {"advantage_eps": 1e-6}, {"group_size": 2}],
)
@pytest.mark.parametrize("function", ["grpo_loss", "linear_grpo_loss"])
def test_options_of_rewards_are_no_options_of_advantages(function, ignored):
    with pytest.raises(ValueError, match=f"{next(iter(ignored))} must be .* with advantages"):
        getattr(gk, function)(**ARGUMENTS[function][0], **ignored)


def test_an_entropy_that_is_asked_for_must_be_given():
    with pytest.raises(ValueError, match="return_entropy=True needs entropy"):
        gk.policy_loss(floats(S, T), floats(S), return_entropy=True)


def test_a_nested_tensor_is_no_padded_one():
    nested = torch.nested.nested_tensor([floats(2, V), floats(3, V)])
    with pytest.raises(ValueError, match="logits must be a strided tensor"):
        gk.token_logps(nested, TOKENS[:2])


def test_whole_numbers_are_legal_where_a_float_is():
    check_number("x", 3, lambda v: v > 0, "above 0")


@pytest.mark.parametrize("name", ["logits", "advantages", "targets", "old_logps"])
def test_a_dtensor_is_refused_by_name(name):
    class DTensor(torch.Tensor):  # torch.distributed's needs a process group
        pass

    call = ARGUMENTS["grpo_loss"][0]
    with pytest.raises(TypeError, match=f"{name} is a DTensor.*full_tensor"):
        gk.grpo_loss(**{**call, name: call[name].as_subclass(DTensor)})
