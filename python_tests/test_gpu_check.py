"""The script for machines with a GPU, as far as one without can tell: its plumbing, and that it does not pretend."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="installed without the benchmarks")


def gpu_check(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = gpu_check("--out", str(tmp_path / "out.json"))
    assert done.returncode == 1 and "no GPU" in done.stderr and not list(tmp_path.iterdir())


def test_a_dry_run_stops_in_time_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    late = gpu_check("--dry", "--part", "build", "--limit", "0", "--out", str(out))
    assert late.returncode == 3 and json.loads(out.read_text())["missing"]["build"] == ["native", "emulated"]
    first = gpu_check("--dry", "--out", str(out))
    state = json.loads(out.read_text())
    assert first.returncode == 0, first.stderr + json.dumps(state["parts"], indent=1)
    assert state["dry"] and not any(state["missing"].values())
    assert state["parts"]["test"]["test_docs.py"]["passed"] > 10
    assert state["parts"]["bench"]["bench_advantages.py"]["cases"][0]["providers"]
    again = gpu_check("--dry", "--part", "test,sanitize,bench", "--out", str(out))
    assert again.returncode == 0 and json.loads(out.read_text()) == state


def test_the_bytes_of_a_profile_by_kernel() -> None:
    from benchmarks.gpu_check import bytes_per_logit

    profile = "\n".join(
        [
            "==PROF== Connected to process 1",
            '{"logits": 1000}',
            '"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"',
            '"","","byte","byte"',
            '"0","void gk::(anonymous namespace)::row_kernel<float, (bool)1>(gk::RowArgs)","2,048","16"',
            '"1","row_policy(Params)","2000","2000"',
            '"2","row_policy(Params)","2000","0"',
        ]
    )
    assert bytes_per_logit(profile) == {"row_kernel": [2.064], "row_policy": [4.0, 2.0]}
