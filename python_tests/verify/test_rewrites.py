"""The text of the rewrites, and that after them the verifier still reports races, hangs and races within a warp."""

import pytest
from conftest import ROOT
from ptx.written import kernel

from .capture import Launch, one_entry, with_threads
from .check import PROVEN, Options, verdict
from .floats import float_branches
from .rewrites import aligned, constant_atomics, decided, guarded, numbers_not_zero, plain, unwatched

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")

# ---- the text ----

WATCH = (
    "{ .reg .pred over, early; .reg .b64 now, end; mov.u32 %r9, 0; mov.u64 end, %globaltimer; add.u64 end, end, %rd2; "
    "AGAIN: mbarrier.try_wait.parity.shared.b64 over, [%r3], %r4; @over bra DONE; mov.u64 now, %globaltimer; "
    "setp.lt.u64 early, now, end; @early bra AGAIN; mov.u32 %r9, 1; DONE: }"
)
WAIT = (
    "{ .reg .pred over; AGAIN: mbarrier.try_wait.parity.shared.b64 over, [%r3], %r4; @over bra DONE; bra AGAIN; DONE: }"
)


def test_the_watchdog_is_removed_and_the_wait_stays():
    assert unwatched(f"{WATCH}\n{WAIT}\n{WATCH}") == f"mov.u32 %r9, 0;\n{WAIT}\nmov.u32 %r9, 0;"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("atom.global.add.u32 %r4, [%rd1], 1;", "mov.u32 %r4, 7;"),
        ("@%p1 atom.global.gpu.acq_rel.add.u32 %r4, [%rd1+4], %r2;", "@%p1 mov.u32 %r4, 7;"),
        ("red.global.add.u32 [%rd1], 1;", "red.global.add.u32 [%rd1], 1;"),
        ("ld.global.u32 %r4, [%rd1];", "ld.global.u32 %r4, [%rd1];"),
    ],
)
def test_atomics_that_return_become_numbers(before, after):
    assert constant_atomics(before, 7) == after


def test_a_number_that_is_tested_when_it_is_loaded_is_not_zero():
    def tested(test, between=""):
        return f"ld.global.f32 %f4, [%rd1];{between} setp.{test}.f32 %p2, %f4, 0f00000000;"

    assert numbers_not_zero(tested("neu")).endswith("setp.eq.u32 %p2, 0, 0;")
    assert numbers_not_zero(tested("eq", " add.s32 %r1, %r1, 1;")).endswith("setp.eq.u32 %p2, 0, 1;")
    for other in (
        tested("lt"),
        tested("neu").replace("0f00000000", "0f3F800000"),
        tested("neu").replace("%f4,", "%f5,", 1),
    ):
        assert numbers_not_zero(other) == other


def test_remainders_of_addresses_become_0():
    text = "cvt.u32.u64 %r32, %rd53;\n\tand.b32 %r33, %r32, {};"
    assert aligned(text.format(12)) == "cvt.u32.u64 %r32, %rd53;\n\tmov.u32 %r33, 0;"
    assert aligned(text.format(16)) == text.format(16)
    another = text.format(12).replace("%r33, %r32", "%r33, %r31")
    assert aligned(another) == another


FLOATS = """
ld.shared.v2.f32 {%f1, %f2}, [%r1];
add.f32 %f3, %f1, %f2;
setp.gt.f32 %p1, %f3, 0f00000000;
and.pred %p2, %p1, %p9;
@%p2 bra A;
ld.shared.u32 %r2, [%r1];
setp.eq.s32 %p3, %r2, 0;
@%p3 bra A;
mov.b32 %f4, %r2;
mul.f32 %f5, %f4, %f4;
mov.b32 %r3, %f5;
setp.lt.u32 %p4, %r3, 2139095040;
@!%p4 bra B;
ld.param.f32 %f6, [k_param_0];
setp.gt.f32 %p5, %f6, 0f00000000;
@%p5 bra A;
ld.global.f32 %f7, [%rd1];
setp.gt.f32 %p6, %f7, 0f00000000;
@%p6 bra A;
shfl.sync.bfly.b32 %r4|%p7, %r3, 1, 31, -1;
mov.b32 %f8, %r4;
setp.nan.f32 %p8, %f8, %f8;
@%p8 bra B;
"""


def test_branches_on_floats_in_shared_memory():
    """Also on values computed from them, but not on integers, parameters or floats from global memory."""
    lines = FLOATS.split("\n")
    assert [branch.predicate for branch in float_branches(lines)] == ["%p2", "%p4", "%p8"]
    text, count = decided(FLOATS, True)
    assert count == 3 and [x for x in text.split("\n") if "bra.uni" in x] == [
        "\tbra.uni A;",
        "\tbra.uni B;",
        "\tbra.uni B;",
    ]
    text, _ = decided(FLOATS, False)
    assert "bra.uni" not in text and text.count("bra") == 3


def test_only_lane_0_stores():
    text = "\tst.shared.b32 [%r1], %r2;\n\t@%p4 st.shared.b32 [%r1+4], %r2;\n\tst.global.b32 [%rd1], %r2;"
    first, second, third = guarded(text, {0, 1}).split("\n")
    assert "setp.eq.u32 first, lane, 0; @first st.shared.b32 [%r1], %r2; }" in first
    assert "and.pred first, first, %p4; @first st.shared.b32 [%r1+4], %r2; }" in second
    assert third == "\tst.global.b32 [%rd1], %r2;"
    with pytest.raises(ValueError, match="not a plain store"):
        guarded(text, {2})


def test_one_kernel_of_a_file():
    text = ".version 9.0\n.extern .func f\n(\n)\n;\n.visible .entry a(\n)\n{\n ret;\n}\n.entry ab(\n)\n{\n trap;\n}\n"
    assert (
        one_entry(text, "a").count(".entry") == 1
        and "ret;" in one_entry(text, "a")
        and ".func f" in one_entry(text, "a")
    )
    assert plain("// x\n\tret; // y\n\n\n\t.loc 1 2 3\n\t.section .debug\n").split() == ["ret;"]


def test_fewer_threads():
    numbers = [{"parameter": "p", "offset": i, "type": "u64", "value": x} for i, x in enumerate((512, 3 << 32 | 512))]
    launch = Launch("k", "", {"launch": {"block_dim": [288, 1, 1]}, "arguments": numbers})
    made = with_threads(launch, 96, 128)
    assert made.input["launch"]["block_dim"] == [96, 1, 1]
    assert [x["value"] for x in made.input["arguments"]] == [512, 3 << 32 | 128]
    assert launch.input["arguments"][1]["value"] == 3 << 32 | 512


# ---- verdicts on small kernels ----

SHARED = ".shared .align 8 .b8 mem[1024];"


def said(body, threads=64, blocks=1, **options):
    pytest.importorskip("sentryward", reason="needs SentryWard")
    text = kernel("mov.u32 %r1, mem; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2;\n" + body, 1, SHARED)
    described = {
        "schema": "spverify.kernel-input/v1",
        "launch": {
            "grid_dim": [blocks, 1, 1], "block_dim": [threads, 1, 1], "cluster_dim": [1, 1, 1], "dynamic_shared_bytes": 0
        },
        "declarations": [{"parameter": "k_param_0", "type": "pointer", "space": "global", "object": "x"}],
        "arguments": [], "assumptions": {"representative_branches": True},
    }  # fmt: skip
    return verdict(Launch("k", text, described), Options(seconds=60, **options))


# Each thread passes its number to another.
EXCHANGE = """
st.shared.u32 [%r3], %r0;
bar.sync 0;
xor.b32 %r4, %r2, 128; add.s32 %r4, %r1, %r4; ld.shared.u32 %r5, [%r4];
mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d0, %d1; st.global.u32 [%d1], %r5;
"""


def test_a_barrier_and_the_race_without_it():
    assert said(EXCHANGE).result == PROVEN
    verdict = said(EXCHANGE.replace("bar.sync 0;", ""))
    assert verdict.result == "potential_race" and verdict.said.startswith("shared memory: ") and verdict.guards == 0


def test_a_race_in_global_memory_between_blocks():
    assert said(EXCHANGE, blocks=2).result == "potential_race"


def test_a_barrier_that_half_of_the_threads_skip():
    assert said("setp.lt.u32 %p1, %r0, 32; @%p1 bra end;" + EXCHANGE + "end:").result == "not_wellsynced"


ALL_LANES = "mov.u32 %r6, 5;\nst.shared.u32 [%r1], %r6;\nbar.sync 0;\nld.shared.u32 %r5, [%r1];"


def test_a_store_by_all_lanes_is_guarded_and_one_by_two_warps_is_a_race():
    verdict = said(ALL_LANES, threads=32)
    assert (verdict.result, verdict.guards) == (PROVEN, 1)
    verdict = said(ALL_LANES, threads=64)
    assert verdict.result == "potential_race"


# The side that a branch is decided to take is the side that is verified.
BRANCHES = """
ld.global.f32 %f1, [%d0]; st.shared.f32 [%r3], %f1;
bar.sync 0;
ld.shared.f32 %f2, [%r1];
setp.gt.f32 %p1, %f2, 0f00000000;
@%p1 bra end;
xor.b32 %r4, %r2, 128; add.s32 %r4, %r1, %r4; st.shared.u32 [%r4], 0; ld.shared.u32 %r5, [%r3];
end:
"""


def test_a_race_on_one_side_of_a_branch_on_floats():
    taken, not_taken = (said(BRANCHES, taken=taken) for taken in (True, False))
    assert (taken.result, taken.decided) == (PROVEN, 1)
    assert (not_taken.result, not_taken.decided) == ("potential_race", 1)
