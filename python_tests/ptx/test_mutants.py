"""Something is removed from a kernel, and the machine notices."""

import pytest
from conftest import ROOT

from .test_kernels import HERE, run

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")


def check(backend, *arguments):
    outcomes = run("mutants", backend, *arguments)
    for outcome in outcomes:
        print(f"{outcome['mutant']}: {outcome['said'][:200]}")
    assert outcomes and not [outcome["mutant"] for outcome in outcomes if outcome["said"] == "ok"]


@pytest.mark.parametrize("backend", HERE)
def test_mutants_are_noticed(backend):
    check(backend)


@pytest.mark.soak
@pytest.mark.parametrize("backend", HERE)
def test_mutants_of_large_cases_are_noticed(backend):
    check(backend, "--soak")
