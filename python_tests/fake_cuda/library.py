"""nothing_gpu.cpp, compiled once for this torch and kept in build/."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("nothing_gpu.cpp")
BUILD = Path(__file__).parents[2] / "build"


def _torch() -> Path:
    """torch's folder. torch is not imported, since the library has to be loaded before it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def nothing_gpu() -> Path:
    """The shared library. Processes that need it at the same time compile it once."""
    torch, cxx = _torch(), compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler: neither $CXX nor c++ is on the path")
    version = (torch / "version.py").read_bytes()
    name = hashlib.sha256(SOURCE.read_bytes() + version + str(torch).encode()).hexdigest()[:16]
    library = BUILD / "fake_cuda" / f"{name}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(cxx, torch, library)
    return library


def _compile(cxx: str, torch: Path, library: Path) -> None:
    unfinished = library.with_suffix(".unfinished")
    command = [
        cxx, "-std=c++20", "-shared", "-fPIC", str(SOURCE), f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-lc10",
        "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}", "-o", str(unfinished),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{SOURCE.name} does not compile:\n{' '.join(command)}\n{done.stdout}{done.stderr}")
    unfinished.rename(library)
