"""Peak memory on the CPU, seen from both sides: what torch's allocator handed out, and what the process held."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .events import native_stderr_silenced
from .profile import profile_memory

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_HIGH_WATER_MARK = "5"
_SAMPLING_SECONDS = 0.001


@dataclass(frozen=True)
class PeakMemory:
    """Above what was there before the call.

    `tensor_bytes` is exact: tensors alive at one moment, those inside operators and autograd included. `resident_bytes`
    also has the scratch memory of C++ and of the BLAS, and is good to about 1 MiB; None where it cannot be measured.
    """

    tensor_bytes: int
    largest_tensor_bytes: int  # one allocation
    resident_bytes: int | None


def peak_memory(
    run: Callable[[], object],
    *,
    setup: Callable[[], object] | None = None,
    warm_up: bool = True,
    resident: bool = True,
) -> PeakMemory:
    """Peak memory of `run`, its result included. Called up to three times: to warm up, for tensors, for the process.

    Args:
        run: what it returns stays alive until its peak has been read.
        setup: called before each run, not measured (restores what an in-place run overwrote).
        warm_up: False where it has run already (the first run makes thread pools and caches that stay).
        resident: False leaves the process's memory out.
    """

    def prepared() -> Callable[[], object]:
        if setup is not None:
            setup()
        return run

    if warm_up:
        prepared()()
    gc.collect()
    tensors, largest = _tensor_peak(prepared())
    return PeakMemory(tensors, largest, _resident_peak(prepared()) if resident else None)


# ---- tensors ----


def _tensor_peak(run: Callable[[], object]) -> tuple[int, int]:
    with native_stderr_silenced(), profile_memory("cpu", shapes=False) as profile:
        result = run()
    del result
    return profile.peak, profile.largest


# ---- the process ----


def _resident_peak(run: Callable[[], object]) -> int | None:
    _return_free_memory()
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK)
        before = _high_water_mark()
    except (OSError, LookupError):
        return _sampled_resident_peak(run)
    result = run()
    after = _high_water_mark()
    del result
    return max(after - before, 0)


def _high_water_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise LookupError("VmHWM")


def _return_free_memory() -> None:
    """Else the run could reuse what the C library kept after a free, and seem to need nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _sampled_resident_peak(run: Callable[[], object]) -> int | None:
    """Where the kernel's high-water mark cannot be reset: a thread that looks every millisecond, so a lower bound."""
    try:
        import psutil
    except ImportError:
        return None
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLING_SECONDS):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = run()
        peak = max(peak, process.memory_info().rss)
        del result
    finally:
        done.set()
        watcher.join()
    return max(peak - before, 0)
