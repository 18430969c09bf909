"""`profile_memory`: what it sees is what the allocator did, whatever the code inside does."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

import grpo_kernels as gk
from grpo_kernels.tools.memory import load_snapshot, profile_memory, snapshot_profile
from grpo_kernels.tools.memory.events import MemoryEvent, TensorEvent, blocks_of, curve_of

N, V, H = 64, 5003, 32
SIZES = {"N": N, "V": V, "H": H}
NB = 1 << 20  # elements of the blocks below, 4 MiB each


def eager_step() -> tuple[torch.Tensor, ...]:
    hidden, weight = torch.randn(N, H).requires_grad_(), torch.randn(V, H).requires_grad_()
    with record_function("lm_head"):
        logits = hidden @ weight.t()
    with record_function("loss"):
        logps = torch.log_softmax(logits, -1).gather(-1, torch.zeros(N, 1, dtype=torch.int64))
        loss = -logps.mean()
    del logits, logps
    with record_function("backward"):
        return torch.autograd.grad(loss, (hidden, weight))


# ---- peak and timeline ----


def test_peak_timeline_and_what_is_left():
    def run() -> torch.Tensor:
        first = torch.empty(NB)
        second = torch.empty(NB)
        del first
        return torch.empty_like(second)

    with profile_memory() as profile:
        kept = run()
    sizes = [nbytes for _, nbytes in profile.timeline if nbytes % (4 << 20) == 0]
    assert sizes == [4 << 20, 8 << 20, 4 << 20, 8 << 20, 4 << 20]
    assert (profile.peak, profile.largest, profile.left) == (8 << 20, 4 << 20, 4 << 20)
    assert [seconds for seconds, _ in profile.timeline] == sorted(seconds for seconds, _ in profile.timeline)
    assert profile.device == "cpu" and kept.numel() == NB


def test_memory_that_was_there_before_does_not_count():
    there = [torch.ones(NB)]
    with profile_memory() as profile:
        there.clear()
        torch.ones(NB // 2)
    assert profile.peak == 2 << 20 and profile.left == 0


def test_nothing_allocated_is_a_profile_too(tmp_path):
    with profile_memory() as profile:
        pass
    assert (profile.peak, profile.left, profile.at_peak, profile.timeline) == (0, 0, [], [])
    assert "0.0 KiB" in profile.table()


def test_memory_inside_a_custom_operator_is_seen():
    hidden, weight = torch.randn(1, N, H).requires_grad_(), torch.randn(V, H).requires_grad_()
    targets = torch.zeros(1, N, dtype=torch.int64)
    with profile_memory(sizes=SIZES) as profile:
        gk.linear_grpo_loss(hidden, weight, targets, torch.ones(1), chunk_rows=N, backend="cpu").loss.backward()
    held = dict(profile.at_peak)
    assert held["logits, then their gradient, fp32 [N, V]"] == N * V * 4
    assert held["gradient of lm_head, fp32 [V, H]"] == V * H * 4


def test_what_holds_the_peak_is_named_and_adds_up():
    with profile_memory(sizes=SIZES) as profile:
        eager_step()
    held = dict(profile.at_peak)
    assert sum(held.values()) == profile.peak
    for name in ("log-softmax", "gradient of log-softmax", "gradient of logits"):
        assert held[f"{name}, fp32 [N, V]"] == N * V * 4
    table = profile.table(rows=2)
    assert "log-softmax" in table and "others" in table and len(table.splitlines()) == 4


def test_without_sizes_the_operator_and_the_shape_are_the_name():
    with profile_memory() as profile:
        eager_step()
    assert f"log-softmax, fp32 [{N}, {V}]" in dict(profile.at_peak)


def test_without_shapes_the_bytes_are_the_same():
    peaks = []
    for shapes in (True, False):
        with profile_memory(shapes=shapes) as profile:
            eager_step()
        peaks.append(profile.peak)
    assert peaks[0] == peaks[1] and all(block.shape is None for block in profile.blocks)


def test_record_function_blocks_are_phases():
    with profile_memory() as profile:
        eager_step()
    phases = {phase.name: phase for phase in profile.phases}
    assert list(phases) == ["lm_head", "loss", "backward"]
    assert phases["lm_head"].peak < phases["loss"].peak < phases["backward"].peak == profile.peak
    assert phases["backward"].begin <= profile.peak_seconds <= phases["backward"].end


# ---- any code inside ----


def test_an_exception_passes_and_the_profile_holds_what_happened():
    with pytest.raises(ZeroDivisionError), profile_memory() as profile:
        kept = torch.ones(NB)
        kept.sum() / (1 // 0)
    assert profile.peak >= 4 << 20


def test_nested_profiles_are_their_own_windows():
    with profile_memory() as outer:
        first = torch.empty(NB)
        with profile_memory() as inner:
            torch.ones(NB // 2)
            with profile_memory() as innermost:
                torch.ones(NB // 4)
        with pytest.raises(RuntimeError, match="outermost"):
            _ = inner.peak
        del first
    assert (outer.peak, inner.peak, innermost.peak) == (6 << 20, 2 << 20, 1 << 20)
    assert outer.phases == [] == inner.phases


def test_a_profile_that_is_not_finished_says_so():
    with profile_memory() as profile, pytest.raises(RuntimeError, match="filled when"):
        profile.table()


def test_inside_another_profiler_it_refuses_and_leaves_that_alone():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as other:
        with pytest.raises(RuntimeError, match="active"), profile_memory():
            pass
        torch.ones(3)
    assert any(event.key == "aten::ones" for event in other.key_averages())


def test_another_profile_can_follow_an_exception():
    with pytest.raises(ValueError), profile_memory(), profile_memory():
        raise ValueError
    with profile_memory() as profile:
        torch.ones(NB)
    assert profile.peak == 4 << 20


def test_other_threads_are_not_seen():
    with profile_memory() as profile:
        thread = threading.Thread(target=torch.ones, args=(NB,))
        thread.start()
        thread.join()
    assert profile.peak < 4 << 20


def test_standard_error_is_the_users(capfd):
    with profile_memory():
        torch.ones(2)
        import os

        os.write(2, b"mine\n")
    assert "mine" in capfd.readouterr().err


# ---- a GPU's own counters, without a GPU ----


@pytest.fixture
def counters(monkeypatch) -> list[str]:
    """torch.cuda of a machine where 100 bytes are allocated, at most 700, from a pool of 1024."""
    calls: list[str] = []
    values = {"memory_allocated": 100, "max_memory_allocated": 700, "max_memory_reserved": 1024, "current_device": 1}
    for name in ("synchronize", "reset_peak_memory_stats", *values):
        monkeypatch.setattr(
            torch.cuda, name, lambda *device, name=name: calls.append(f"{name} {device}") or values.get(name)
        )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return calls


def test_cuda_counters_stand_beside_the_events(counters):
    with profile_memory() as outer, profile_memory("cuda") as inner, profile_memory("cpu") as on_cpu:
        torch.ones(NB)
    assert (outer.device, inner.device, on_cpu.device) == ("cuda:1", "cuda:1", "cpu")
    assert vars(outer.cuda) == {"allocated_before": 100, "max_allocated": 700, "max_reserved": 1024}
    assert inner.cuda is None and on_cpu.cuda is None  # whose reset would have lost the outer one's peak
    assert counters.count("reset_peak_memory_stats ('cuda:1',)") == 1
    assert (outer.peak, on_cpu.peak) == (0, 4 << 20)


# ---- what it leaves ----


def test_json_and_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    with profile_memory(sizes=SIZES) as profile:
        eager_step()
    figures = json.loads(json.dumps(profile.to_dict()))
    assert figures["peak_bytes"] == profile.peak == max(nbytes for _, nbytes in figures["timeline"])
    assert figures["at_peak"][0]["nbytes"] == N * V * 4
    profile.plot(tmp_path / "memory.png", title="a step")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_layers_of_the_picture_add_up_to_the_timeline():
    with profile_memory(sizes=SIZES) as profile:
        eager_step()
    panel = profile.panel()
    assert panel.totals == [nbytes for _, nbytes in profile.timeline]
    assert len(panel.layers) > 3


def test_a_missing_matplotlib_is_one_sentence(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with profile_memory() as profile:
        torch.ones(2)
    with pytest.raises(ImportError, match=r"pip install 'grpo-kernels\[bench\]'"):
        profile.plot(tmp_path / "x.png")


# ---- events ----


def event(seconds: float, address: int, nbytes: int, device: str = "cpu") -> MemoryEvent:
    return MemoryEvent(seconds, address, nbytes, device, (), None)


def test_frees_of_unknown_addresses_and_other_devices_are_ignored():
    events = [event(0, 1, -8), event(1, 2, 4), event(2, 1, -8), event(3, 3, 4), event(3.5, 3, 64, "cuda:0")]
    blocks, times = blocks_of([*events, event(4, 2, -4), event(5, 4, 2)], "cpu")
    assert curve_of(blocks, len(times)) == [0, 4, 4, 8, 4, 6]


def test_a_block_takes_the_shape_that_fills_it():
    reads = [TensorEvent(1, 7, (2, 2), torch.float32), TensorEvent(2, 7, (4, 4), torch.float32)]
    (block,), _ = blocks_of([event(0, 7, 64), *reads], "cpu")
    assert block.shape == (4, 4)
    (rounded,), _ = blocks_of([event(0, 7, 512), *reads], "cpu")  # of CUDA's allocator
    assert rounded.shape == (2, 2)


# ---- snapshots ----

FRAMES = [
    {"filename": "??", "line": 0, "name": "at::native::empty"},
    {"filename": "/site-packages/torch/nn/functional.py", "line": 5, "name": "linear"},
    {"filename": "/home/me/train.py", "line": 41, "name": "step"},
]


def entry(action: str, address: int, size: int, microseconds: int) -> dict:
    return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": microseconds, "frames": FRAMES}


TRACE = [
    entry("segment_alloc", 0, 1 << 21, 0),
    entry("alloc", 512, 1024, 10),
    entry("alloc", 2048, 512, 20),
    entry("free_requested", 512, 1024, 30),
    entry("free_completed", 512, 1024, 31),
    entry("alloc", 512, 256, 40),
]


def test_a_snapshot_becomes_a_profile(tmp_path: Path):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [TRACE, []]}))
    profile = snapshot_profile(load_snapshot(path))
    assert profile.device == "cuda:0" and profile.peak == 1536
    assert [nbytes for _, nbytes in profile.timeline] == [1024, 1536, 512, 768]
    assert profile.timeline[-1][0] == pytest.approx(30e-6)
    assert dict(profile.at_peak) == {"train.py:41 step": 1536}


def test_a_snapshot_without_history_says_what_to_do():
    with pytest.raises(ValueError, match="_record_memory_history"):
        snapshot_profile({"segments": [], "device_traces": [[]]}, device=0)


class Evil:
    def __reduce__(self):
        return (print, ("code of the file ran",))


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"no pickle", pickle.dumps({"segments": []}), b""])
def test_a_file_that_is_no_snapshot_is_refused_and_not_run(tmp_path, content, capsys):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a CUDA memory snapshot"):
        load_snapshot(path)
    assert "ran" not in capsys.readouterr().out


# ---- the document ----


def test_the_example_of_the_document_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    page = Path(__file__).parents[2] / "docs" / "profiling.md"
    example = page.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(page), "exec"), {})
    shown = capsys.readouterr().out.splitlines()
    documented = page.read_text().split("```\ncpu: peak")[1].splitlines()
    assert shown[0] == f"cpu: peak{documented[0]}" and shown[1] == documented[1]
    assert (tmp_path / "memory.png").is_file()
