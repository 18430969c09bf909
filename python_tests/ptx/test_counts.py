"""The number of instructions that the kernels execute, compared with counts.json. After an intended change of more than
a few per cent, `python -m ptx.counts cuda|triton --pin` writes the new numbers."""

import json

import pytest
from conftest import ROOT

from .counts import PINNED, compiler, table
from .test_kernels import HERE, run

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")
SAME = 0.03  # schedules differ in how often a wait is tried


@pytest.mark.parametrize("backend", HERE)
def test_instructions(backend):
    pinned = json.loads(PINNED.read_text()).get(compiler(backend))
    if pinned is None:
        pytest.skip(f"nothing is pinned for {compiler(backend)}")
    (measured,) = run("counts", backend)
    now = measured[compiler(backend)]
    assert now.keys() == pinned.keys()
    changed = {
        name: f"{pinned[name][0]} to {now[name][0]}" for name in pinned
        if abs(now[name][0] - pinned[name][0]) > SAME * pinned[name][0]
    }  # fmt: skip
    assert not changed, f"{changed}; if that is meant, run `python -m ptx.counts {backend} --pin` in python_tests"


def test_measurements_show_the_pinned_counts():
    shown = (ROOT / "docs" / "measurements.md").read_text()
    expected = table(json.loads(PINNED.read_text()))
    assert expected in shown, f"docs/measurements.md should have\n{expected}"
