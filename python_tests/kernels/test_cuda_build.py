"""nvcc's output for the CUDA kernels, without a GPU: they compile for every architecture without spills, and the float
kernels use no double precision."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# So that a multiprocessor's registers suffice for two blocks of 9 warps (the row kernel's smaller one), or two of 8.
MOST_REGISTERS = {"rows.cu": 112, "rows_cluster.cu": 112}
# One quotient per sample and two sums per thread: see docs/measurements.md.
DOUBLES = {"diversity.cu", "whiten.cu"}
# Arithmetic in double precision. Loads, stores, moves and conversions of doubles are fine.
ARITHMETIC = re.compile(r"^\s*(?:@\S+ )?(?!ld|st|cvt|mov|selp)\w+\S*\.f64.*$", re.MULTILINE)
# Kernels that wait for other blocks.
WAITING = {"tokens.cu": ["token_kernel"], "gae.cu": ["gae_kernel"], "diversity.cu": ["decide_kernel"]}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCES, reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]


def compiled(source, arch, folder):
    """ptxas's report and the PTX. For sm_90 the PTX exists already, since other tests execute it."""
    if arch == 90:
        from ptx import nvcc

        ptx = nvcc.build(arch) / f"{source.stem}.ptx"
        command = ["ptxas", "-arch=sm_90", "-v", "-o", folder / f"{source.stem}.cubin", ptx]
    else:
        ptx = folder / f"{source.stem}.ptx"
        flags = f"-O3 -std=c++17 -fmad=false -arch=sm_{arch} -Xptxas -v -cubin -keep -keep-dir {folder}".split()
        command = ["nvcc", *flags, "-o", folder / f"{source.stem}.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, ptx.read_text()


def waits_for_blocks(ptx):
    """The kernels that wait for other blocks. Each must have a watchdog that ends it with its name."""
    constants = re.findall(r"\.b8 \S+\[\d+\] = \{([\d, ]+)\}", ptx)
    strings = [bytes(int(code) for code in c.split(",")).rstrip(b"\0").decode("latin-1") for c in constants]
    kernels = []
    for entry in ptx.split(".entry ")[1:]:
        if "ld.acquire.gpu" not in entry:
            continue
        kernels += [name for name in strings if name.endswith("_kernel") and name in entry.split("(")[0]]
        assert "__assertfail" in entry and "globaltimer" in entry, entry.split("(")[0]
    return kernels


@pytest.mark.parametrize("arch", [80, 90, pytest.param(100, marks=pytest.mark.soak)])
def test_registers_spills_and_doubles(arch, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda source: compiled(source, arch, tmp_path), SOURCES))
    for source, (report, ptx) in zip(SOURCES, results, strict=True):
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
        assert frames and set(frames) == {("0", "0", "0")}, (source.name, frames)
        assert max(registers) <= MOST_REGISTERS.get(source.name, 128), (source.name, registers)
        assert ".local " not in ptx, source.name
        assert bool(ARITHMETIC.findall(ptx.replace(".reg .f64", ""))) == (source.name in DOUBLES), source.name
        assert waits_for_blocks(ptx) == WAITING.get(source.name, []), source.name
        print(f"sm_{arch} {source.name}: at most {max(registers)} registers")
        if source.stem in ("rows", "rows_cluster"):
            check_waits(ptx, bulk=arch >= 90, clusters=arch >= 90 and source.stem == "rows_cluster")


def check_waits(ptx, bulk, clusters):
    """Wait loops have the shape that SentryWard recognises, one of them with a watchdog; on sm_80 they sleep. Stores to
    other blocks of a cluster name the block."""
    waits = re.findall(r"AGAIN:[^}]*DONE:", ptx)
    if clusters != ("cluster_ctarank" in ptx) or not waits:  # the kernel for clusters where there are none
        assert not bulk and not waits
        return
    watched = [wait for wait in waits if "globaltimer" in wait]
    assert watched and len(watched) < len(waits) and "__assertfail" in ptx
    assert all(("mbarrier.try_wait" if bulk else "mbarrier.test_wait") in wait for wait in waits)
    assert all("selp" not in wait and ("nanosleep" in wait) != bulk for wait in waits)
    assert "mapa.u64" not in ptx and ("st.shared::cluster.b32" in ptx) == clusters


def test_a_launch_asks_for_the_most_shared_memory_whatever_it_needs(tmp_path):
    """Otherwise two threads that launch one kernel with different sizes could make each other's launch fail."""
    flags = ["-std=c++17", "-arch=sm_90", "-cudart", "none", "-I", ROOT / "csrc", "-o", tmp_path / "probe"]
    sources = [ROOT / "python_tests/kernels" / name for name in ("launch_probe.cu", "launch_runtime.cpp")]
    done = subprocess.run(["nvcc", *flags, *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = subprocess.run([tmp_path / "probe"], capture_output=True, text=True, check=True).stdout.splitlines()
    asked = [f"at most {(227 << 10) - 1024}", "carveout 100"]  # a kilobyte is the kernel's own
    large, medium, small = (f"launched with {kilobytes << 10}" for kilobytes in (200, 60, 1))
    assert said == [*asked, large, *asked, medium, small]
