"""Makes Triton's interpreter fast enough for the tests, and makes it round as a GPU does.

It spends most of its time preparing what is the same every time. `prepare` changes no bit of a result, except that
scans combine in a tree as on a GPU; `test_interpreter.py` compares with the unpatched interpreter.
"""

from __future__ import annotations

import math
import types
from typing import Any

import numpy as np
from triton import language
from triton.language import core
from triton.runtime import interpreter

PLAIN = {core.tensor, core.dtype, int, float, bool, type(None)}  # types that core does not unwrap
FULL = {"fp32", "fp64", "int1", "int32", "int64"}  # types that operations with themselves and with numbers keep


def prepare() -> None:
    patch_the_language_once_per_launch()
    call_builtins_directly()
    make_types_once()
    skip_overflow_checks()
    skip_casts_between_equal_types()
    scan_in_a_tree()
    decode_each_scalar_once()
    round_to_bfloat16()


def patch_the_language_once_per_launch() -> None:
    """The interpreter replaces every function of its language for each call of a jitted function, which takes three
    quarters of its time. Here the kernel's launch does it once, and reuses what the first launch collected."""
    patch, here = interpreter._patch_lang, types.SimpleNamespace(__globals__={"tl": language, "core": core})
    patched: list[Any] = []
    changes: list[tuple[Any, str, Any]] = []

    class Scope:
        def restore(self) -> None:
            patched.pop().restore()

    def patch_once(_: Any) -> Any:
        if patched:
            return None  # called by a jitted function, which restores nothing
        if not changes:
            first = patch(here)
            changes.extend((owner, name, getattr(owner, name)) for owner, name, _ in first._changes)
            first.restore()
        scope = interpreter._LangPatchScope()
        for change in changes:
            scope.set_attr(*change)
        patched.append(scope)
        return Scope()

    interpreter._patch_lang = patch_once


def call_builtins_directly() -> None:
    """Skips the wrapper that checks whether they are called from a kernel."""

    def patch(owner: Any, name: str, member: Any, _: Any, scope: Any) -> None:
        builtin, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

        def call(*arguments: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return builtin(*arguments, **options)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch


def make_types_once() -> None:
    """For the result of every operation the interpreter builds, checks and names a block type and wraps its shape. The
    outcome depends only on the element type and the shape, so it is cached."""
    built: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    numpy_types: dict[str, np.dtype] = {}
    build, unwrap = core.block_type.__init__, core._unwrap_if_constexpr
    equal, to_numpy = core.dtype.__eq__, interpreter._get_np_dtype

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        if element_ty.is_ptr():
            return build(self, element_ty, shape)  # such a type's name is not unique
        key = element_ty.name, *(n if type(n) is int else unwrap(n) for n in unwrap(shape))
        if key not in built:
            build(self, element_ty, shape)
            built[key] = vars(self).copy()
        vars(self).update(built[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else ()
        if shape not in shapes:
            shapes[shape] = core.tuple([core.constexpr(n) for n in shape]), core.constexpr(math.prod(shape))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    def numpy_type(type: Any) -> np.dtype:
        name = type.scalar.name
        if name not in numpy_types:
            numpy_types[name] = to_numpy(type)
        return numpy_types[name]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core.block_type.to_ir = lambda self, builder: self  # the interpreter has no other types
    core._unwrap_if_constexpr = lambda x: x if type(x) in PLAIN else unwrap(x)
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    interpreter._get_np_dtype = numpy_type


def skip_overflow_checks() -> None:
    """The interpreter computes whether each sum of integers overflows, for an assertion that only debug mode makes."""
    options = interpreter.interpreter_builder.options
    assert not options.debug
    object.__setattr__(options, "sanitize_overflow", False)


def skip_casts_between_equal_types() -> None:
    semantic = type(interpreter.interpreter_semantic)
    check = semantic.binary_op_type_checking_impl

    def operands(self: Any, a: Any, b: Any, *arguments: Any, **options: Any) -> Any:
        if type(a) is core.tensor and a.dtype.name in FULL:
            if type(b) is core.tensor and b.dtype is a.dtype:
                return (a, b) if a.shape is b.shape else self.broadcast_impl_value(a, b)
            if type(b) in (int, float) and a.dtype.name in ("fp32", "fp64"):
                return self.broadcast_impl_value(a, self.scalar_constant(b, a.dtype))
        return check(self, a, b, *arguments, **options)

    semantic.binary_op_type_checking_impl = operands


def scan_in_a_tree() -> None:
    """Combines blocks with themselves, shifted by 1, 2, 4, ...: a GPU's order, and one call of the function per step
    instead of one per element."""

    def scan(self: Any, given: Any) -> Any:
        size = given[0].handle.data.shape[self.axis]
        place = np.arange(size).reshape([-1 if i == self.axis else 1 for i in range(given[0].handle.data.ndim)])
        step = 1
        while step < size:
            before = [self.to_tensor(np.roll(x.handle.data, step, self.axis), x.dtype) for x in given]
            merged = self.combine_fn.fn(*before, *given)
            pairs = zip(given, merged if isinstance(merged, tuple) else (merged,), strict=True)
            given = [self.to_tensor(np.where(place < step, x.handle.data, y.handle.data), x.dtype) for x, y in pairs]
            step *= 2
        return list(given)

    interpreter.ScanOps.generic_scan = scan


def decode_each_scalar_once() -> None:
    """A float64 among the loss's scalars is passed in three parts, which every program would decode again."""
    from grpo_kernels.backends.triton import policy_inputs

    decode, decoded = policy_inputs.scalar, {}

    def scalar(scalars: Any, i: int, ACC: Any) -> Any:
        if ACC != language.float64:
            return decode(scalars, i, ACC)
        parts = tuple(scalars[3 * i : 3 * i + 3])
        if parts not in decoded:
            decoded[parts] = decode(scalars, i, ACC)
        return decoded[parts]

    policy_inputs.scalar = scalar


def round_to_bfloat16() -> None:
    """Rounds to nearest, ties to even, as cvt.rn does; the unpatched interpreter truncates."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != language.float32 or to.scalar != language.bfloat16:
            return cast(self, source, to)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(source.data), (bits >> 16) | 0x40, rounded).astype(np.uint16)
        return interpreter.TensorHandle(rounded, to.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
