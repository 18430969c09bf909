"""`interpreter.py` makes Triton's interpreter fast without changing a bit of a result."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKENDS_HERE, environment

import grpo_kernels as gk
from grpo_kernels.testing.inputs import make_batch

pytest.importorskip("triton")
from grpo_kernels.backends.triton.launch import INTERPRETED

if not INTERPRETED or "triton" not in BACKENDS_HERE:
    pytest.skip("a GPU needs no interpreter", allow_module_level=True)

import triton
import triton.language as tl

HERE = Path(__file__).parents[1]
EVERYTHING = {"kl_coef": 0.1, "entropy_coef": 0.05, "delta": 1.6, "dual_clip": 1.4}


def results():
    """The results of kernels that stand for all: rows, tokens, pooled sequences, groups and sets, but no scans."""
    torch.manual_seed(0)
    outputs = []
    for dtype, level in ((torch.float32, "sequence"), (torch.float64, "token"), (torch.bfloat16, "token")):
        b = make_batch(3, 4, 37).to(dtype)
        x, config = b.logits.requires_grad_(), gk.LossConfig(**EVERYTHING, ratio_level=level)
        out = gk.grpo_loss(
            x, b.targets, b.advantages, b.mask, config=config, softcap=9.0, backend="triton", **b.keywords()
        )
        out.loss.backward()
        outputs += [out.loss.detach(), out.per_token_loss, torch.stack(list(out.metrics.values())), x.grad]
    rewards, ids = torch.randn(12), torch.arange(12) % 5
    outputs += gk.group_advantages(rewards, group_ids=ids, backend="triton")
    outputs += gk.group_diversity(torch.randint(4, (6, 9)), group_size=3, ngram=2, threshold=0.5, backend="triton")
    return outputs


PLAIN = """
import sys
import interpreter
interpreter.patch_the_language_once_per_launch()  # or it takes four times as long
interpreter.round_to_bfloat16()
import torch, test_interpreter
torch.save(test_interpreter.results(), sys.argv[1])
"""


def test_no_bit_differs_from_the_unpatched_interpreter(tmp_path):
    paths = os.pathsep.join([str(HERE), *sys.path])
    command = [sys.executable, "-c", PLAIN, tmp_path / "plain.pt"]
    done = subprocess.run(command, env=environment(PYTHONPATH=paths), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain, ours = torch.load(tmp_path / "plain.pt"), results()
    assert len(plain) == len(ours) > 15
    for i, (a, b) in enumerate(zip(plain, ours, strict=True)):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), i


@triton.jit
def followed(a, b, c, d):
    """x -> a x + b, then x -> c x + d."""
    return a * c, b * c + d


@triton.jit
def scan_kernel(factors, terms, out, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    _, total = tl.associative_scan((tl.load(factors + i), tl.load(terms + i)), 0, followed, reverse=REVERSE)
    tl.store(out + i, total)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_combines_every_element_once_and_in_order(reverse):
    """Small integers, so that no order of additions rounds."""
    factors, terms = torch.randint(-1, 2, (64,)).double(), torch.randint(-9, 10, (64,)).double()
    out = torch.empty_like(terms)
    scan_kernel[(1,)](factors, terms, out, BLOCK=64, REVERSE=reverse)
    state, expected = 0.0, []
    for a, b in list(zip(factors, terms, strict=True))[:: -1 if reverse else 1]:
        state = (a * state + b).item()
        expected.append(state)
    assert out.tolist() == expected[:: -1 if reverse else 1] and np.ptp(expected) > 9
