"""Something is removed from the kernels, and the machine notices."""

import pytest
from conftest import ROOT

from .test_kernels import HERE, run

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")


def check(backend, *arguments):
    outcomes = run("mutants", backend, *arguments)
    for found in outcomes:
        print(f"{found['mutant']}: {found['said'][:200]}")
    assert outcomes and not [found["mutant"] for found in outcomes if found["said"] == "ok"]


@pytest.mark.parametrize("backend", HERE)
def test_what_is_missing_is_noticed(backend):
    check(backend)


@pytest.mark.soak
@pytest.mark.parametrize("backend", HERE)
def test_what_is_missing_is_noticed_in_large_cases(backend):
    check(backend, "--soak")
