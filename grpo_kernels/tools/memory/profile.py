"""`profile_memory()`: the peak and the timeline of tensors alive in any piece of torch code."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..tables import Table
from ..units import readable_bytes
from .events import Block, Recorder, Recording, Span, blocks_of, curve_of, device_name
from .labels import grouped, is_scratch, label
from .plot import Panel, save_panels, worth_drawing


class Holding(NamedTuple):
    """What holds memory, and how much of it."""

    label: str
    nbytes: int


class Phase(NamedTuple):
    """A `torch.profiler.record_function` block: its times in seconds, the most bytes alive inside it."""

    name: str
    begin: float
    end: float
    peak: int


@dataclass(frozen=True)
class CudaCounters:
    """What torch.cuda itself counted meanwhile: bytes of tensors and of the pool that they are cut from."""

    allocated_before: int
    max_allocated: int
    max_reserved: int


class MemoryProfile:
    """Filled when its `profile_memory()` block ends; all bytes are above what was allocated before it."""

    def __init__(self, device: str, sizes: Mapping[str, int] | None = None) -> None:
        self.device = device
        self.cuda: CudaCounters | None = None
        self.sizes = sizes
        self._recording: Recording | None = None

    def fill(self, recording: Recording) -> None:
        self._recording = recording

    @property
    def recording(self) -> Recording:
        if self._recording is None:
            raise RuntimeError(
                "the profile is filled when the outermost profile_memory() block ends; read it after that"
            )
        return self._recording

    @functools.cached_property
    def _blocks_and_times(self) -> tuple[list[Block], list[float]]:
        return blocks_of(self.recording.events, self.device)

    @property
    def blocks(self) -> list[Block]:
        """Every allocation, in order."""
        return self._blocks_and_times[0]

    @property
    def times(self) -> list[float]:
        """Seconds of each allocation and release; `Block.born` and `died` point into it."""
        return self._blocks_and_times[1]

    @functools.cached_property
    def curve(self) -> list[int]:
        """Bytes alive after each of `times`."""
        return curve_of(self.blocks, len(self.times))

    @property
    def timeline(self) -> list[tuple[float, int]]:
        """(seconds, bytes alive) after every allocation and release."""
        return list(zip(self.times, self.curve, strict=True))

    @property
    def peak(self) -> int:
        """Most bytes alive at one moment."""
        return max(self.curve, default=0)

    @functools.cached_property
    def peak_without_scratch(self) -> int:
        """The same without the scratch memory of matmuls, which is the BLAS's and the processor's own."""
        tensors = [block for block in self.blocks if not is_scratch(block)]
        return max(curve_of(tensors, len(self.times)), default=0)

    @property
    def peak_step(self) -> int:
        """Where in `times` and `curve` the peak is first reached."""
        return self.curve.index(self.peak) if self.curve else 0

    @property
    def peak_seconds(self) -> float:
        return self.times[self.peak_step] if self.times else 0.0

    @property
    def largest(self) -> int:
        """Bytes of the largest single allocation."""
        return max((block.nbytes for block in self.blocks), default=0)

    @property
    def left(self) -> int:
        """Bytes still alive at the end: results, gradients, caches."""
        return self.curve[-1] if self.curve else 0

    @functools.cached_property
    def at_peak(self) -> list[Holding]:
        """What held the peak, by label, the largest first; adds up to `peak`."""
        return self.holdings(self.peak_step)

    def holdings(self, step: int) -> list[Holding]:
        """What was alive after the memory event `step`."""
        alive = [(label(b, self.sizes), b.nbytes) for b in self.blocks if b.alive(step)]
        return [Holding(*pair) for pair in grouped(alive)]

    @functools.cached_property
    def phases(self) -> list[Phase]:
        return [Phase(*span, peak=self._peak_within(span)) for span in self.recording.spans]

    def _peak_within(self, span: Span) -> int:
        before, inside = 0, [0]
        for seconds, nbytes in self.timeline:
            if seconds < span.begin:
                before = nbytes
            elif seconds <= span.end:
                inside.append(nbytes)
        return max(before, *inside)

    def table(self, rows: int = 8) -> str:
        """The peak by what held it, as text."""
        return peak_table(self, rows).text()

    __str__ = table

    def plot(self, path: str | Path, title: str | None = None) -> None:
        """The timeline as a picture, stacked by what holds it, the peak labelled. Needs matplotlib."""
        save_panels({title or f"memory of {self.device}": self.panel()}, path)

    def panel(self, *, relative: bool = False) -> Panel:
        """What `plot` draws, in milliseconds, or in per cent of the whole time for profiles of different speeds."""
        labelled: dict[str, list[Block]] = {}
        for block in self.blocks:
            labelled.setdefault(label(block, self.sizes), []).append(block)
        layers = {name: curve_of(blocks, len(self.times)) for name, blocks in labelled.items()}
        last = max((self.times or [0.0])[-1], 1e-9)
        unit, scale = ("% of the step's time", 100 / last) if relative else ("ms", 1e3)
        times = [scale * seconds for seconds in self.times]
        phases = [(p.name, scale * p.begin, scale * min(p.end, last)) for p in self.phases]
        return Panel(times, worth_drawing(layers, self.peak), phases, unit)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: bytes and seconds."""
        return {
            "device": self.device,
            "peak_bytes": self.peak,
            "peak_seconds": self.peak_seconds,
            "largest_bytes": self.largest,
            "left_bytes": self.left,
            "at_peak": [holding._asdict() for holding in self.at_peak],
            "phases": [phase._asdict() for phase in self.phases],
            "timeline": self.timeline,
            "cuda": None if self.cuda is None else vars(self.cuda),
        }


def peak_table(profile: MemoryProfile, rows: int) -> Table:
    held, rest = profile.at_peak[:rows], profile.at_peak[rows:]
    if rest:
        held = [*held, Holding(f"{len(rest)} others", sum(h.nbytes for h in rest))]
    cells = [(h.label, readable_bytes(h.nbytes), f"{h.nbytes / max(profile.peak, 1):.0%}") for h in held]
    title = f"{profile.device}: peak {readable_bytes(profile.peak)} above the start"
    return Table(("allocated by", "bytes", "share"), cells, title)


# ---- the context manager ----


@dataclass
class _Session:
    """One recording serves all nested blocks, as torch has one profiler at a time."""

    recorder: Recorder
    inner: list[tuple[MemoryProfile, str]]


_session: _Session | None = None


@contextmanager
def profile_memory(
    device: torch.device | str | None = None, *, sizes: Mapping[str, int] | None = None, shapes: bool = True
) -> Iterator[MemoryProfile]:
    """Record every allocation and release of tensors inside the block, exactly, on the CPU or a GPU.

    ::

        with profile_memory() as profile:
            loss = step(model, batch)
            loss.backward()
        print(profile.table())
        profile.plot("memory.png")

    Everything is in bytes and above what was allocated before the block, whose release inside it does not count. Run
    one step before, or optimizer states and caches that stay will be in the profile. Blocks of
    ``torch.profiler.record_function("name")`` become phases. What other threads allocate (a data loader's) is not seen.
    torch writes a line to standard error when a block from before is released inside.
    An exception passes through, and the profile holds what happened until then: the way to read an out-of-memory error.
    Inside another ``profile_memory`` block the profile is filled when the outermost ends.

    Args:
        device: whose memory; None: the current GPU if CUDA is in use, else the CPU.
        sizes: names of dimensions, ``{"N": rows, "V": vocabulary, "H": hidden}``; with them, labels name logits,
            lm_head and hidden states. Without, the operator and the shape.
        shapes: False does not record shapes. They cost a few bytes a tensor that stay until the end, between which
            the C library may not reuse memory: on a CPU, after many thousand tensors, the process can grow by more
            than the profile shows (which counts tensors, and is right). The outermost block decides.

    Raises:
        RuntimeError: if a torch.profiler is active on this thread.
    """
    profile = MemoryProfile(_device(device), sizes)
    with _cuda_counted(profile), _nested(profile) if _session is not None else _outermost(profile, shapes):
        yield profile


def _device(device: torch.device | str | None) -> str:
    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_initialized() else "cpu"
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return device_name(found)


@contextmanager
def _outermost(profile: MemoryProfile, shapes: bool) -> Iterator[None]:
    global _session
    session = _Session(Recorder(shapes), [])
    session.recorder.start()
    _session = session
    try:
        yield
    finally:
        _session = None
        recording = session.recorder.stop()
        markers = {marker for _, marker in session.inner}
        windows = {span.name: span for span in recording.spans if span.name in markers}
        visible = recording._replace(spans=[span for span in recording.spans if span.name not in markers])
        for inner, marker in session.inner:
            inner.fill(_window(visible, windows[marker]))
        profile.fill(visible)


@contextmanager
def _nested(profile: MemoryProfile) -> Iterator[None]:
    assert _session is not None
    marker = f"profile_memory {len(_session.inner) + 1}"
    _session.inner.append((profile, marker))
    with torch.profiler.record_function(marker):
        yield


def _window(recording: Recording, window: Span) -> Recording:
    """The part inside `window`. What was allocated before it is unknown in it, so does not count."""
    events = [e for e in recording.events if window.begin <= e.seconds <= window.end]
    spans = [s for s in recording.spans if window.begin <= s.begin and s.end <= window.end]
    return Recording(events, spans)


@contextmanager
def _cuda_counted(profile: MemoryProfile) -> Iterator[None]:
    """torch.cuda's own counters next to ours. Resets its peak, which a nested block must leave to the outer one."""
    if not profile.device.startswith("cuda") or _session is not None:
        yield
        return
    torch.cuda.synchronize(profile.device)
    torch.cuda.reset_peak_memory_stats(profile.device)
    before = torch.cuda.memory_allocated(profile.device)
    try:
        yield
    finally:
        highest, reserved = (
            torch.cuda.max_memory_allocated(profile.device),
            torch.cuda.max_memory_reserved(profile.device),
        )
        profile.cuda = CudaCounters(before, highest, reserved)
