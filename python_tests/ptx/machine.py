"""A grid on a machine that chooses everything at random: which resident block runs next, which of its warps, for how
many instructions, in which order diverged lanes run, and when a copy lands."""

from __future__ import annotations

import functools
import random
from typing import NamedTuple

import numpy as np

from . import access, alu, collective, sync
from .block import Cluster, Warp
from .frame import ALL, EVERYBODY, LANES, NOBODY, Frame
from .memory import GlobalMemory, Trap
from .text import Instruction, Kernel, parse

PLAIN, BRANCH, LEAVE, TOGETHER = range(4)


class Step(NamedTuple):
    kind: int
    run: object  # of a branch: its target
    guard: int | None
    negated: bool
    members: int | None = None  # of TOGETHER: the index of the mask


class Program:
    """A kernel with its instructions as closures."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.globals = {name: np.zeros(size, np.uint8) for name, size in kernel.constants.items()}
        self.frame = Frame(kernel, {name: x.ctypes.data for name, x in self.globals.items()})
        self.code = [self._step(ins) for ins in kernel.code]
        self.collectives = frozenset(pc for pc, step in enumerate(self.code) if step.kind == TOGETHER)

    def _step(self, ins: Instruction) -> Step:
        try:
            guard = None if ins.guard is None else self.frame.source(ins.guard, "pred")
            kind, run = self._compiled(ins)
            members = collective.members_of(self.frame, ins) if kind == TOGETHER else None
        except (NotImplementedError, KeyError, StopIteration, ValueError, TypeError, IndexError) as error:
            raise NotImplementedError(f"{ins.text!r} of {self.kernel.name}: {error!r}") from error
        return Step(kind, run, guard, ins.negated, members)

    def _compiled(self, ins: Instruction) -> tuple[int, object]:
        name = ins.parts[0]
        if name == "bra":
            return BRANCH, self.kernel.labels[ins.operands[0]]
        if name in ("ret", "exit"):
            return LEAVE, None
        if run := alu.build(self.frame, ins):
            return PLAIN, run
        for module in (access, collective, sync):
            if name in module.BUILDERS:
                collects = module is collective or name in ("bar", "barrier")
                return TOGETHER if collects else PLAIN, module.BUILDERS[name](self.frame, ins)
        raise NotImplementedError("an unknown instruction")


@functools.lru_cache(maxsize=64)
def program(text: str, name: str) -> Program:
    return Program(parse(text, name))


class Options(NamedTuple):
    """Options of the machine. None of them may change a result."""

    seed: int = 0
    resident: int = 2  # clusters at a time
    order: str = "shuffled"  # the order in which blocks start: forward, backward, shuffled
    quantum: int = 120  # the most instructions that a warp runs before another is chosen
    apart: float = 0.1  # how often the lanes that are behind do not run first
    races: bool = True
    late: bool = True  # stores reach other blocks only after a fence
    limit: int = 100_000_000  # instructions


DEFAULT = Options()


class Grid:
    def __init__(
        self, made: Program, blocks: tuple[int, int, int], threads: int, parameters: bytes, *, shared_bytes: int = 0,
        cluster: int = 1, spans: list[tuple[int, int]] | None = None, options: Options = DEFAULT,
    ):  # fmt: skip
        self.program, self.kernel, self.blocks, self.threads = made, made.kernel, blocks, threads
        self.warps = -(-threads // LANES)  # of a block
        self.shared_bytes = made.kernel.shared_bytes + shared_bytes
        self.cluster_size, self.options = cluster, options
        self._parameters = np.frombuffer(parameters.ljust(made.kernel.parameter_bytes, b"\0"), np.uint8)
        fixed = [(x.ctypes.data, x.ctypes.data + x.size) for x in made.globals.values()]
        self.memory = GlobalMemory(None if spans is None else sorted([*spans, *fixed]), options.late)
        self.random = random.Random(options.seed)
        self.executed = [0] * len(made.code)  # per instruction, counted once per warp
        self.instructions = self.gave_way = self.idle = 0
        self.races: dict[tuple[str, str], int] = {}  # (kind, instruction): count
        self.step_of = 0

    # ---- called by instructions ----

    def parameters(self, at: int, size: int, count: int) -> np.ndarray:
        return self._parameters[at : at + size * count].copy().view(f"u{size}").reshape(1, count)

    def nanoseconds(self) -> int:
        return self.instructions

    def shuffled(self, items: list) -> list:
        self.random.shuffle(items)
        return items

    def report(self, what: str | None) -> None:
        if what:
            key = what, self.kernel.code[self.step_of].text
            self.races[key] = self.races.get(key, 0) + 1

    # ---- running ----

    def run(self) -> Grid:
        try:
            with np.errstate(all="ignore"):
                self._run()
        except Trap as error:
            where = self.kernel.code[self.step_of].text
            raise Trap(f"{self.kernel.name}: {error} (at {where!r})") from None
        return self

    def _run(self) -> None:
        todo = self._order()
        running: list[Cluster] = []
        while todo or running:
            while todo and len(running) < self.options.resident:
                running.append(Cluster(self, todo.pop(0)))
            cluster = self.random.choice(running)
            warps = cluster.runnable()
            if cluster.copies and (not warps or self.random.random() < 0.1):
                cluster.land(self.random.randrange(len(cluster.copies)))
            elif warps:
                self._advance(self.random.choice(warps), self.random.randrange(1, self.options.quantum))
            elif cluster.done():
                running.remove(cluster)
                self.idle = 0
            else:
                self.idle += 1
            self._check_progress(running)

    def _order(self) -> list[int]:
        total = self.blocks[0] * self.blocks[1] * self.blocks[2]
        if total % self.cluster_size:
            raise Trap(f"{total} blocks in clusters of {self.cluster_size}")
        todo = list(range(0, total, self.cluster_size))
        if self.options.order == "shuffled":
            self.random.shuffle(todo)
        return todo[::-1] if self.options.order == "backward" else todo

    def _check_progress(self, running: list[Cluster]) -> None:
        if self.idle > 300 * (1 + sum(len(c.warps) for c in running)):
            waiting = {self.kernel.code[g[0]].text for c in running for w in c.warps if not w.done for g in w.groups}
            raise Trap(f"no progress: all wait at {sorted(waiting)}")
        if self.instructions > self.options.limit:
            raise Trap(f"more than {self.options.limit} instructions")

    def _advance(self, w: Warp, count: int) -> None:
        code, executed = self.program.code, self.executed
        group = w.groups[0]
        w.apart = len(w.groups) > 1
        for _ in range(count):
            if w.apart or group[0] in w.stops:
                group = self._choose(w)
            pc, mask = group
            kind, run, guard, negated, members = code[pc]
            self.step_of = pc
            active = mask if guard is None else self._guarded(w.rows[guard], negated, mask)
            if kind == TOGETHER and active is not None:
                self._check_members(w, group, members)
            executed[pc] += 1
            self.instructions += 1
            if kind == BRANCH:
                self._branch(w, group, run, active)
                w.apart = len(w.groups) > 1
            elif kind == LEAVE:
                if self._leave(w, group, active):
                    return
                w.apart = True
            else:
                group[0] = pc + 1
                if active is not None and run(w, active):
                    self.gave_way += 1
                    self.idle += not w.blocked
                    return

    @staticmethod
    def _guarded(predicate: np.ndarray, negated: bool, mask: np.ndarray) -> np.ndarray | None:
        """The lanes for which a predicate holds, or None if there are none."""
        active = ~predicate if negated else predicate
        if mask is not ALL:
            active = active & mask
        raw = active.tobytes()
        return None if raw == NOBODY else ALL if raw == EVERYBODY else active.copy()

    @staticmethod
    def _branch(w: Warp, group: list, to: int, taken: np.ndarray | None) -> None:
        pc, mask = group
        if taken is None:
            group[0] = pc + 1
        elif taken is mask or taken.tobytes() == mask.tobytes():
            group[0] = to
        else:
            group[:] = [to, taken]
            w.groups.append([pc + 1, mask & ~taken])

    def _leave(self, w: Warp, group: list, active: np.ndarray | None) -> bool:
        """Whether all lanes of the warp have exited."""
        if active is None:
            group[0] += 1
            return False
        rest = group[1] & ~active
        w.present = w.present & ~active
        if rest.any():
            group[:] = [group[0] + 1, rest]
        else:
            w.groups.remove(group)
        if w.groups:
            return False
        w.done, self.idle = True, 0
        w.block.settle()
        return True

    # ---- diverged lanes ----

    def _choose(self, w: Warp) -> list:
        """Lanes with one program counter run together; those at a collective instruction wait for its other lanes. The
        lanes that are behind usually run first, but not always, since a GPU need not reconverge lanes either. The
        choice holds up to a branch, a collective instruction or the program counter of other lanes."""
        w.merge()
        w.apart, w.stops = False, frozenset()
        if len(w.groups) == 1:
            return w.groups[0]
        free = [g for g in w.groups if not self._waits(w, g)]
        if not free:
            raise Trap("the lanes of a warp wait for each other at several instructions")
        chosen = self.random.choice(free) if self.random.random() < self.options.apart else free[0]
        w.stops = self.program.collectives.union(g[0] for g in w.groups if g is not chosen)
        return chosen

    def _waits(self, w: Warp, group: list) -> bool:
        kind, _, guard, negated, members = self.program.code[group[0]]
        if kind != TOGETHER:
            return False
        if guard is not None and self._guarded(w.rows[guard], negated, group[1]) is None:
            return False
        return bool((self._required(w, group, members) & ~group[1]).any())

    @staticmethod
    def _required(w: Warp, group: list, members: int | None) -> np.ndarray:
        if members is None:
            return w.present
        lane = int(np.flatnonzero(group[1])[0])
        return collective.lanes_of(int(w.rows[members][lane]))

    def _check_members(self, w: Warp, group: list, members: int | None) -> None:
        required = self._required(w, group, members)
        if required is not group[1] and (required & ~group[1]).any():
            raise Trap("a collective instruction names lanes that have exited")
