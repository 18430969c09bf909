"""Triton's interpreter as the tests need it: fast enough, and rounding as a GPU does."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
from triton import language
from triton.runtime import interpreter


def patch_the_language_once_a_launch() -> None:
    """It replaces every function of its language again for each call of a helper, which is three quarters of its time.
    Here the kernel's launch does it, for all of its helpers."""
    patch, here = interpreter._patch_lang, types.SimpleNamespace(__globals__={"tl": language, "core": language.core})
    patched: list[Any] = []

    class Scope:
        def restore(self) -> None:
            patched.pop().restore()

    def patch_once(_: Any) -> Any:
        if patched:
            return None  # by a helper, which restores nothing
        patched.append(patch(here))
        return Scope()

    interpreter._patch_lang = patch_once


def round_to_bfloat16() -> None:
    """To nearest, ties to even, as cvt.rn does and the interpreter, which cuts the last bits off, does not."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != language.float32 or to.scalar != language.bfloat16:
            return cast(self, source, to)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(source.data), (bits >> 16) | 0x40, rounded).astype(np.uint16)
        return interpreter.TensorHandle(rounded, to.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
