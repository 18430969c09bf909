"""What the documents show can be run."""

import re
from pathlib import Path

import pytest

import grpo_kernels as gk
from grpo_kernels.config import AGGREGATIONS, KL_ESTIMATORS, KL_GRADIENTS, METRICS, OBJECTIVES, RATIO_LEVELS
from grpo_kernels.presets import PRESETS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
CALLS = [
    (page.name, call)
    for page in PAGES
    for call in re.findall(r"`((?:LossConfig|CorrectionConfig)[.(][^`]*\))`", page.read_text())
    if "..." not in call
]  # fmt: skip


@pytest.mark.parametrize(("page", "call"), CALLS)
def test_configurations_build(page, call):
    assert isinstance(eval(call, vars(gk)), (gk.LossConfig, gk.CorrectionConfig))


def test_every_function_is_documented():
    text = (DOCS / "objectives.md").read_text()
    around = {"token_logps", "linear_token_logps", "policy_loss", "grpo_loss", "linear_grpo_loss", "available_backends"}
    functions = {name for name in gk.__all__ if name.islower()} - around
    assert not [name for name in functions if f"`{name}" not in text]


def test_every_name_is_documented():
    text = (DOCS / "objectives.md").read_text()
    for name in (*OBJECTIVES, *RATIO_LEVELS, *KL_ESTIMATORS[1:], *KL_GRADIENTS, *AGGREGATIONS):
        assert f"`{name}`" in text, name
    docstring = gk.LossOutput.__doc__
    shown = docstring.replace("ratio_mean/min/max", "ratio_mean ratio_min ratio_max")
    shown = shown.replace("weight_mean/min/max", "weight_mean weight_min weight_max")
    assert not [name for name in METRICS if name not in shown]


def test_every_preset_is_in_the_migration_guide():
    text = (DOCS / "migrating.md").read_text()
    assert not [name for name in PRESETS if f"`{name}`" not in text and f'"{name}"' not in text]
