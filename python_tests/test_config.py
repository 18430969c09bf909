"""LossConfig: what it refuses, and that presets are what they say."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.config import KL_ESTIMATORS, KL_GRADIENTS, OBJECTIVES, PRESETS, RATIO_LEVELS, Form, Scalars


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "ppo"}, "objective must be one of 'clip'; got 'ppo'"),
        ({"ratio_level": "seq"}, "'token', 'sequence', 'sequence_token', 'sequence_product'; got 'seq'"),
        ({"aggregation": "mean"}, "'token_mean'.*got 'mean'"),
        ({"entropy_aggregation": "mean"}, "entropy_aggregation"),
        ({"kl_estimator": "none"}, "kl_estimator must be one of 'k1'"),
        ({"kl_gradient": "exact"}, "kl_gradient.*'exact'"),
        ({"eps_low": -0.1}, "eps_low must be at least 0; got -0.1"),
        ({"eps_high": math.nan}, "eps_high must be a finite number; got nan"),
        ({"kl_coef": -1.0}, "kl_coef must be at least 0; got -1.0"),
        ({"kl_coef": "0.1"}, "kl_coef must be a finite number; got '0.1'"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, or None; got 1.0"),
        ({"delta": 0.0}, "delta must be above 0, or None; got 0.0"),
        ({"log_ratio_clamp": -20.0}, "log_ratio_clamp"),
        ({"max_length": 0, "aggregation": "fixed_length"}, "max_length must be at least 1"),
        ({"max_length": 512}, "max_length is read by aggregation='fixed_length' only"),
        ({"sequence_log_ratio_max": 10.0}, "sequence_log_ratio_max needs a ratio_level"),
    ],
    ids=str,
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        gk.LossConfig(**options)


def test_is_a_frozen_value():
    a, b = gk.LossConfig(kl_coef=0.1), gk.LossConfig(kl_coef=0.1)
    assert a == b and hash(a) == hash(b) and a != gk.LossConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.kl_coef = 0.2
    for c in (copy.deepcopy(a), pickle.loads(pickle.dumps(a)), dataclasses.replace(a)):
        assert c == a and c.form == a.form and torch.equal(c.scalars, a.scalars)
    assert dataclasses.replace(a, kl_coef=0.0).form.kl_estimator == "none"


def test_scalars_are_what_the_kernels_read():
    s = Scalars(*gk.LossConfig(eps_low=0.1, eps_high=0.3, dual_clip=3.0, kl_coef=0.04).scalars.tolist())
    assert (s.ratio_low, s.ratio_high, s.dual_clip, s.kl_coef) == (0.9, 1.3, 3.0, 0.04)
    assert s.delta == s.log_ratio_clamp == s.kl_output_clamp == math.inf
    assert Scalars(*gk.LossConfig(eps_low=0.1).scalars.tolist()).ratio_high == 1.1


def test_codes_are_positions():
    for codes, names in ((0, OBJECTIVES), (1, RATIO_LEVELS), (2, KL_ESTIMATORS), (3, KL_GRADIENTS)):
        for position, name in enumerate(names):
            form = Form("clip", "token", "k3", "pathwise")._replace(**{Form._fields[codes]: name})
            assert form.codes[codes] == position


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_run(name):
    config = gk.LossConfig.preset(name, eps_low=0.25)
    assert config.eps_low == 0.25
    x = torch.randn(3, 4, requires_grad=True)
    gk.policy_loss(
        x, torch.randn(3), old_logps=torch.zeros(3, 4), ref_logps=torch.zeros(3, 4), config=config
    ).loss.backward()
    assert x.grad.abs().sum() > 0


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"no preset 'grpo'; there are .*trl_grpo"):
        gk.LossConfig.preset("grpo")
