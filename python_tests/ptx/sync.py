"""What orders warps and blocks: barriers, fences, asynchronous copies, clusters. A run(warp, mask) that returns True
yields: its warp waits, or tries again later."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .access import address_of
from .frame import Frame, put
from .memory import RANK_SHIFT, SHARED_WINDOW, Trap
from .text import Instruction

LANES_OF_A_WARP = 32


class WarpBarrier:
    """bar.sync and barrier.cluster: warps wait for each other, and then each knows what the others knew."""

    def __init__(self) -> None:
        self.waiting: list = []
        self.clocks: np.ndarray | None = None
        self.of_all = True  # all warps that have not exited; False: a given number of threads

    def arrive(self, w) -> None:
        self.waiting.append(w)
        self.clocks = w.clocks.copy() if self.clocks is None else np.maximum(self.clocks, w.clocks)

    def release(self) -> None:
        for w in self.waiting:
            w.learn(self.clocks)
            w.tick()
            w.blocked = False
        self.waiting, self.clocks = [], None


class Mbarrier:
    def __init__(self, expected: int, agents: int):
        self.expected = self.pending = expected
        self.bytes = self.phase = 0
        self.clocks = np.zeros(agents, np.int32)
        self.published = self.clocks  # by the completed phases

    def arrive(self, clocks: np.ndarray, count: int = 1, expect: int = 0) -> None:
        if count > self.pending:
            raise Trap(f"an mbarrier of {self.expected} arrivals got {count} where {self.pending} were pending")
        self.clocks = np.maximum(self.clocks, clocks)
        self.pending -= count
        self.bytes += expect
        self._settle()

    def complete(self, clocks: np.ndarray, bytes_: int) -> None:
        self.clocks = np.maximum(self.clocks, clocks)
        self.bytes -= bytes_
        self._settle()

    def _settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending, self.published = self.expected, self.clocks


# ---- barriers of a block and of a cluster, fences ----


def _bar(frame: Frame, ins: Instruction) -> Callable:
    if ins.parts[:3] == ("bar", "warp", "sync"):
        return lambda w, m: None
    if ins.parts[1] == "cluster":
        return _cluster_barrier(ins)
    if ins.parts[1] != "sync":
        raise NotImplementedError("a barrier that is not sync")
    name, *count = [frame.source(x, "u32") for x in ins.operands]

    def run(w, m):
        threads = int(w.rows[count[0]][0]) if count else None
        return w.block.sync(w, int(w.rows[name][0]), threads)

    return run


def _cluster_barrier(ins: Instruction) -> Callable:
    if ins.parts[2] == "arrive":
        return lambda w, m: w.block.cluster.arrive(w)
    return lambda w, m: w.block.cluster.wait(w)


def _fence(frame: Frame, ins: Instruction) -> Callable:
    reaches_other_blocks = any(p in ("gl", "gpu", "sys") for p in ins.parts)
    return lambda w, m: w.block.publish(w) if reaches_other_blocks else None


def _nanosleep(frame: Frame, ins: Instruction) -> Callable:
    return lambda w, m: True


def _mapa(frame: Frame, ins: Instruction) -> Callable:
    is_window = any(p.startswith("shared") for p in ins.parts)
    kind = ins.parts[-1]
    target, rank = frame.target(ins.operands[0], kind), frame.source(ins.operands[2], "u32")
    address = frame.source(ins.operands[1], kind)
    base = 0 if is_window else SHARED_WINDOW

    def run(w, m):
        offset = w.rows[address].astype(np.int64) & ((1 << RANK_SHIFT) - 1)
        put(w.rows[target], m, base + ((w.rows[rank].astype(np.int64) + 1) << RANK_SHIFT) + offset)

    return run


# ---- mbarriers ----


def _mbarrier(frame: Frame, ins: Instruction) -> Callable:
    if ins.parts[1] == "init":
        return _init(frame, ins)
    if ins.parts[1] in ("arrive", "expect_tx"):
        return _arrive(frame, ins)
    if ins.parts[1] in ("try_wait", "test_wait") and "parity" in ins.parts:
        return _wait(frame, ins)
    raise NotImplementedError(f"mbarrier.{ins.parts[1]}")


def _init(frame: Frame, ins: Instruction) -> Callable:
    address, count = address_of(frame, ins.operands[0]), frame.source(ins.operands[1], "u32")

    def run(w, m):
        at = address(w)
        for lane in np.flatnonzero(m):
            w.block.new_barrier(int(at[lane]), int(w.rows[count][lane]))

    return run


def _arrive(frame: Frame, ins: Instruction) -> Callable:
    """Each lane arrives separately; with expect_tx it first announces bytes."""
    expects, arrives = "expect_tx" in ins.parts, ins.parts[1] == "arrive"
    where = next(i for i, x in enumerate(ins.operands) if x.startswith("["))
    address = address_of(frame, ins.operands[where])
    number = frame.source(ins.operands[where + 1], "u32") if len(ins.operands) > where + 1 else None

    def run(w, m):
        at = address(w)
        for lane in np.flatnonzero(m):
            given = 1 if number is None else int(w.rows[number][lane])
            count = (1 if expects else given) * arrives
            w.block.barrier(int(at[lane])).arrive(w.clocks, count, given if expects else 0)
        w.tick()
        w.block.grid.idle = 0

    return run


def _wait(frame: Frame, ins: Instruction) -> Callable:
    target, address = frame.target(ins.operands[0], "pred"), address_of(frame, ins.operands[1])
    parity = frame.source(ins.operands[2], "u32")

    def run(w, m):
        at, over = address(w), np.zeros(LANES_OF_A_WARP, bool)
        for lane in np.flatnonzero(m):
            barrier = w.block.barrier(int(at[lane]))
            over[lane] = barrier.phase != int(w.rows[parity][lane]) & 1
            if over[lane]:
                w.learn(barrier.published)
        put(w.rows[target], m, over)
        return not over[m].all()

    return run


# ---- asynchronous copies ----


def _cp(frame: Frame, ins: Instruction) -> Callable:
    name = ins.parts[2] if len(ins.parts) > 2 else ""
    if ins.parts[1] != "async":
        raise NotImplementedError("cp that is not async")
    if name == "bulk":
        return _bulk_copy(frame, ins)
    if name in ("ca", "cg"):
        return _lane_copies(frame, ins)
    if name == "mbarrier":
        return _arrive_when_copied(frame, ins)
    if name == "wait_all":
        return lambda w, m: w.block.cluster.finish_copies(w)
    raise NotImplementedError(f"cp.async.{name}")


def _bulk_copy(frame: Frame, ins: Instruction) -> Callable:
    if ins.parts[3:5] != ("shared::cluster", "global"):
        raise NotImplementedError("a bulk copy that is not from global to shared memory")
    to, source, barrier = (address_of(frame, ins.operands[i]) for i in (0, 1, 3))
    count = frame.source(ins.operands[2], "u32")

    def run(w, m):
        for lane in np.flatnonzero(m):
            bytes_, at = int(w.rows[count][lane]), int(barrier(w)[lane])
            if bytes_ % 16 or bytes_ <= 0:
                raise Trap(f"a bulk copy of {bytes_} bytes, which is no multiple of 16")
            places = np.arange(0, bytes_, 16)
            copy = Copy(w, int(to(w)[lane]) + places, int(source(w)[lane]) + places, 16)
            w.block.cluster.begin(w, [copy], at, lambda b, clocks, n=bytes_: b.complete(clocks, n))

    return run


def _lane_copies(frame: Frame, ins: Instruction) -> Callable:
    to, source = (address_of(frame, ins.operands[i]) for i in (0, 1))
    bytes_ = int(ins.operands[2])
    if len(ins.operands) > 3:
        raise NotImplementedError("cp.async of fewer bytes than it stores")
    return lambda w, m: w.copies.append(Copy(w, to(w)[m], source(w)[m], bytes_))


def _arrive_when_copied(frame: Frame, ins: Instruction) -> Callable:
    if "noinc" not in ins.parts:
        raise NotImplementedError("cp.async.mbarrier.arrive that counts itself")
    address = address_of(frame, ins.operands[0])

    def run(w, m):
        copies, w.copies = w.copies, []
        at = address(w)[m]
        if (at != at[0]).any():
            raise NotImplementedError("lanes that arrive at several barriers")
        lanes = len(at)
        w.block.cluster.begin(w, copies, int(at[0]), lambda b, clocks: b.arrive(clocks, lanes))

    return run


class Copy:
    """Copies bytes_ from each global address to a shared address, at some later time."""

    def __init__(self, w, to: np.ndarray, source: np.ndarray, bytes_: int):
        self.block, self.to, self.source, self.bytes_ = w.block, to, source, bytes_
        self.issued = w.clocks.copy()

    def perform(self, agent: int, clock: int) -> None:
        block, words = self.block, max(self.bytes_ // 8, 1)
        size = self.bytes_ // words
        clocks = self.issued.copy()
        clocks[agent] = clock  # the copies of a barrier are ordered by its phases
        values = block.load_as(agent, clock, clocks, "global", self.source, size, words, False)
        block.store_as(agent, clock, clocks, "shared", self.to, size, values, False)


def _call(frame: Frame, ins: Instruction) -> Callable:
    if "__assertfail" not in ins.text:
        raise NotImplementedError("a call")
    return _trap(frame, ins)


def _trap(frame: Frame, ins: Instruction) -> Callable:
    def run(w, m):
        raise Trap("device-side assert triggered" if ins.parts[0] == "call" else "trap")

    return run


def _nothing(frame: Frame, ins: Instruction) -> Callable:
    return lambda w, m: None


def _policy(frame: Frame, ins: Instruction) -> Callable:
    target = frame.target(ins.operands[0], "b64")
    return lambda w, m: put(w.rows[target], m, 0)


BUILDERS = {
    "bar": _bar, "barrier": _bar, "membar": _fence, "fence": _fence, "nanosleep": _nanosleep, "mapa": _mapa,
    "mbarrier": _mbarrier, "cp": _cp, "call": _call, "trap": _trap, "prefetch": _nothing, "createpolicy": _policy,
}  # fmt: skip
