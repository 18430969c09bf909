"""Single instructions against numpy, and edge cases against the PTX manual."""

import numpy as np
import pytest
import torch

from .memory import Trap
from .text import parse, split
from .written import kernel, run

LANES = np.arange(32)


def result(code, dtype, *inputs):
    """`code` computes %r9 or %d9 from %r1.. or %d1..; one value per lane."""
    out = np.zeros(32, dtype)
    size = out.itemsize
    bank = "r" if size == 4 else "d"
    loads = [f"mul.lo.s32 %r8, %r0, {size}; cvt.u64.u32 %d8, %r8; add.s64 %d10, %d0, %d8;"]
    for i in range(1, len(inputs) + 1):
        loads.append(f"add.s64 %d11, %d{i}, %d8; ld.global.b{8 * size} %{bank}{i}, [%d11];")
    # Addresses are in the registers that then hold the values: load from the last to the first.
    head, *rest = loads
    body = "\n".join([head, *reversed(rest), code, f"st.global.b{8 * size} [%d10], %{bank}9;"])
    run(body, out, *(np.ascontiguousarray(x.astype(dtype)) for x in inputs))
    return out


S = np.array([0, 1, -1, 7, -7, 2**31 - 1, -(2**31), 100] * 4, np.int32)
T = np.array([3, -3, 5, 2, -2, 1, 1, 33] * 4, np.int32)
F = np.array([0.0, -0.0, 1.5, -2.5, np.inf, -np.inf, np.nan, 1e-40] * 4, np.float32)
G = np.array([1.0, 2.0, -1.5, 0.5, np.nan, 3.0, 1.0, 2.0] * 4, np.float32)

INTEGERS = {
    "add.s32 %r9, %r1, %r2;": lambda x, y: x + y,
    "mul.lo.s32 %r9, %r1, %r2;": lambda x, y: x * y,
    "mul.hi.s32 %r9, %r1, %r2;": lambda x, y: (x.astype(np.int64) * y >> 32).astype(np.int32),
    "mad.lo.s32 %r9, %r1, %r2, 5;": lambda x, y: x * y + 5,
    "div.s32 %r9, %r1, %r2;": lambda x, y: np.trunc(x / y.astype(np.float64)).astype(np.int64).astype(np.int32),
    "rem.s32 %r9, %r1, %r2;": lambda x, y: np.fmod(x.astype(np.int64), y).astype(np.int32),
    "min.u32 %r9, %r1, %r2;": lambda x, y: np.minimum(x.view(np.uint32), y.view(np.uint32)).view(np.int32),
    "shl.b32 %r9, %r1, 31;": lambda x, y: x << 31,
    "shl.b32 %r9, %r1, 32;": lambda x, y: 0 * x,
    "shr.s32 %r9, %r1, 40;": lambda x, y: x >> 31,
    "shr.u32 %r9, %r1, 3;": lambda x, y: (x.view(np.uint32) >> 3).view(np.int32),
    "bfe.u32 %r9, %r1, 5, 2;": lambda x, y: x >> 5 & 3,
    "not.b32 %r9, %r1;": lambda x, y: ~x,
    "cvt.u16.u32 %h1, %r1; cvt.s32.s16 %r9, %h1;": lambda x, y: x.astype(np.int16).astype(np.int32),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 4, %r1, %p1;": lambda x, y: np.where(x < y, 4, x),
    "setp.lt.u32 %p1, %r1, %r2; @!%p1 mov.u32 %r9, 7; @%p1 mov.u32 %r9, %r2;": lambda x, y: np.where(
        x.view(np.uint32) < y.view(np.uint32), y, 7
    ),
    "{ .reg .b32 t; mov.b32 {%h1, %h2}, %r1; mov.b32 t, {%h2, %h1}; mov.b32 %r9, t; }": lambda x, y: (
        x << 16 | (x >> 16 & 0xFFFF)
    ),
    "prmt.b32 %r9, %r1, %r2, 0x3210;": lambda x, y: x,
    "prmt.b32 %r9, %r1, %r2, 0x7654;": lambda x, y: y,
    "popc.b32 %r9, %r1;": lambda x, y: np.array([int(v).bit_count() for v in x.view(np.uint32)], np.int32),
}


@pytest.mark.parametrize("code", INTEGERS)
def test_integers(code):
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(result(code, np.int32, S, T), INTEGERS[code](S, T))


FLOATS = {
    "add.rn.f32 %r9, %r1, %r2;": np.add,
    "mul.rn.f32 %r9, %r1, %r2;": np.multiply,
    "mul.rn.ftz.f32 %r9, %r1, %r2;": lambda x, y: np.where(abs(x) < 1e-38, 0, x) * y,
    "div.rn.f32 %r9, %r1, %r2;": np.divide,
    "max.f32 %r9, %r1, %r2;": np.fmax,
    "max.NaN.f32 %r9, %r1, %r2;": np.maximum,
    "fma.rn.f32 %r9, %r1, %r2, 0f3F800000;": lambda x, y: (x.astype(np.float64) * y + 1).astype(np.float32),
    "copysign.f32 %r9, %r1, %r2;": lambda x, y: np.copysign(y, x),
    "cvt.rni.f32.f32 %r9, %r1;": lambda x, y: np.rint(x),
    "cvt.rpi.ftz.f32.f32 %r9, %r1;": lambda x, y: np.ceil(np.where(abs(x) < 1e-38, 0 * x, x)),
    "cvt.sat.f32.f32 %r9, %r1;": lambda x, y: np.nan_to_num(np.clip(x, 0, 1)),
    "ex2.approx.ftz.f32 %r9, %r2;": lambda x, y: np.exp2(y.astype(np.float64)).astype(np.float32),
    "setp.ne.f32 %p1, %r1, %r2; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;": lambda x, y: (
        (x != y) & ~np.isnan(x) & ~np.isnan(y)
    ).astype(np.float32),
    "setp.gtu.f32 %p1, %r1, %r2; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;": lambda x, y: (
        (x > y) | np.isnan(x) | np.isnan(y)
    ).astype(np.float32),
}  # fmt: skip


@pytest.mark.parametrize("code", FLOATS)
def test_floats(code):
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(result(code, np.float32, F, G), FLOATS[code](F, G))


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves(kind, dtype):
    x = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-30, 34, 2)
    rounded = x.to(dtype).view(torch.int16).numpy().astype(np.uint16)
    pairs = result(f"cvt.rn.{kind}x2.f32 %r9, %r1, %r2;", np.float32, x.numpy(), x.flip(0).numpy()).view(np.uint32)
    assert (pairs >> 16 == rounded).all() and (pairs & 0xFFFF == rounded[::-1]).all()
    one = f"cvt.rn.{kind}.f32 %h1, %r1; cvt.f32.{kind} %r9, %h1;"
    assert (result(one, np.float32, x.numpy()) == x.to(dtype).float().numpy()).all()


def test_conversions_past_the_range():
    got = result("cvt.rzi.s32.f32 %r9, %r1;", np.float32, np.array([3e9, -3e9, np.nan, -1.9] * 8)).view(np.int32)
    assert got[:4].tolist() == [2**31 - 1, -(2**31), 0, -1]


def test_wide_products_and_64_bits():
    wide = np.array([2**40 + 3, -(2**40), 5, -1] * 8, np.int64)
    assert (result("mul.lo.s64 %d9, %d1, 3;", np.int64, wide) == 3 * wide).all()
    assert (
        result("cvt.u32.u64 %r1, %d1; mul.wide.s32 %d9, %r1, -2;", np.int64, wide) == -2 * wide.astype(np.int32)
    ).all()
    assert (
        result("mul.hi.u64 %d9, %d1, 4;", np.int64, wide) == [int(np.uint64(x)) * 4 >> 64 for x in wide.view(np.uint64)]
    ).all()


SHUFFLES = {
    "bfly.b32 %r9, %r1, 5, 0x1f, -1": LANES ^ 5,
    "up.b32 %r9, %r1, 3, 0, -1": np.where(LANES >= 3, LANES - 3, LANES),
    "down.b32 %r9, %r1, 3, 0x1f, -1": np.where(LANES < 29, LANES + 3, LANES),
    "idx.b32 %r9, %r1, 9, 0x1f, -1": np.full(32, 9),
    "down.b32 %r9, %r1, 1, 0x181f, -1": np.where(LANES % 8 < 7, LANES + 1, LANES),  # segments of 8
}


@pytest.mark.parametrize("code", SHUFFLES)
def test_shuffles(code):
    assert (result(f"shfl.sync.{code};", np.int32, LANES) == SHUFFLES[code]).all()


def test_reductions_and_votes_of_a_warp():
    assert (result("redux.sync.add.s32 %r9, %r1, -1;", np.int32, S) == S.sum(dtype=np.int32)).all()
    code = "setp.gt.s32 %p1, %r1, 4; vote.sync.ballot.b32 %r9, %p1, -1;"
    assert (result(code, np.uint32, LANES) == 0xFFFFFFE0).all()


def test_atomics_of_lanes_at_one_place():
    out, order = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    run(
        "atom.global.add.u32 %r1, [%d0], 2; mul.wide.u32 %d2, %r0, 4; add.s64 %d3, %d1, %d2; st.global.u32 [%d3], %r1;",
        out, order,
    )  # fmt: skip
    assert out[0] == 64 and sorted(order.tolist()) == list(range(0, 64, 2))


# ---- what is refused ----


@pytest.mark.parametrize(
    "code",
    [
        "add.cc.u32 %r1, %r1, %r2;",
        "add.rz.f32 %f1, %f1, %f2;",
        "cvt.rz.f32.f64 %f1, %g1;",
        "sin.approx.f32 %f1, %f2;",
        "mov.u32 %r1, %smid;",
        "call.uni foo, ();",
        "ld.global.u32 %r1, [nobody];",
    ],
)
def test_unknown_instructions_are_named(code):
    with pytest.raises(NotImplementedError, match="of k"):
        run(code)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("ld.global.u32 %r1, [%d0+4];", "outside of every tensor"),
        ("st.global.u32 [%d0+-4], %r1;", "outside of every tensor"),
        ("ld.global.u32 %r1, [%d0+2];", "misaligned"),
        ("ld.shared.u8 %r1, [%r0+64];", "shared memory of 0 bytes"),
        ("trap;", "trap"),
        ("call.uni __assertfail, (param0, param1);", "device-side assert"),
        ("setp.eq.s32 %p1, %r0, 3; @%p1 ret; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "have exited"),
    ],
)
def test_errors_of_a_gpu_are_traps(code, message):
    with pytest.raises(Trap, match=message):
        run(code, np.zeros(1, np.uint32))


def test_names_in_braces_are_local():
    block = "{ .reg .b32 t; .reg .pred q; again: mov.u32 t, 1; setp.eq.u32 q, t, 1; @q bra done; bra again; done: }"
    made = parse(kernel(f"{block}\n{block}\n", 0), "k")
    assert len(made.labels) == 4 and len([n for n in made.registers if n.startswith("t@")]) == 2
    run(f"{block}\n{block}")
    assert split("{%r1, %r2}, [%d0+4], 7") == ["{%r1, %r2}", "[%d0+4]", "7"]
    with pytest.raises(ValueError, match=r"no kernel 'other'.* it has k"):
        parse(kernel("", 0), "other")
