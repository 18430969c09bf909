"""What the allocators handed out and took back, from torch's profiler: exact on CPU and CUDA, inside operators too.

The profiler's memory events come from below the dispatcher, so that nothing is missed that a TorchDispatchMode would
not see: scratch tensors inside an operator, what autograd saves, what a custom kernel allocates.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

_COMPILERS = "## Call "  # graphs of torch.compile are spans, but nobody's phases
BACKWARD = "autograd::engine::evaluate_function: "
_ROUNDING = 512  # of CUDA's caching allocator: a block may be larger than its tensor by less than this


class MemoryEvent(NamedTuple):
    """One allocation (`nbytes` above 0) or release (below 0)."""

    seconds: float
    address: int
    nbytes: int
    device: str
    operators: tuple[str, ...]  # that it happened in, the outermost first
    node: str | None  # of autograd, in a backward
    call: int = 0  # of the innermost operator, numbered; 0: outside of any


class TensorEvent(NamedTuple):
    """An operator read this tensor: which is how the shape behind an address becomes known."""

    seconds: float
    address: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Span(NamedTuple):
    """A `torch.profiler.record_function` of the user's, or an optimizer's."""

    name: str
    begin: float
    end: float


@dataclass
class Block:
    """Memory from its allocation to its release; `born` and `died` count memory events, None: outlived them."""

    nbytes: int
    born: int
    died: int | None
    operators: tuple[str, ...]
    node: str | None
    call: int
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    temporary: bool = False  # released by the call of the operator that allocated it

    def alive(self, step: int) -> bool:
        return self.born <= step and (self.died is None or step < self.died)


class Recording(NamedTuple):
    events: list[MemoryEvent | TensorEvent]  # in the order of time
    spans: list[Span]


def blocks_of(events: Iterable[MemoryEvent | TensorEvent], device: str) -> tuple[list[Block], list[float]]:
    """The blocks of one device, and the time of each of its memory events.

    Only what was allocated here counts when it is released: the profiler's own running total also falls for memory
    that was there before.
    """
    blocks: list[Block] = []
    times: list[float] = []
    alive: dict[int, Block] = {}
    for event in events:
        if isinstance(event, TensorEvent):
            block = alive.get(event.address)
            if block is not None and block.shape is None and _fits(event, block):
                block.shape, block.dtype = event.shape, event.dtype
        elif event.device == device:
            step = len(times)
            times.append(event.seconds)
            ended = alive.pop(event.address, None)
            if ended is not None:
                ended.died = step
                ended.temporary = event.call == ended.call != 0
            if event.nbytes > 0:
                alive[event.address] = Block(event.nbytes, step, None, event.operators, event.node, event.call)
                blocks.append(alive[event.address])
    return blocks, times


def _fits(event: TensorEvent, block: Block) -> bool:
    needed = math.prod(event.shape) * event.dtype.itemsize
    return needed <= block.nbytes < needed + _ROUNDING and (needed == block.nbytes or block.nbytes % _ROUNDING == 0)


def curve_of(blocks: Iterable[Block], steps: int) -> list[int]:
    """Bytes alive after each memory event."""
    change = [0] * steps
    for block in blocks:
        change[block.born] += block.nbytes
        if block.died is not None:
            change[block.died] -= block.nbytes
    return list(itertools.accumulate(change))


class Recorder:
    """Between `start` and `stop`, everything that this thread allocates and releases, and its backwards."""

    def __init__(self, shapes: bool) -> None:
        from torch.profiler import ProfilerActivity, profile

        if torch.autograd._profiler_enabled():
            raise RuntimeError(
                "a torch.profiler is active on this thread already, and torch has one at a time: "
                "leave its context before profile_memory() or peak_memory()"
            )
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=shapes)

    def start(self) -> None:
        with native_stderr_silenced():
            self._profiler.start()

    def stop(self) -> Recording:
        with native_stderr_silenced():
            self._profiler.stop()
        results: Any = self._profiler.profiler.kineto_results  # type: ignore[union-attr]
        return _recording_of(results.experimental_event_tree())


def _recording_of(roots: list[Any]) -> Recording:
    first = min((root.start_time_ns for root in roots), default=0)

    def seconds(nanoseconds: int) -> float:
        return (nanoseconds - first) / 1e9

    events: list[MemoryEvent | TensorEvent] = []
    spans: list[Span] = []
    pending: list[tuple[Any, tuple[str, ...], str | None, int]] = [(root, (), None, 0) for root in reversed(roots)]
    calls = itertools.count(1)
    while pending:  # not recursive: an event tree can be deeper than Python's stack
        event, operators, node, call = pending.pop()
        fields, begin = event.extra_fields, seconds(event.start_time_ns)
        kind = type(fields).__name__
        if kind == "_ExtraFields_Allocation":
            device = device_name(fields.device)
            events.append(MemoryEvent(begin, fields.ptr, fields.alloc_size, device, operators, node, call))
        elif kind == "_ExtraFields_TorchOp":
            if fields.scope.name == "USER_SCOPE":
                if not event.name.startswith(_COMPILERS):
                    spans.append(Span(event.name, begin, seconds(event.end_time_ns)))
            elif event.name.startswith(BACKWARD):
                operators, node, call = (), event.name.removeprefix(BACKWARD), 0
            else:
                operators, call = (*operators, event.name), next(calls)
            events.extend(_tensors_read(fields, begin))
        pending.extend((child, operators, node, call) for child in reversed(event.children))
    events.sort(key=lambda e: e.seconds)  # stable, and a thread's own are in order
    spans.sort(key=lambda s: s.begin)
    return Recording(events, spans)


def device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def _tensors_read(fields: Any, seconds: float) -> Iterator[TensorEvent]:
    for argument in fields.inputs:
        for x in argument if isinstance(argument, list) else [argument]:
            address = getattr(x, "storage_data_ptr", None)
            if address:
                yield TensorEvent(seconds, address, tuple(x.sizes), x.dtype)


@contextlib.contextmanager
def native_stderr_silenced() -> Iterator[None]:
    """The profiler's native half writes status lines to file descriptor 2, past sys.stderr and its log level."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
