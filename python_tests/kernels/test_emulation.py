"""The emulator on which the CUDA kernels are tested refuses what a GPU leaves undefined."""

import ctypes

import pytest
import torch
from conftest import BACKENDS_HERE, ROOT
from probes import compiled_probe

if "emulated" not in BACKENDS_HERE:
    pytest.skip("needs the source tree, whose CUDA kernels the tests emulate", allow_module_level=True)

import emulated

import grpo_kernels as gk

UNALIGNED = "an access of 16 bytes that are not aligned"
UNPUBLISHED = "a barrier that is not published, by a copy or from another block"
UNFINISHED = "a block has ended before its copies"
REFUSED = {  # by emulation_probe.cpp's names
    "load16": UNALIGNED,
    "store16": UNALIGNED,
    "store_streaming": UNALIGNED,
    "half of each warp": "bar.sync by part of a warp",
    "no whole warps": "bar.sync of a number of threads that is not whole warps",
    "two numbers of threads": "bar.sync of one barrier by two numbers of threads",
    "barrier 16": "bar.sync of a barrier that is none of the 16",
    "an arrival before the bytes": "more arrivals at a barrier than it expects",
    "no arrivals": "a barrier of no arrivals, or of too many",
    "not initialised": "a barrier not initialised, or of a block that has ended",
    "not published": UNPUBLISHED,
    "copies to a barrier that is not published": UNPUBLISHED,
    "copies not waited for": UNFINISHED,
    "copies of no bytes": "a bulk copy that is not of whole 16 bytes",
    "copies too large for the barrier": "more bytes than a barrier can wait for",
    "own copies not waited for": UNFINISHED,
    "leave behind an access": "a block has ended without a cluster_sync behind remote accesses",
    "tell one that has ended": "an access to the shared memory of a block that has ended",
    "tell nobody": "a block outside the cluster",
    "more shared memory": "more shared memory than the machine has",
    "1025 threads": "a block of no thread, or of more than 1024",
    "9 blocks": "a cluster of more blocks than every GPU has",
}
LATE = ("one_warp_ahead", "shuffled")  # schedules that find what is still open at the end


def test_what_a_gpu_leaves_undefined_is_refused(tmp_path):
    probe = compiled_probe(ROOT / "python_tests/kernels/emulation_probe.cpp", ROOT / "csrc", tmp_path)
    probe.name_of.restype = probe.run.restype = ctypes.c_char_p
    names = [probe.name_of(i).decode() for i in range(probe.count())]
    assert {n for n in names if not n.startswith("fine: ")} == set(REFUSED)
    for i, name in enumerate(names):
        for number, schedule in enumerate(emulated.SCHEDULES):
            said = probe.run(i, number).decode()
            if REFUSED.get(name) == UNFINISHED and schedule not in LATE:
                assert said in ("", f"kernel probe: {UNFINISHED}")
            else:
                assert said == (f"kernel probe: {REFUSED[name]}" if name in REFUSED else ""), (name, schedule)


def wait_of_tokens():
    logps = torch.zeros(2, 5000)
    gk.policy_loss(logps, torch.ones(2), config=gk.LossConfig(ratio_level="sequence"), backend="emulated")


def wait_of_gae():
    gk.gae(torch.ones(1, 5000), torch.ones(1, 5000), gamma=1.0, lam=1.0, backend="emulated")


def wait_of_decisions():
    gk.group_diversity(torch.ones(2, 9, dtype=torch.int64), group_size=2, backend="emulated")


WAITS = {  # what waits, whose workspace, the ticket that its first block gets: of a phase or a place further on
    "token_kernel": (wait_of_tokens, "tokens", 6),
    "gae_kernel": (wait_of_gae, "gae", 1),
    "decide_kernel": (wait_of_decisions, "diversity", 1),
}


@pytest.mark.parametrize("kernel", WAITS)
def test_a_wait_that_never_ends_names_its_kernel(kernel, monkeypatch):
    call, name, first_ticket = WAITS[kernel]
    make = getattr(emulated.BACKEND._workspaces, name)

    def without_the_first_blocks(*args):
        made = make(*args)
        (made[1] if name == "diversity" else made).counters[0] = first_ticket
        return made

    call()
    monkeypatch.setattr(emulated.BACKEND._workspaces, name, without_the_first_blocks)
    with pytest.raises(RuntimeError, match=f"kernel {kernel}: a wait for a block that has not run"):
        call()
