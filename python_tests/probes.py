"""Compiles C++ files of the tests, with kernels and the emulator, into libraries."""

import ctypes
import subprocess
from pathlib import Path


def compiled_probe(source: Path, csrc: Path, folder: Path) -> ctypes.CDLL:
    """Compiles `source`, with the kernels and the emulator of `csrc`, into `folder`."""
    library = folder / f"{source.stem}.so"
    flags = "c++ -std=c++17 -O0 -fPIC -shared -w -DGK_EMULATED".split()
    include = ["-include", csrc / "emulation/cuda_on_cpu.h", "-I", csrc]
    subprocess.run([*flags, *include, "-o", library, source], check=True)
    return ctypes.CDLL(str(library))
