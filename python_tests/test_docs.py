"""The examples in the documentation run, and the documentation is complete."""

import re
from pathlib import Path

import pytest

import grpo_kernels as gk
from grpo_kernels.config import AGGREGATIONS, KL_ESTIMATORS, KL_GRADIENTS, METRICS, OBJECTIVES, RATIO_LEVELS
from grpo_kernels.presets import PRESETS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
CALLS = [
    (page.name, call)
    for page in PAGES
    for call in re.findall(r"`((?:LossConfig|CorrectionConfig)[.(][^`]*\))`", page.read_text())
    if "..." not in call
]  # fmt: skip
EXAMPLES = {
    page.name: blocks
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES)
    if (blocks := re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
}


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run_as_pasted(page, tmp_path, monkeypatch):
    """All examples of a page, in order and in one namespace, have losses that are finite and of a plausible size."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, example in enumerate(EXAMPLES[page]):
        namespace.pop("out", None)
        exec(compile(example, f"{page}, example {number}", "exec"), namespace)
        if "out" in namespace:
            assert abs(namespace["out"].loss) < 1 and isinstance(namespace["out"], gk.LossOutput)


def test_the_readme_shows_every_loss():
    shown = "\n".join(EXAMPLES["README.md"])
    assert all(f"{name}(" in shown for name in ("grpo_loss", "linear_grpo_loss", "token_logps", "rollout_correction"))


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


def test_every_test_that_a_page_names_is_there():
    text = (DOCS / "reliability.md").read_text()
    tests = "\n".join(page.read_text() for page in (ROOT / "python_tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 50 and not [name for name in named if f"def {name}(" not in tests]


def test_every_preset_is_in_the_migration_guide():
    text = (DOCS / "migrating.md").read_text()
    assert not [name for name in PRESETS if f"`{name}`" not in text and f'"{name}"' not in text]
