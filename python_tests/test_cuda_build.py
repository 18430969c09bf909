"""What nvcc makes of the CUDA kernels, without a GPU: they compile for every architecture, in registers alone, and the
float kernels have no double precision in them."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# Two blocks of 9 warps, or one of 17, and the registers of a multiprocessor; other kernels have blocks of 8.
MOST_REGISTERS = {True: 112, False: 128}
# Numbers that come or go as doubles are converted, and no more.
# One quotient decides about a sample; a thread splits or joins a mean. Nothing of it is done for each token.
DOUBLES_ALLOWED = {"diversity": 2, "whiten": 2}
ARITHMETIC = re.compile(r"^\s*(?:@\S+ )?(?!ld|st|cvt|mov|selp)\w+\S*\.f64.*$", re.MULTILINE)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCES, reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here"),
]


def compiled(source, arch, folder):
    """ptxas's report and the PTX."""
    flags = f"-O3 -std=c++17 -fmad=false -arch=sm_{arch} -Xptxas -v -cubin -keep -keep-dir {folder}".split()
    command = ["nvcc", *flags, "-o", folder / f"{source.stem}.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, (folder / f"{source.stem}.ptx").read_text()


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_registers_spills_and_doubles(arch, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda source: compiled(source, arch, tmp_path), SOURCES))
    for source, (report, ptx) in zip(SOURCES, results, strict=True):
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
        assert frames and set(frames) == {("0", "0", "0")}, (source.name, frames)
        assert max(registers) <= MOST_REGISTERS[source.stem.startswith("row")], (source.name, registers)
        assert ".local " not in ptx, source.name
        doubles = ARITHMETIC.findall(ptx.replace(".reg .f64", ""))
        assert len(doubles) <= DOUBLES_ALLOWED.get(source.stem, 0), (source.name, doubles)
        print(f"sm_{arch} {source.name}: at most {max(registers)} registers")
