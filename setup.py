"""The native modules, without torch: pybind11 and ninja build in seconds, and one wheel serves every torch.

`grpo_kernels.backends._cpu` is built unless GRPO_KERNELS_CPU=0 leaves it out, with the backend "cpu".
`grpo_kernels.backends._cuda` is built from csrc/cuda/*.cu where nvcc is found; a CUDA build that fails is reported and
left out. GRPO_KERNELS_CUDA=0 never tries it, =1 makes its failure an error. GRPO_KERNELS_CUDA_ARCHS="80;90" replaces
the default list of architectures.
GRPO_KERNELS_EMULATED=1 builds `grpo_kernels.backends._emulated` instead, the CUDA kernels for the CPU:
python_tests/conftest.py does it for the tests, so that no wheel and no user's build has it.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
INSTRUCTION_SETS = {"generic": ""}
if X86:
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}
# gcc 12's AVX-512 headers warn about their own deliberately undefined registers.
CXX_FLAGS = shlex.split(
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"
)
# No fused multiply-adds but those that a kernel asks for: fused in one kernel and not in another, a product and a sum
# would make two results of one row.
NVCC_FLAGS = "-O3 -std=c++17 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden"
DEFAULT_ARCHS = ("80", "90", "100", "120")

RULES = """
rule cxx
  command = {cxx} -MMD -MF $out.d {flags} $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = nvcc -MMD -MF $out.d {nvcc} {archs} {include} $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule emulate
  command = {cxx} -MMD -MF $out.d {flags} $flags -Wno-unknown-pragmas -x c++ -include {emulation} -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {link} -shared $in -o $out $libs
"""


def compiler() -> str:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for cxx in candidates:
        if shutil.which(shlex.split(cxx)[0]):
            return cxx
    tried = ", ".join(candidates)
    sys.exit(f"grpo_kernels needs a C++17 compiler and found none (tried {tried}): install g++ or clang, or set CXX.")


def cuda_architectures() -> str:
    """nvcc's flags: every wanted architecture that this nvcc knows, and PTX of the newest for those to come."""
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    asked = os.environ.get("GRPO_KERNELS_CUDA_ARCHS")
    archs = asked.split(";") if asked else [a for a in DEFAULT_ARCHS if f"compute_{a}" in known.split()]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return " ".join([*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_with_ninja(ext)
        except (subprocess.CalledProcessError, OSError) as error:
            if not ext.optional:
                raise SystemExit(f"building {ext.name} failed; the compiler's message is above ({error})") from None
            print(f"warning: {ext.name} was not built and the CUDA backend will be missing ({error})", file=sys.stderr)

    def build_with_ninja(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # A folder that stays: build_temp is a new one for every editable installation, and ninja would start again.
        build = ROOT.resolve() / "build" / f"{sys.implementation.cache_tag}-{platform.machine()}" / ext.name
        target.parent.mkdir(parents=True, exist_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        module = ext.name.rpartition(".")[2]
        (build / "build.ninja").write_text(self.ninja_file(module, ext.sources, build, target))
        subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)])

    def ninja_file(self, module: str, sources: list[str], build: Path, target: Path) -> str:
        defines = f"-DGK_MODULE={module} -DGK_{module.strip('_').upper()}"
        include = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']} {defines}"
        flags = " ".join([*CXX_FLAGS, "-DGK_X86" * X86, include, os.environ.get("CXXFLAGS", "")])
        emulated = module == "_emulated"
        cuda = not emulated and any(s.endswith(".cu") for s in sources)
        archs = cuda_architectures() if cuda else ""
        cxx = compiler()
        link = f"nvcc -ccbin {cxx} -cudart static" if cuda else cxx  # nvcc knows where its libraries are
        rules = {"cxx": cxx, "nvcc": NVCC_FLAGS, "link": link, "flags": flags, "archs": archs, "include": include}
        lines = [RULES.format(**rules, emulation=ROOT.resolve() / "csrc/emulation/cuda_on_cpu.h")]
        objects = []

        def add(rule: str, source: str, suffix: str = "", extra: str = "") -> None:
            objects.append(build / f"{Path(source).name}{suffix}.o")
            lines.append(f"build {objects[-1]}: {rule} {(ROOT / source).resolve()}\n  flags = {extra}")

        for source in sources:
            if source.endswith("sweep_simd.cpp"):
                for isa, isa_flags in INSTRUCTION_SETS.items():
                    add("cxx", source, f"_{isa}", f"-DGK_ISA={isa} {isa_flags}")
            else:
                cuda_rule = "emulate" if emulated else "nvcc"
                add(cuda_rule if source.endswith(".cu") else "cxx", source)
        threads = "-Xcompiler -pthread" if cuda else "-pthread -ldl"
        libs = "-undefined dynamic_lookup" if sys.platform == "darwin" else threads
        libs = f"{libs} {os.environ.get('LDFLAGS', '')}"
        lines.append(f"build {target}: link {' '.join(map(str, objects))}\n  libs = {libs}")
        return "\n".join(lines) + "\n"


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(pattern))


def extensions() -> list[Extension]:
    kernels = sources("cuda", "*.cu")
    if os.environ.get("GRPO_KERNELS_EMULATED") == "1":
        emulation = ["csrc/bindings.cpp", *sources("emulation", "*.cpp"), *kernels]
        return [Extension("grpo_kernels.backends._emulated", emulation)]
    modules = []
    if os.environ.get("GRPO_KERNELS_CPU") != "0":
        modules.append(Extension("grpo_kernels.backends._cpu", ["csrc/bindings.cpp", *sources("cpu", "*.cpp")]))
    wanted = os.environ.get("GRPO_KERNELS_CUDA")
    if kernels and wanted != "0" and (wanted == "1" or shutil.which("nvcc")):
        cuda = Extension("grpo_kernels.backends._cuda", ["csrc/bindings.cpp", *sources("cuda", "*.cpp"), *kernels])
        cuda.optional = wanted != "1"
        modules.append(cuda)
    return modules


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
