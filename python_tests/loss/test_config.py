"""LossConfig: what it refuses, and that presets are valid."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.config import ADVANTAGES, KL_ESTIMATORS, KL_GRADIENTS, OBJECTIVES, RATIO_LEVELS, Form, Scalars
from grpo_kernels.presets import PRESETS


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "ppo"}, "objective must be one of 'clip', 'cispo', .*'kl_cov'; got 'ppo'"),
        (
            {"objective": "cispo", "eps_low": 0.1},
            "eps_low=0.1 is not used by objective='cispo', which uses cispo_high, cispo_low",
        ),
        (
            {"objective": "sapo", "delta": 2.0},
            "delta=2.0 is not used by objective='sapo', which uses sapo_tau_neg, sapo_tau_pos",
        ),
        (
            {"objective": "reinforce", "dual_clip": 3.0},
            "dual_clip=3.0 is not used by objective='reinforce', which has no options",
        ),
        ({"objective": "reinforce", "log_ratio_clamp": 20.0}, "log_ratio_clamp is not used by objective='reinforce'"),
        ({"cov_ratio": 0.1}, "cov_ratio=0.1 is not used by objective='clip'"),
        (
            {"objective": "vespo", "ratio_level": "sequence"},
            "objective='vespo'.*ratio_level='token' only.*clip, cispo, sapo.*got 'sequence'",
        ),
        ({"objective": "dro"}, "objective='dro' needs dro_beta, above 0; got None"),
        ({"objective": "dro", "dro_beta": 0.0}, "dro_beta must be above 0, or None; got 0.0"),
        ({"objective": "sapo", "sapo_tau_pos": 0.0}, "sapo_tau_pos must be above 0; got 0.0"),
        ({"objective": "kl_cov", "cov_ratio": 1.5}, "cov_ratio must be above 0 and at most 1; got 1.5"),
        ({"objective": "clip_cov", "cov_high": 0.5}, r"cov_high must be above cov_low \(1.0\); got 0.5"),
        ({"objective": "cispo", "cispo_low": 6.0}, r"cispo_high must be at least cispo_low \(6.0\); got 5.0"),
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
        ({"max_length": 512}, "max_length is used by aggregation='fixed_length' only"),
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
    for codes, names in (
        (0, tuple(OBJECTIVES)),
        (1, RATIO_LEVELS),
        (2, KL_ESTIMATORS),
        (3, KL_GRADIENTS),
        (4, ADVANTAGES),
    ):
        for position, name in enumerate(names):
            form = Form("clip", "token", "k3", "pathwise")._replace(**{Form._fields[codes]: name})
            assert form.codes[codes] == position


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_run(name):
    required = {"dro_beta": 0.1} if name == "verl_dro" else {}
    config = gk.LossConfig.preset(name, entropy_coef=0.25, **required)
    assert config.entropy_coef == 0.25
    g = torch.Generator().manual_seed(0)
    x = (0.05 * torch.randn(3, 4, generator=g)).requires_grad_()  # within every clip range
    gk.policy_loss(
        x, torch.randn(3, generator=g), old_logps=torch.zeros(3, 4), ref_logps=torch.zeros(3, 4), rollout_logps=-torch.ones(3, 4),
        entropy=torch.ones(3, 4), config=config,
    ).loss.backward()  # fmt: skip
    assert x.grad.abs().sum() > 0


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"no preset 'grpo'; there are .*trl_grpo"):
        gk.LossConfig.preset("grpo")


def test_a_config_is_rebuilt_from_its_fields():
    """As FSDP does with a dataclass among a forward's arguments, and a run's logger with `asdict`."""
    config = gk.LossConfig.preset("trl_dapo", kl_coef=0.1)
    rebuilt = type(config)(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    assert rebuilt == config and rebuilt.form == config.form and torch.equal(rebuilt.scalars, config.scalars)
    assert dataclasses.replace(config, eps_low=0.1).scalar_values().eps_low == 0.1
    assert gk.LossConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
