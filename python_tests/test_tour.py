"""What CONTRIBUTING.md says about the code still holds: the places, and the tour from `grpo_loss` to a logit."""

import ast
import re
import sys

import pytest
import torch
from conftest import ROOT

import grpo_kernels as gk
from grpo_kernels.backends import implementation

PAGE = ROOT / "CONTRIBUTING.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")

TEXT = PAGE.read_text() if PAGE.exists() else ""
STOP = re.compile(r"^(\d+)\. `(\S+)`: (.*)$", re.MULTILINE)
NAME = re.compile(r"`([A-Za-z_][\w.:]*)`")
START, *TOURS = (STOP.findall(part) for part in re.split(r"^(?:On the CPU|With \w.*):$", TEXT, flags=re.MULTILINE))
MOST = {"CPU": 9, "Triton": 7, "CUDA": 10}
STOPS = sorted({stop[1:] for tour in (START, *TOURS) for stop in tour})


def named(text):
    """The functions that a stop names, before its explanation."""
    return NAME.findall(re.split(r", (?!`)|; | \(", text)[0])


def functions(path):
    """Qualified names of the functions and classes of a Python module."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + child.name
                yield from walk(child, f"{prefix}{child.name}.")

    return set(walk(ast.parse(path.read_text()), ""))


def defines(source, name):
    """Whether C++ `source` defines `name`, a function or a class, or binds a function of that name."""
    function = rf"(?<![\w.>])(?<!return ){name}\([^;{{}}\[]*\)[^;{{}}()]*\{{"
    return re.search(rf"{function}|\b(class|struct) {name}\b|^\s*\"{name}\",$", source, re.MULTILINE) is not None


@pytest.mark.parametrize(("most", "tour"), [*zip(MOST.values(), TOURS, strict=True)], ids=[*MOST])
def test_the_tour_is_short(most, tour):
    stops = START + tour
    assert [int(number) for number, _, _ in stops] == list(range(1, len(stops) + 1))
    assert len(START) == 3 and len({file for _, file, _ in stops}) == len(stops) <= most


@pytest.mark.parametrize(("file", "text"), STOPS, ids=[file for file, _ in STOPS])
def test_what_a_stop_names_exists(file, text):
    names = named(text)
    assert names
    if file.endswith(".py"):
        assert set(names) <= functions(ROOT / file)
    else:
        source = re.sub(r"//[^\n]*", "", (ROOT / file).read_text())
        assert not [name for name in names for part in name.split("::") if not defines(source, part)]
    if reads := re.search(r"(?:first|every other) read is (.*)$", text):
        assert all(code in (ROOT / file).read_text() for code in re.findall(r"`([^`]*)`", reads[1]))


def test_a_row_takes_the_tour():
    """On the CPU every Python function that the tour names is called, those above the backends in the tour's order."""
    called = []

    def note(frame, event, _):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(ROOT / "grpo_kernels")):
            called.append((file.removeprefix(f"{ROOT}/"), frame.f_code.co_name))

    implementation.cache_clear()
    logits = torch.randn(2, 3, 50, requires_grad=True)
    sys.setprofile(note)
    try:
        gk.grpo_loss(logits, torch.randint(50, (2, 3)), torch.randn(2))
    finally:
        sys.setprofile(None)
    stops = [(file, name) for _, file, text in START + TOURS[0] for name in named(text)]
    python = [(file, name.split(".")[-1]) for file, name in stops if file.endswith(".py")]
    assert not [stop for stop in python if stop not in called]
    above = [stop for stop in python if "backends" not in stop[0]]
    assert sorted(above, key=called.index) == above


def test_every_place_exists():
    table = TEXT.partition("## Where things are")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", table, re.MULTILINE)
    places = [place for first, _ in rows for place in re.findall(r"`([^`]+)`", first) if place != ".cu"]
    assert len(places) > 30 and not [place for place in places if not (ROOT / place).exists()]
    for first, rest in rows:
        (folder, *_) = re.findall(r"`([^`]+)`", first)
        home = ROOT / folder if folder.endswith("/") else (ROOT / folder).parent
        for name in re.findall(r"`([\w/]+(?:\.(?:py|cpp|cu|cuh|h)|/))`", rest):
            assert (home / name).exists() or (ROOT / name).exists(), (folder, name)


def test_every_file_that_another_section_names_exists():
    for name in re.findall(r"`((?:grpo_kernels|csrc|python_tests|benchmarks|docs)/[\w./]+)`", TEXT):
        assert (ROOT / name).exists(), name
