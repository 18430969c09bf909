"""Barriers, fences, copies and clusters: correct code passes under every schedule, and each missing part is noticed."""

import numpy as np
import pytest

from .memory import Trap
from .written import run

SHARED = ".shared .align 16 .b8 mem[1024];\n.shared .align 8 .b64 full;\n.shared .align 8 .b64 empty;"
SEEDS = range(6)


def without(body: str, line: str) -> str:
    assert body.count(line) >= 1, line
    return body.replace(line, "", 1)


def notices(body: str, make_arrays, expected, **options) -> bool:
    """Whether some schedule gives an error, a race or a different result."""
    for seed in SEEDS:
        arrays = make_arrays()
        try:
            if run(body, *arrays, seed=seed, **options).races:
                return True
        except Trap:
            return True
        if not np.array_equal(arrays[0], expected):
            return True
    return False


# ---- lanes ----


def test_lanes_diverge_and_reconverge():
    body = """
    mov.u32 %r1, 0; mov.u32 %r2, %r0;
    loop: setp.eq.u32 %p1, %r2, 0; @%p1 bra out; add.s32 %r1, %r1, %r2; sub.s32 %r2, %r2, 1; bra loop;
    out: shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
    mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d0, %d1; st.global.u32 [%d1], %r3;"""
    lanes = np.arange(32)
    for seed in SEEDS:
        out = np.zeros(32, np.uint32)
        run(body, out, seed=seed, apart=0.5)
        assert (out == (lanes * (lanes + 1) // 2)[lanes ^ 1]).all()


def test_lanes_that_wait_at_two_shuffles_deadlock():
    body = """setp.lt.u32 %p1, %r0, 16; @%p1 bra low; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; ret;
    low: shfl.sync.bfly.b32 %r2, %r0, 2, 31, -1;"""
    with pytest.raises(Trap, match="wait for each other"):
        run(body)


# One lane arrives for the warp; the others must still observe the phase that this arrival completes.
LANE_ARRIVES = """
  mov.u32 %r1, full; setp.ne.s32 %p1, %r0, 0;
  @%p1 bra ready; mbarrier.init.shared.b64 [%r1], 1; ready: bar.sync 0;
  mov.u32 %r2, 0;
  next:
  setp.ne.s32 %p1, %r0, 0; @%p1 bra wait; mbarrier.arrive.shared.b64 %d1, [%r1];
  wait: and.b32 %r3, %r2, 1; mbarrier.try_wait.parity.shared.b64 %p2, [%r1], %r3; @!%p2 bra wait;
  bar.warp.sync -1;
  add.s32 %r2, %r2, 1; setp.lt.u32 %p3, %r2, 6; @%p3 bra next;"""


def test_a_lane_that_misses_its_phase_hangs():
    for seed in SEEDS:
        run(LANE_ARRIVES, shared=SHARED, seed=seed, apart=0.5)
    late = without(LANE_ARRIVES, "bar.warp.sync -1;")
    with pytest.raises(Trap, match="no progress"):
        for seed in range(20):
            run(late, shared=SHARED, seed=seed, apart=0.5)


# ---- a block ----

EXCHANGE = """
  mul.wide.u32 %d1, %r0, 4; cvt.u32.u64 %r1, %d1; mov.u32 %r2, mem; add.s32 %r3, %r2, %r1;
  st.shared.u32 [%r3], %r0;
  bar.sync 0;
  xor.b32 %r4, %r1, 508; add.s32 %r4, %r2, %r4; ld.shared.u32 %r5, [%r4];
  add.s64 %d1, %d0, %d1; st.global.u32 [%d1], %r5;"""
EXCHANGED = (np.arange(128) ^ 127).astype(np.uint32)


def test_a_barrier_of_the_block():
    def make():
        return (np.zeros(128, np.uint32),)

    assert not notices(EXCHANGE, make, EXCHANGED, threads=128, shared=SHARED)
    assert notices(without(EXCHANGE, "bar.sync 0;"), make, EXCHANGED, threads=128, shared=SHARED)


def test_a_barrier_with_a_number_of_threads():
    """Warps 0 to 2 wait for each other; the fourth goes on alone."""
    body = """setp.gt.u32 %p1, %r0, 95; @%p1 bra out; bar.sync 1, 96; out: ret;"""
    assert not run(body, threads=128).races
    run(body.replace("bar.sync 1, 96;", "bar.sync 1;"), threads=128)  # for all that have not exited
    with pytest.raises(Trap, match="no progress"):
        run(body.replace("1, 96", "1, 128"), threads=128)


# Warp 0 loads, warp 1 uses: three rounds through one slot.
RING = """
  setp.ne.s32 %p1, %r0, 0; mov.u32 %r1, full; mov.u32 %r2, empty; mov.u32 %r3, mem;
  @%p1 bra ready;
  mbarrier.init.shared.b64 [%r1], 1; mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
  ready: bar.sync 0;
  mov.u32 %r4, 0;
  setp.gt.u32 %p2, %r0, 31; @%p2 bra use;
  @%p1 bra end;
  load: and.b32 %r5, %r4, 1; xor.b32 %r5, %r5, 1;
  full_wait: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], %r5; @!%p3 bra full_wait;
  mbarrier.arrive.expect_tx.shared.b64 %d5, [%r1], 128;
  mul.wide.u32 %d6, %r4, 128; add.s64 %d6, %d1, %d6;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d6], 128, [%r1];
  add.s32 %r4, %r4, 1; setp.lt.u32 %p4, %r4, 3; @%p4 bra load;
  bra end;
  use: and.b32 %r5, %r4, 1; sub.s32 %r6, %r0, 32; shl.b32 %r6, %r6, 2;
  use_wait: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], %r5; @!%p3 bra use_wait;
  add.s32 %r7, %r3, %r6; ld.shared.u32 %r8, [%r7];
  mul.wide.u32 %d6, %r4, 128; cvt.u64.u32 %d7, %r6; add.s64 %d6, %d6, %d7; add.s64 %d6, %d0, %d6;
  st.global.u32 [%d6], %r8;
  bar.warp.sync -1;
  setp.eq.s32 %p5, %r6, 0; @%p5 mbarrier.arrive.shared.b64 %d5, [%r2];
  add.s32 %r4, %r4, 1; setp.lt.u32 %p4, %r4, 3; @%p4 bra use;
  end:"""
RING_MUTANTS = [
    "@!%p3 bra full_wait;",
    "@!%p3 bra use_wait;",
    "@%p5 mbarrier.arrive.shared.b64 %d5, [%r2];",
    "mbarrier.arrive.expect_tx.shared.b64 %d5, [%r1], 128;",
    "ready: bar.sync 0;",
]


def ring_arrays():
    return np.zeros(96, np.uint32), np.arange(96, dtype=np.uint32)


def test_bulk_copies_through_a_slot():
    assert not notices(RING, ring_arrays, ring_arrays()[1], threads=64, shared=SHARED)


@pytest.mark.parametrize("line", RING_MUTANTS)
def test_a_ring_without(line):
    body = RING.replace(line, "ready:") if line.startswith("ready:") else without(RING, line)
    assert notices(body, ring_arrays, ring_arrays()[1], threads=64, shared=SHARED)


COPIES = """
  setp.ne.s32 %p1, %r0, 0; mov.u32 %r1, full; mov.u32 %r3, mem; @%p1 bra ready;
  mbarrier.init.shared.b64 [%r1], 32;
  ready: bar.sync 0; setp.gt.u32 %p2, %r0, 31; @%p2 bra wait;
  mul.wide.u32 %d2, %r0, 16; cvt.u32.u64 %r4, %d2; add.s32 %r4, %r3, %r4; add.s64 %d2, %d1, %d2;
  cp.async.cg.shared.global [%r4], [%d2], 16;
  cp.async.mbarrier.arrive.noinc.shared.b64 [%r1];
  wait: mbarrier.test_wait.parity.shared.b64 %p3, [%r1], 0; @!%p3 bra wait;
  mul.wide.u32 %d2, %r0, 4; cvt.u32.u64 %r4, %d2; add.s32 %r4, %r3, %r4; ld.shared.u32 %r5, [%r4];
  add.s64 %d3, %d0, %d2; st.global.u32 [%d3], %r5;"""


def test_copies_of_the_lanes():
    def make():
        return np.zeros(128, np.uint32), np.arange(128, dtype=np.uint32)

    assert not notices(COPIES, make, make()[1], threads=128, shared=SHARED)
    assert notices(without(COPIES, "@!%p3 bra wait;"), make, make()[1], threads=128, shared=SHARED)


def test_more_arrivals_than_an_mbarrier_expects():
    body = """mov.u32 %r1, full; setp.ne.s32 %p1, %r0, 0; @%p1 ret; mbarrier.init.shared.b64 [%r1], 2;
    mbarrier.arrive.shared.b64 %d1, [%r1], 3;"""
    with pytest.raises(Trap, match="of 2 arrivals got 3"):
        run(body, shared=SHARED)


# ---- clusters ----

CLUSTER = """
  mov.u32 %r1, full; mov.u32 %r2, mem; mov.u32 %r3, %cluster_ctarank; setp.ne.s32 %p1, %r0, 0; @%p1 bra ready;
  mbarrier.init.shared.b64 [%r1], 2; fence.mbarrier_init.release.cluster;
  ready: barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
  setp.gt.u32 %p2, %r0, 1; @%p2 bra wait;
  cvta.shared.u64 %d1, %d9; mapa.u64 %d2, %d1, %r0; mul.wide.u32 %d3, %r3, 4; add.s64 %d2, %d2, %d3;
  add.s32 %r4, %r3, 40; st.u32 [%d2], %r4;
  mapa.shared::cluster.u32 %r5, %r1, %r0;
  mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r5];
  wait: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r1], 0; @!%p3 bra wait;
  ld.shared.v2.u32 {%r6, %r7}, [mem]; @%p1 bra end;
  mul.wide.u32 %d4, %r3, 8; add.s64 %d4, %d0, %d4; st.global.v2.u32 [%d4], {%r6, %r7};
  end: barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"""
CLUSTER = "mov.u32 %r8, mem; cvt.u64.u32 %d9, %r8;" + CLUSTER


def test_blocks_of_a_cluster_exchange_values():
    def make():
        return (np.zeros(4, np.uint32),)

    expected, options = np.array([40, 41, 40, 41]), {"blocks": 2, "cluster": 2, "threads": 64, "shared": SHARED}
    assert not notices(CLUSTER, make, expected, **options)
    assert notices(without(CLUSTER, "@!%p3 bra wait;"), make, expected, **options)
    first = "ready: barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
    assert notices(CLUSTER.replace(first, "ready:", 1), make, expected, **options)


# ---- communication between blocks through global memory ----

TICKET = """
  mov.u32 %r1, %ctaid.x; setp.ne.s32 %p1, %r0, 0; @%p1 bra end;
  mul.wide.u32 %d3, %r1, 4; add.s64 %d3, %d1, %d3; add.s32 %r2, %r1, 1; st.global.u32 [%d3], %r2;
  membar.gl;
  atom.global.add.u32 %r3, [%d2], 1; setp.ne.u32 %p2, %r3, 3; @%p2 bra end;
  ld.global.cg.u32 %r4, [%d1]; ld.global.cg.u32 %r5, [%d1+4]; add.s32 %r4, %r4, %r5;
  ld.global.cg.u32 %r5, [%d1+8]; add.s32 %r4, %r4, %r5; ld.global.cg.u32 %r5, [%d1+12]; add.s32 %r4, %r4, %r5;
  st.global.u32 [%d0], %r4;
  end:"""


@pytest.mark.parametrize("resident", [1, 2, 4])
def test_a_store_is_visible_after_a_fence(resident):
    def make():
        return np.zeros(1, np.uint32), np.zeros(4, np.uint32), np.zeros(1, np.uint32)

    options = {"blocks": 4, "resident": resident}
    assert not notices(TICKET, make, np.array([10]), **options)
    assert notices(without(TICKET, "membar.gl;"), make, np.array([10]), **options)
    released = without(TICKET, "membar.gl;").replace("atom.global.add", "atom.global.gpu.acq_rel.add")
    assert not notices(released, make, np.array([10]), **options)


def test_a_fence_covers_stores_that_a_barrier_ordered_before_it():
    """Two warps store and one of them fences: after the block's barrier for both, before it only for itself."""
    body = """
    mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra reads;
    mul.wide.u32 %d3, %r0, 4; add.s64 %d4, %d1, %d3; st.global.u32 [%d4], 5;
    FIRST bar.sync 0; SECOND
    setp.ne.s32 %p2, %r0, 0; @%p2 bra end; atom.global.add.u32 %r3, [%d2], 1; bra end;
    reads: ld.volatile.global.u32 %r4, [%d2]; setp.ne.u32 %p3, %r4, 0; @%p3 bra copies; nanosleep.u32 100; bra reads;
    copies: membar.gl; mul.wide.u32 %d3, %r0, 4; add.s64 %d4, %d1, %d3; ld.global.u32 %r5, [%d4];
    add.s64 %d5, %d0, %d3; st.global.u32 [%d5], %r5;
    end:"""
    fence = "setp.gt.u32 %p4, %r0, 31; @%p4 bra past; membar.gl; past:"

    def make():
        return np.zeros(64, np.uint32), np.zeros(64, np.uint32), np.zeros(1, np.uint32)

    options = {"blocks": 2, "resident": 2, "threads": 64}
    after, before = (
        body.replace("FIRST", "").replace("SECOND", fence),
        body.replace("SECOND", "").replace("FIRST", fence),
    )
    assert not notices(after, make, np.full(64, 5), **options)
    assert notices(before, make, np.full(64, 5), **options)


def test_an_endless_wait_is_an_error():
    body = "again: ld.volatile.global.u32 %r1, [%d0]; nanosleep.u32 100; setp.eq.u32 %p1, %r1, 0; @%p1 bra again;"
    with pytest.raises(Trap, match="no progress"):
        run(body, np.zeros(1, np.uint32))
    with pytest.raises(Trap, match="more than 1000 instructions"):
        run("again: bra again;", limit=1000)
