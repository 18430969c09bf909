"""An enumerator of csrc is the position of a name in Python. The orders are compared, so that neither changes alone."""

import re

import pytest
from conftest import ROOT

from grpo_kernels.backends import cpu
from grpo_kernels.config import (
    ADVANTAGES,
    KL_ESTIMATORS,
    KL_GRADIENTS,
    METRICS,
    OBJECTIVES,
    RATIO_LEVELS,
    Scalars,
)
from grpo_kernels.inputs.grouping import BASELINES, SCALES, VALUE_METRICS

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")


def enumerators(file, name):
    text = re.sub(r"//[^\n]*", "", (ROOT / "csrc" / file).read_text())
    (body,) = re.findall(rf"enum (?:class )?{name}\b[^{{;]*{{([^}}]*)}}", text)
    return [word.strip() for word in body.split(",") if word.strip()]


def snake(name):
    """kClipLowMin to clip_low_min, kApproxKlK3 to approx_kl_k3."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removeprefix("k")).lower()


@pytest.mark.parametrize(
    ("file", "name", "names"),
    [
        ("math/policy.h", "Objective", OBJECTIVES),
        ("math/policy.h", "RatioLevel", RATIO_LEVELS),
        ("math/policy.h", "KlEstimator", KL_ESTIMATORS),
        ("math/policy.h", "KlGradient", KL_GRADIENTS),
        ("math/policy.h", "Advantages", ADVANTAGES),
        ("math/advantage.h", "Baseline", BASELINES),
        ("math/advantage.h", "Scale", SCALES),
    ],
)
def test_names(file, name, names):
    assert enumerators(file, name) == list(names)


def test_metrics():
    assert [snake(name) for name in enumerators("math/tokens.h", "Metric")] == [*METRICS, "metric_count"]
    of_the_critic = dict(zip(enumerators("kernels.h", "ValueMetric"), VALUE_METRICS, strict=False))
    assert of_the_critic == {
        "kValueTokens": "tokens", "kValueClipped": "clip_fraction", "kValueMean": "value_mean",
        "kReturnMean": "return_mean",
    }  # fmt: skip


def test_instruction_sets():
    assert enumerators("cpu/sweep.h", "Isa") == [*cpu.INSTRUCTION_SETS, "kCount"]


def test_scalars():
    text = (ROOT / "csrc/math/policy.h").read_text()
    (body,) = re.findall(r"struct Scalars {\n(.*?)};", text, re.DOTALL)
    assert re.findall(r"\w+", body.replace("T ", " ")) == list(Scalars._fields)
    assert f"constexpr int kScalars = {len(Scalars._fields)};" in text
