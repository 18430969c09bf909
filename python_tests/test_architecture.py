"""The picture of the architecture is up to date."""

import graphlib
import importlib.util
import re

import pytest
from conftest import ROOT

SCRIPT = ROOT / "docs" / "draw_architecture.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("draw_architecture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_picture_is_current(script):
    assert script.PICTURE.read_text() == script.drawn(), "run python docs/draw_architecture.py and commit the picture"


def test_arrows_point_downwards(script):
    arrows = re.findall(r'd="M\d+ (\d+)C.* (\d+)" fill="none"', script.drawn())
    assert len(arrows) == sum(map(len, script.architecture()[0].values()))
    assert all(int(begin) < int(end) for begin, end in arrows)


def test_an_import_that_runs_upwards_is_an_error(script, monkeypatch):
    imports = script.python_imports()
    imports["inputs"].add("loss")
    monkeypatch.setattr(script, "python_imports", lambda: imports)
    with pytest.raises(graphlib.CycleError, match="inputs"):
        script.drawn()


def test_a_new_box_needs_a_column(script, monkeypatch):
    imports = {**script.python_imports(), "losses": {"config"}}
    monkeypatch.setattr(script, "python_imports", lambda: imports)
    with pytest.raises(ValueError, match="disagree about losses"):
        script.drawn()
