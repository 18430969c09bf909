"""compute-sanitizer, ncu and pytest: what they are asked, and what they say."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import sys

DRAM = ("dram__bytes_read.sum", "dram__bytes_write.sum")
KERNELS_COUNTED = r"row_kernel|stats_kernel|policy_kernel|gradient_kernel"
NCU = (
    "--clock-control", "none", "--target-processes", "all", "--csv", "--page", "raw", "--print-units", "base",
    "--metrics", ",".join(DRAM), "--kernel-name", f"regex:{KERNELS_COUNTED}",
)  # fmt: skip
# What a tool says that cannot look at this device: no fault of a kernel's.
REFUSALS = (
    "Device not supported", "LibraryNotLoaded", "ERR_NVGPUCTRPERM", "Failed to initialize the profiler",
    "Unable to find compatible", "No supported devices",
)  # fmt: skip
# The shared tests by backend, the widest first. The others build, compile for other targets, or compare CPU libraries.
TEST_FILES = (
    "loss/test_losses.py", "loss/test_logps.py", "advantages/test_advantages.py", "advantages/test_returns.py",
    "advantages/test_diversity.py", "loss/test_edges.py", "kernels/test_triton.py", "kernels/test_cuda_tokens.py",
    "kernels/test_triton_token.py", "loss/test_linear.py", "kernels/test_ops.py", "loss/test_properties.py",
)  # fmt: skip
# torch's own kernels are not ours to check, and many; how older versions say that they know no such option.
OURS_ALONE = ("--kernel-name-exclude", "kernel_substring=at::native")
NO_OPTION = re.compile(r"(?i)(unrecogni[sz]ed|unknown|invalid|ambiguous) (command line )?(option|argument)")
TEST_TIMEOUT = 30  # seconds of one test


def refused(output: str) -> str | None:
    return next((line.strip()[:200] for line in output.splitlines() if any(r in line for r in REFUSALS)), None)


def summary(output: str) -> str | None:
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    return found[1] if found else None


def bytes_per_logit(output: str) -> dict[str, list[float]]:
    """From ncu's CSV among other lines: what each launch of a kernel read and wrote; by the kernel's name."""
    lines = output.splitlines()
    logits = next(json.loads(line)["logits"] for line in lines if line.startswith('{"logits"'))
    table = csv.DictReader(io.StringIO("\n".join(line for line in lines if line.startswith('"'))))
    found: dict[str, list[float]] = {}
    for row in table:
        if row["ID"]:  # the line of units has none
            total = sum(float(row[metric].replace(",", "")) for metric in DRAM)
            name = re.search(KERNELS_COUNTED, row["Kernel Name"])
            found.setdefault(name[0] if name else row["Kernel Name"], []).append(round(total / logits, 3))
    return found


def pytest(file: str, dry: bool) -> tuple[str, ...]:
    """A test that hangs ends its process from another thread, also where the main one is in a synchronisation."""
    has = importlib.util.find_spec("pytest_timeout") is not None
    timeout = ("--timeout", str(TEST_TIMEOUT), "--timeout-method=thread") if has else ()
    few = ("-k", "transforms and float32", "-x") if dry else ()
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *timeout, *few, f"python_tests/{file}")


def test_environment(dry: bool) -> dict[str, str]:
    """Only these backends, on tensors that travel: see python_tests/conftest.py."""
    return {"GRPO_KERNELS_TEST_BACKENDS": "cpu" if dry else "cuda,triton"}
