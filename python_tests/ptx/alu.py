"""Arithmetic, comparison, selection and conversion, which access registers only. A builder turns an instruction into
run(warp, mask)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .convert import convert
from .floats import EXTREMES, FLOATS, float_function
from .frame import ALL, LANES, Frame, dtype_of, put
from .memory import SHARED_WINDOW
from .text import Instruction, size_of, split

Run = Callable[[object, np.ndarray], None]


def build(frame: Frame, ins: Instruction) -> Run | None:
    """None if the instruction is not one of this module."""
    builder = BUILDERS.get(ins.parts[0])
    return None if builder is None else builder(frame, ins)


# ---- the general form: every operand has the instruction's type ----


def in_place(ufunc: np.ufunc, target: int, sources: list[int]) -> Run:
    """numpy's own functions write straight into the register."""
    if len(sources) == 1:
        (a,) = sources

        def one(w, m):
            v = w.rows
            if m is ALL:
                ufunc(v[a], out=v[target])
            else:
                ufunc(v[a], out=v[target], where=m)

        return one
    a, b = sources

    def two(w, m):
        v = w.rows
        if m is ALL:
            ufunc(v[a], v[b], out=v[target])
        else:
            ufunc(v[a], v[b], out=v[target], where=m)

    return two


def computed(fn: Callable, target: int, sources: list[int]) -> Run:
    def run(w, m):
        v = w.rows
        put(v[target], m, fn(*(v[i] for i in sources)))

    return run


INTEGERS = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "max": np.maximum, "min": np.minimum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not,
}  # fmt: skip
LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.not_equal, "not": np.logical_not}


# Any other modifier (a carry, saturation, rounding towards 0) would change results.
MODIFIERS = {"rn", "rm", "ftz", "lo", "hi", "NaN", "approx", "full"}


def _same_type(frame: Frame, ins: Instruction) -> Run:
    name, kind = ins.parts[0], ins.parts[-1]
    if (unknown := set(ins.parts[1:-1]) - MODIFIERS) or ("rm" in ins.parts and name != "fma"):
        raise NotImplementedError(f"{name} with {unknown or 'rm'}")
    target = frame.target(ins.operands[0], kind)
    sources = [frame.source(x, kind) for x in ins.operands[1:]]
    fn = float_function(ins) if kind in ("f16", "f32", "f64") else _integer_function(name, kind, ins)
    if isinstance(fn, np.ufunc) and target is not None:
        return in_place(fn, target, sources)
    return computed(fn, target, sources)


def _integer_function(name: str, kind: str, ins: Instruction) -> Callable:
    if kind == "pred":
        return LOGIC[name]
    if name == "mul":
        return _high_product if "hi" in ins.parts else np.multiply
    if name == "mad" and "lo" in ins.parts:
        return lambda x, y, z: x * y + z
    if name in ("shl", "shr"):
        raise AssertionError("shifts have a builder of their own")
    if name in ("div", "rem"):
        return lambda x, y: _quotient(x, y)[name == "rem"]
    if name == "popc":
        return lambda x: np.array([int(v).bit_count() for v in x])
    if name == "clz":
        return lambda x: np.array([8 * x.itemsize - int(v).bit_length() for v in x])
    return INTEGERS[name]


def _high_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    bits = 8 * x.itemsize
    both = [(int(a) * int(b)) >> bits for a, b in zip(x, y, strict=True)]
    return np.array([v & ((1 << bits) - 1) for v in both], f"u{x.itemsize}").view(x.dtype)


def _quotient(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds towards zero. A division by zero, which a compiler may hoist above its test, gives all ones, as on a
    GPU."""
    zero = y == 0
    safe = np.where(zero, 1, y).astype(x.dtype)
    quotient = x // safe
    if x.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != x))
    rest = x - quotient * safe
    return np.where(zero, np.array(-1).astype(x.dtype), quotient), np.where(zero, x, rest)


# ---- special forms ----


def _shift(frame: Frame, ins: Instruction) -> Run:
    """A shift by more than the number of bits gives zeros, or copies of the sign."""
    name, kind = ins.parts[0], ins.parts[-1]
    bits, dtype = 8 * size_of(kind), dtype_of(kind)
    limit = bits - 1 if dtype.kind == "i" and name == "shr" else bits
    move = np.left_shift if name == "shl" else np.right_shift

    def shifted(x, by):
        by = np.minimum(by, limit).astype(dtype)
        return np.where(by < bits, move(x, np.minimum(by, bits - 1)), 0)

    sources = [frame.source(ins.operands[1], kind), frame.source(ins.operands[2], "u32")]
    return computed(shifted, frame.target(ins.operands[0], kind), sources)


def _product(frame: Frame, ins: Instruction) -> Run:
    if "wide" not in ins.parts:
        return _same_type(frame, ins)
    kind = ins.parts[-1]
    wide = f"{kind[0]}{16 * size_of(kind)}"
    to = dtype_of(wide)
    sources = [frame.source(x, kind) for x in ins.operands[1:3]] + [frame.source(x, wide) for x in ins.operands[3:]]
    target = frame.target(ins.operands[0], wide)
    return computed(lambda x, y, *z: sum(z, x.astype(to) * y), target, sources)


def _bit_field(frame: Frame, ins: Instruction) -> Run:
    kind = ins.parts[-1]
    if not kind.startswith("u"):
        raise NotImplementedError("a signed bit field")
    sources = [frame.source(ins.operands[1], kind), *(frame.source(x, "u32") for x in ins.operands[2:])]

    def extract(x, at, count):
        one = x.dtype.type(1)
        return (x >> (at & 255).astype(x.dtype)) & ((one << (count & 255).astype(x.dtype)) - one)

    return computed(extract, frame.target(ins.operands[0], kind), sources)


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(name: str, is_float: bool) -> Callable:
    def either_nan(x, y):
        return np.isnan(x) | np.isnan(y)

    if name == "nan":
        return either_nan
    if name == "num":
        return lambda x, y: ~either_nan(x, y)
    if is_float and name.endswith("u") and name[:-1] in COMPARE:  # or unordered
        return lambda x, y: COMPARE[name[:-1]](x, y) | either_nan(x, y)
    if is_float and name == "ne":  # ordered, which numpy's is not
        return lambda x, y: (x != y) & ~either_nan(x, y)
    return COMPARE[name]


def _setp(frame: Frame, ins: Instruction) -> Run:
    kind = ins.parts[-1]
    combined = [p for p in ins.parts[2:-1] if p in LOGIC]
    if len(ins.parts) != 3 + len(combined):
        raise NotImplementedError("setp with a modifier")
    sources = [frame.source(x, kind) for x in ins.operands[1:3]]
    compare = comparison(ins.parts[1], kind.startswith("f"))
    first, _, second = ins.operands[0].partition("|")
    target = frame.target(first, "pred")
    if second:
        raise NotImplementedError("setp with two targets")
    if not combined:
        return (
            in_place(compare, target, sources) if isinstance(compare, np.ufunc) else computed(compare, target, sources)
        )
    sources.append(frame.source(ins.operands[3].lstrip("!"), "pred"))
    negated, join = ins.operands[3].startswith("!"), LOGIC[combined[0]]
    return computed(lambda x, y, q: join(compare(x, y), q ^ negated), target, sources)


def _selp(frame: Frame, ins: Instruction) -> Run:
    kind = ins.parts[-1]
    sources = [frame.source(ins.operands[3], "pred"), *(frame.source(x, kind) for x in ins.operands[1:3])]
    return computed(np.where, frame.target(ins.operands[0], kind), sources)


def _mov(frame: Frame, ins: Instruction) -> Run:
    (to, source), kind = ins.operands, ins.parts[-1]
    if source in ("%globaltimer", "%clock64"):
        target = frame.target(to, kind)
        return lambda w, m: put(w.rows[target], m, w.block.grid.nanoseconds())
    if to.startswith("{"):
        return _unpack(frame, split(to[1:-1]), source, kind)
    if source.startswith("{"):
        return _pack(frame, to, split(source[1:-1]), kind)
    target, a = frame.target(to, kind), frame.source(source, kind)

    def move(w, m):
        put(w.rows[target], m, w.rows[a])

    return move


def _unpack(frame: Frame, targets: list[str], source: str, kind: str) -> Run:
    size = size_of(kind) // len(targets)
    places = [frame.target(x, f"u{8 * size}") for x in targets]
    wide_kind, part = frame.source(source, f"u{8 * size_of(kind)}"), dtype_of(f"u{8 * size}")

    def run(w, m):
        parts = np.ascontiguousarray(w.rows[wide_kind]).view(part).reshape(LANES, -1).copy()
        for k, place in enumerate(places):
            if place is not None:
                put(w.rows[place], m, parts[:, k])

    return run


def _pack(frame: Frame, target: str, sources: list[str], kind: str) -> Run:
    size = size_of(kind) // len(sources)
    parts = [frame.source(x, f"u{8 * size}") for x in sources]
    to = frame.target(target, f"u{8 * size_of(kind)}")
    wide_kind = dtype_of(f"u{8 * size_of(kind)}")

    def run(w, m):
        put(w.rows[to], m, np.stack([w.rows[i] for i in parts], axis=1).view(wide_kind)[:, 0])

    return run


def _cvt(frame: Frame, ins: Instruction) -> Run:
    to, kind = ins.parts[-2:]
    sources = [frame.source(x, kind) for x in ins.operands[1:]]
    return computed(convert(to, kind, ins.parts[1:-2]), frame.target(ins.operands[0], to), sources)


def _cvta(frame: Frame, ins: Instruction) -> Run:
    """Generic addresses are those of global and parameter memory; shared memory has a window of its own."""
    target, a = frame.target(ins.operands[0], "u64"), frame.source(ins.operands[1], "u64")
    shift = np.uint64(SHARED_WINDOW if any(p.startswith("shared") for p in ins.parts) else 0)
    return computed((lambda x: x - shift) if "to" in ins.parts else (lambda x: x + shift), target, [a])


def _prmt(frame: Frame, ins: Instruction) -> Run:
    if ins.parts[1:] != ("b32",):
        raise NotImplementedError("prmt with a mode")
    sources = [frame.source(x, "u32") for x in ins.operands[1:]]

    def permute(x, y, pick):
        eight = np.stack([x, y], axis=1).view(np.uint8)
        nibbles = (pick[:, None] >> np.array([0, 4, 8, 12], np.uint32)) & 15
        chosen = np.take_along_axis(eight, (nibbles & 7).astype(np.int64), 1)
        signs = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
        return np.ascontiguousarray(np.where(nibbles & 8, signs, chosen)).view(np.uint32)[:, 0]

    return computed(permute, frame.target(ins.operands[0], "b32"), sources)


BUILDERS: dict[str, Callable[[Frame, Instruction], Run]] = {
    **dict.fromkeys((*FLOATS, *EXTREMES, *INTEGERS, "fma", "ex2", "lg2", "copysign", "rem", "popc", "clz"), _same_type),
    "mul": _product, "mad": _product, "shl": _shift, "shr": _shift, "bfe": _bit_field, "setp": _setp, "selp": _selp,
    "mov": _mov, "cvt": _cvt, "cvta": _cvta, "prmt": _prmt,
}  # fmt: skip
