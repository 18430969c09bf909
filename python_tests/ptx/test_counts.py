"""How many instructions the kernels execute, against counts.json: a change of more than a few per cent is to be seen, and
written there by `python -m ptx.counts cuda|triton --pin`."""

import json

import pytest
from conftest import ROOT

from .counts import PINNED, compiler, table
from .test_kernels import HERE, run

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")
SAME = 0.03  # schedules differ by a few attempts of a wait


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


def test_the_notebook_shows_what_is_pinned():
    shown = (ROOT / "docs" / "measurements.md").read_text()
    expected = table(json.loads(PINNED.read_text()))
    assert expected in shown, f"docs/measurements.md should have\n{expected}"
