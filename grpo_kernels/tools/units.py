"""Numbers for a reader."""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def byte_unit(largest: float) -> tuple[int, str]:
    """The unit in which bytes up to `largest` are shown, and its name."""
    return next(unit for unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")) if largest >= unit[0] or unit[0] == KIB)


def readable_bytes(nbytes: float) -> str:
    size, unit = byte_unit(nbytes)
    return f"{nbytes / size:,.{2 if size == GIB else 1}f} {unit}"


def milliseconds(seconds: float) -> str:
    """To three digits or so, without the unit."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 0.1 else f"{ms:.4f}"


def times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x"
