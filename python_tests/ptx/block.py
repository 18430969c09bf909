"""Warps, blocks and clusters: their state, and how their accesses reach memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .frame import ALL, EVERYBODY, LANES
from .memory import RANK_SHIFT, SHARED_WINDOW, SharedMemory, Trap
from .races import Shadow
from .sync import Copy, Mbarrier, WarpBarrier

if TYPE_CHECKING:
    from .machine import Grid

BARRIERS = 80  # mbarriers of a block on which copies complete: each is a separate agent
_OFFSET = (1 << RANK_SHIFT) - 1


class Warp:
    def __init__(self, block: Block, index: int):
        grid = block.grid
        self.block, self.agent = block, block.rank * grid.warps + index
        threads = index * LANES + np.arange(LANES)
        special: dict[str, object] = {f"%{n}.{axis}": 1 for n in ("ntid", "nctaid") for axis in "xyz"}
        special |= {"%tid.x": threads, "%ntid.x": grid.threads, "%laneid": np.arange(LANES)}
        special |= {f"%ctaid.{axis}": n for axis, n in zip("xyz", block.index, strict=True)}
        special |= {f"%nctaid.{axis}": n for axis, n in zip("xyz", grid.blocks, strict=True)}
        special |= {"%cluster_ctarank": block.rank, "%cluster_nctarank": grid.cluster_size}
        self.rows = grid.program.frame.new_rows(special)
        self.groups: list[list] = [[0, ALL]]  # program counter and lanes
        self.present = ALL  # lanes that have not exited
        self.apart, self.stops = False, frozenset[int]()  # whether lanes have diverged, and where to choose again
        self.blocked = self.done = False
        self.copies: list[Copy] = []  # copies for which no barrier waits yet
        self.clocks = np.zeros(block.cluster.agents, np.int32)
        self.clocks[self.agent] = 1

    def learn(self, clocks: np.ndarray) -> None:
        self.clocks = np.maximum(self.clocks, clocks)

    def tick(self) -> None:
        """Later accesses are not covered by the last release."""
        self.clocks[self.agent] += 1

    def merge(self) -> None:
        """Groups the lanes by program counter, the lowest first."""
        together: dict[int, np.ndarray] = {}
        for pc, mask in sorted(self.groups, key=lambda g: g[0]):
            together[pc] = together[pc] | mask if pc in together else mask
        self.groups = [[pc, ALL if mask.tobytes() == EVERYBODY else mask] for pc, mask in together.items()]


class Block:
    def __init__(self, cluster: Cluster, number: int, rank: int):
        self.cluster, self.grid, self.number, self.rank = cluster, cluster.grid, number, rank
        x, y, _ = self.grid.blocks
        self.index = number % x, number // x % y, number // (x * y)
        self.owner = number + 1  # as the owner of late stores
        self.shared, self.shadow = SharedMemory(self.grid.shared_bytes), Shadow()
        self.barriers: dict[int, Mbarrier] = {}
        self._agents: dict[int, int] = {}
        self._warp_barriers: dict[int, WarpBarrier] = {}
        self._unfenced: list[tuple[int, int, np.ndarray, int]] = []  # agent, clock, addresses, bytes
        self.warps = [Warp(self, i) for i in range(self.grid.warps)]

    # ---- barriers ----

    def sync(self, w: Warp, name: int, threads: int | None) -> bool:
        barrier = self._warp_barriers.setdefault(name, WarpBarrier())
        barrier.of_all = threads is None
        barrier.arrive(w)
        w.blocked = True
        here = len(barrier.waiting) * LANES
        if threads is None:
            self.settle()
        elif here > threads:
            raise Trap(f"{here} threads at barrier {name}, which is for {threads}")
        elif here == threads:
            barrier.release()
            self.grid.idle = 0
        return w.blocked

    def settle(self) -> None:
        """After an arrival, or when a warp has exited."""
        running = sum(not w.done for w in self.warps)
        for barrier in self._warp_barriers.values():
            if barrier.of_all and barrier.waiting and len(barrier.waiting) == running:
                barrier.release()
                self.grid.idle = 0
        self.cluster.settle()

    def _peer(self, at: int) -> tuple[Block, int]:
        rank = (at & ~SHARED_WINDOW) >> RANK_SHIFT
        if rank > self.grid.cluster_size:
            raise Trap(f"a block of rank {rank - 1} in a cluster of {self.grid.cluster_size}")
        block = self if rank == 0 else self.cluster.blocks[rank - 1]
        if all(w.done for w in block.warps):
            raise Trap(f"the shared memory of block {block.number}, which has exited")
        return block, at & _OFFSET

    def new_barrier(self, at: int, expected: int) -> None:
        self.barriers[at & _OFFSET] = Mbarrier(expected, self.cluster.agents)

    def barrier(self, at: int) -> Mbarrier:
        block, offset = self._peer(at)
        if offset not in block.barriers:
            raise Trap(f"no mbarrier has been made at {offset} of the shared memory of block {block.number}")
        return block.barriers[offset]

    def agent_of(self, at: int) -> int:
        """The agent for copies that complete on a barrier of this block."""
        number = self._agents.setdefault(at & _OFFSET, len(self._agents))
        if number >= BARRIERS:
            raise Trap(f"more than {BARRIERS} barriers on which copies complete")
        return self.cluster.first_copier + self.rank * BARRIERS + number

    # ---- memory ----

    def _places(self, space: str, at: np.ndarray):
        """(block or None for global memory, addresses, lanes) for every memory that is accessed."""
        if space in ("global", "const") or (space == "generic" and (at < SHARED_WINDOW).all()):
            yield None, at, slice(None)
            return
        if space == "generic" and (at < SHARED_WINDOW).any():
            raise NotImplementedError("lanes in several spaces")
        if (at <= _OFFSET).all():
            yield self, at, slice(None)
            return
        ranks = (at & ~SHARED_WINDOW) >> RANK_SHIFT
        for rank in np.unique(ranks).tolist():
            lanes = np.flatnonzero(ranks == rank)
            block, _ = self._peer(rank << RANK_SHIFT)
            yield block, at[lanes] & _OFFSET, lanes

    def load(self, w: Warp, space: str, at: np.ndarray, size: int, count: int, strong: bool) -> np.ndarray:
        return self.load_as(w.agent, int(w.clocks[w.agent]), w.clocks, space, at, size, count, strong)

    def load_as(
        self, agent: int, clock: int, clocks: np.ndarray, space: str, at: np.ndarray, size: int, count: int, strong: bool
    ) -> np.ndarray:  # fmt: skip
        values = np.zeros((len(at), count), f"u{size}")
        for block, there, lanes in self._places(space, at):
            if block is None:
                values[lanes] = self.grid.memory.read(self.owner, there, size, count)
            else:
                values[lanes] = block.shared.read(there, size, count)
            if self.grid.options.races and not strong:
                shadow = self.cluster.shadow if block is None else block.shadow
                self.grid.report(shadow.load(agent, clock, clocks, there, size * count))
        return values

    def store(self, w: Warp, space: str, at: np.ndarray, size: int, values: np.ndarray, strong: bool) -> None:
        self.store_as(w.agent, int(w.clocks[w.agent]), w.clocks, space, at, size, values, strong)
        self.grid.idle = 0

    def store_as(
        self, agent: int, clock: int, clocks: np.ndarray, space: str, at: np.ndarray, size: int, values: np.ndarray,
        strong: bool,
    ) -> None:  # fmt: skip
        bytes_ = size * values.shape[1]
        for block, there, lanes in self._places(space, at):
            mine = values[lanes]
            if self.grid.options.races and not strong:
                self._note_store(block, agent, clock, clocks, there, size, mine)
            if block is not None:
                block.shared.write(there, size, mine)
                continue
            self.grid.memory.write(self.owner, there, size, mine, strong)
            if self.grid.options.late and not strong:
                self._unfenced.append((agent, clock, there, bytes_))

    def _note_store(self, block, agent, clock, clocks, at, size, values) -> None:
        count = values.shape[1]
        before = (
            self.grid.memory.read(self.owner, at, size, count) if block is None else block.shared.read(at, size, count)
        )
        changes = (
            np.ascontiguousarray(before).view(np.uint8).ravel() != np.ascontiguousarray(values).view(np.uint8).ravel()
        )
        shadow = self.cluster.shadow if block is None else block.shadow
        self.grid.report(shadow.store(agent, clock, clocks, at, size * count, changes))

    def modify(self, space: str, at: int, size: int, fn: Callable[[int], int]) -> int:
        self.grid.idle = 0
        ((block, there, _),) = self._places(space, np.array([at], np.int64))
        if block is None:
            return self.grid.memory.modify(self.owner, int(there[0]), size, fn)
        before = int(block.shared.read(there, size, 1)[0, 0])
        block.shared.write(there, size, np.array([[fn(before)]], f"u{size}"))
        return before

    def publish(self, w: Warp) -> None:
        """A fence: publishes what this warp has stored, and the stores of its block's other warps that it knows of."""
        kept = []
        for entry in self._unfenced:
            agent, clock, at, bytes_ = entry
            if clock <= w.clocks[agent]:
                self.grid.memory.publish(self.owner, at, bytes_)
            else:
                kept.append(entry)
        self._unfenced = kept


class Cluster:
    """Blocks that run at the same time and access each other's shared memory; usually one block."""

    def __init__(self, grid: Grid, first: int):
        self.grid = grid
        self.first_copier = grid.cluster_size * grid.warps
        self.agents = self.first_copier + grid.cluster_size * BARRIERS
        self.shadow = Shadow()  # of global memory
        self.copies: list[tuple[Warp, list[Copy], int, Callable]] = []
        self._warp_barrier = WarpBarrier()
        self.blocks = [Block(self, first + rank, rank) for rank in range(grid.cluster_size)]
        self.warps = [w for block in self.blocks for w in block.warps]

    def runnable(self) -> list[Warp]:
        return [w for w in self.warps if not (w.done or w.blocked)]

    def done(self) -> bool:
        return not self.copies and all(w.done for w in self.warps)

    # ---- pending copies ----

    def begin(self, w: Warp, copies: list[Copy], barrier: int, then: Callable) -> None:
        self.copies.append((w, copies, barrier, then))

    def land(self, which: int) -> None:
        w, copies, at, then = self.copies.pop(which)
        block, offset = w.block._peer(at)
        barrier, agent = block.barrier(at), block.agent_of(offset)
        clock = int(barrier.clocks[agent]) + 1
        clocks = np.zeros(self.agents, np.int32)
        for copy in copies:
            copy.perform(agent, clock)
            clocks = np.maximum(clocks, copy.issued)
        clocks[agent] = clock
        then(barrier, clocks)
        self.grid.idle = 0

    def finish_copies(self, w: Warp) -> None:
        for copy in w.copies:
            copy.perform(w.agent, int(w.clocks[w.agent]))
        w.copies = []
        while mine := [i for i, entry in enumerate(self.copies) if entry[0] is w]:
            self.land(mine[0])

    # ---- barrier.cluster ----

    def arrive(self, w: Warp) -> None:
        self._warp_barrier.arrive(w)
        self.settle()

    def wait(self, w: Warp) -> bool:
        w.blocked = w in self._warp_barrier.waiting
        return w.blocked

    def settle(self) -> None:
        if self._warp_barrier.waiting and len(self._warp_barrier.waiting) == sum(not w.done for w in self.warps):
            self._warp_barrier.release()
            self.grid.idle = 0
