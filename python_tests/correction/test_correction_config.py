"""What CorrectionConfig, RejectionFilter and rollout_correction refuse, and their error messages."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from correction_inputs import FULL

import grpo_kernels as gk
from grpo_kernels.correction.config import CORRECTION_PRESETS


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight": "tis"}, "weight must be one of 'none', 'ratio', 'truncate', 'clip', 'mask'; got 'tis'"),
        ({"weight": "ratio", "level": "geometric"}, "level must be one of 'token', 'sequence_sum', 'sequence_mean'; got"),
        ({"nan": "zero"}, "nan must be one of 'ignore', 'reject'; got 'zero'"),
        ({"opsm_delta": 0.1, "opsm_behaviour": "new"}, "opsm_behaviour must be one of 'rollout', 'old'; got 'new'"),
        ({"high": 2.0}, "weight='none' reads no low and no high; got None, 2.0"),
        ({"weight": "ratio", "low": 0.5}, "weight='ratio' reads no low and no high; got 0.5, None"),
        ({"weight": "truncate"}, "weight='truncate' needs high and no low"),
        ({"weight": "truncate", "low": 0.5, "high": 2.0}, "weight='truncate' needs high and no low"),
        ({"weight": "clip"}, "weight='clip' needs low, high or both"),
        ({"weight": "mask"}, "weight='mask' needs low, high or both"),
        ({"weight": "mask", "low": 2.0, "high": 0.5}, "low must be at most high; got 2.0, 0.5"),
        ({"weight": "clip", "low": -0.1}, "low must be a finite number, at least 0; got -0.1"),
        ({"weight": "truncate", "high": 0.0}, "high must be a finite number above 0; got 0.0"),
        ({"weight": "truncate", "high": math.inf}, "high must be .*; got inf"),
        ({"weight": "truncate", "high": "2_3"}, "high must be a finite number above 0; got '2_3'"),
        ({"level": "sequence_sum"}, "level is used by a weight only, not by weight='none'; got 'sequence_sum'"),
        ({"batch_normalise": True}, "batch_normalise needs a weight other than 'none'"),
        ({"renormalise": True}, "renormalise needs filters, a veto or opsm_delta"),
        ({"opsm_behaviour": "old"}, "opsm_behaviour is read with opsm_delta only"),
        ({"opsm_delta": -0.1}, "opsm_delta must be at least 0, or None; got -0.1"),
        ({"veto": 1.5}, "veto must be between 0 and 1, or None; got 1.5"),
        ({"veto": math.nan}, "veto must be between 0 and 1, or None; got nan"),
        ({"log_clamp": 0.0}, "log_clamp must be above 0, or None; got 0.0"),
    ],
)  # fmt: skip
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        gk.CorrectionConfig(**options)
    with pytest.raises((ValueError, TypeError), match=message):
        gk.rollout_correction(torch.zeros(1, 1), torch.zeros(1, 1), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (("k4", "mean", 0.0, 1.0), "statistic must be one of 'ratio', 'k1', .*; got 'k4'"),
        (
            ("k1", "median", 0.0, 1.0),
            "reduction must be one of 'token', 'sum', 'mean', 'min', 'max'; got 'median'",
        ),
        (("mult_prob_error", "sum", None, 2.0), "mult_prob_error has no 'sum'.*; got 'sum'"),
        (("k3", "mean"), "a filter needs low or high; got None, None"),
        (("k3", "mean", -0.1), "low must be a finite number, at least 0; got -0.1"),
        (("k1", "mean", 0.2, -0.2), "low must be at most high; got 0.2, -0.2"),
        (("ratio", "mean", None, 0.0), "high must be a finite number above 0; got 0.0"),
        (("k1", "mean", math.nan), "low must be a finite number; got nan"),
        (("k1", "mean", None, True), "high must be a finite number; got True"),
    ],
)
def test_filter_refuses(options: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.RejectionFilter(*options)
    with pytest.raises(TypeError, match="filters must be RejectionFilter objects; got"):
        gk.CorrectionConfig(filters=[options])


def test_from_verl_refuses() -> None:
    for options, message in [
        (("geometric",), "rollout_is must be one of 'token', 'sequence'; got 'geometric'"),
        (("token", "a_b"), "a threshold must be 'low_high' or one number; got 'a_b'"),
        (("token", -1.0), "a threshold must be .*; got -1.0"),
        (("token", "5_0.5"), "low must be at most high"),
        (("token", 2.0, False, "seq_max_k1", 2.0), "rollout_rs must be one of 'token_k1', .*; got 'seq_max_k1'"),
        (("token", 2.0, False, "token_k2", "0.1_0.2"), "the threshold of token_k2 must be one number; got '0.1_0.2'"),
        (("token", 2.0, False, "token_k1,token_k2", "1,2,3"), "rollout_rs_threshold must be 1 or 2 values"),
        (("token", 2.0, False, "token_k1"), "a threshold must be .*; got 'None'"),
    ]:
        with pytest.raises(ValueError, match=message):
            gk.CorrectionConfig.from_verl(*options)


def test_presets() -> None:
    for name in CORRECTION_PRESETS:
        assert gk.CorrectionConfig.preset(name).log_clamp in (None, 20.0)
    assert gk.CorrectionConfig.preset("slime_tis", high=4.0).high == 4.0
    with pytest.raises(ValueError, match="no preset 'tis'; there are nemo_icepop, "):
        gk.CorrectionConfig.preset("tis")
    assert hash(FULL) == hash(replace(FULL)) and FULL == replace(FULL)
    assert [f.name for f in fields(gk.CorrectionConfig)][:4] == ["weight", "level", "low", "high"]


def test_arguments() -> None:
    x = torch.zeros(2, 3)
    for arguments, options, message in [
        ((x, torch.zeros(3, 2)), {}, r"rollout_logps must have the shape of the tokens, \(2, 3\); got \(3, 2\)"),
        ((x, x, torch.ones(2)), {}, r"mask must have the shape of the tokens, \(2, 3\); got \(2,\)"),
        ((x[0], x[0]), {}, r"flat tokens need cu_seqlens, their sequences' boundaries; got shape \(3,\)"),
        ((x, x), {"cu_seqlens": torch.tensor([0, 6])}, r"cu_seqlens goes with flat \[N\] tokens"),
        ((x[0], x[0]), {"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens must rise from 0 to at most the 3 tokens"),
        ((x[None], x[None]), {}, r"must be \[B, T\] or flat \[N\]; got shape \(1, 2, 3\)"),
        ((x, x), {"opsm_delta": 0.1}, "opsm_delta needs logps and advantages; logps and advantages is None"),
        ((x, x), {"opsm_delta": 0.1, "logps": x}, "opsm_delta needs logps and advantages; advantages is None"),
        (
            (x, x),
            {"opsm_delta": 0.1, "logps": x, "advantages": torch.zeros(3)},
            r"advantages must have shape \(2, 3\) or \(2,\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            gk.rollout_correction(*arguments, **options)
    with pytest.raises(TypeError, match=r"rollout_logps must be a tensor; got NoneType"):
        gk.rollout_correction(x, None)
    with pytest.raises(TypeError, match="clip_max"):
        gk.rollout_correction(x, x, clip_max=3.0)
