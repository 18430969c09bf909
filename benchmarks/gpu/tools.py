"""compute-sanitizer, ncu and pytest: their arguments, and how to read their output."""

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
# Messages of a tool that does not support this device, which is not a kernel's fault.
REFUSALS = (
    "Device not supported", "LibraryNotLoaded", "ERR_NVGPUCTRPERM", "Failed to initialize the profiler",
    "Unable to find compatible", "No supported devices",
)  # fmt: skip
# The tests of all backends, the broadest first. The others build, compile for other targets, or compare CPU libraries.
TEST_FILES = (
    "loss/test_losses.py", "loss/test_logps.py", "advantages/test_advantages.py", "advantages/test_returns.py",
    "advantages/test_diversity.py", "loss/test_edges.py", "kernels/test_triton.py", "kernels/test_cuda_tokens.py",
    "kernels/test_triton_token.py", "loss/test_linear.py", "kernels/test_ops.py", "loss/test_properties.py",
)  # fmt: skip
# Only our kernels are checked, not torch's many; and what older versions say about an unknown option.
OURS_ALONE = ("--kernel-name-exclude", "kernel_substring=at::native")
NO_OPTION = re.compile(r"(?i)(unrecogni[sz]ed|unknown|invalid|ambiguous) (command line )?(option|argument)")
TEST_TIMEOUT = 30  # seconds per test


def refused(output: str) -> str | None:
    return next((line.strip()[:200] for line in output.splitlines() if any(r in line for r in REFUSALS)), None)


def summary(output: str) -> str | None:
    match = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    return match[1] if match else None


def bytes_per_logit(output: str) -> dict[str, list[float]]:
    """Bytes read and written by each launch, by kernel, from ncu's CSV among other lines."""
    lines = output.splitlines()
    logits = next(json.loads(line)["logits"] for line in lines if line.startswith('{"logits"'))
    table = csv.DictReader(io.StringIO("\n".join(line for line in lines if line.startswith('"'))))
    by_kernel: dict[str, list[float]] = {}
    for row in table:
        if row["ID"]:  # the line of units has no ID
            total = sum(float(row[metric].replace(",", "")) for metric in DRAM)
            name = re.search(KERNELS_COUNTED, row["Kernel Name"])
            by_kernel.setdefault(name[0] if name else row["Kernel Name"], []).append(round(total / logits, 3))
    return by_kernel


def pytest(file: str, dry: bool) -> tuple[str, ...]:
    """If a test hangs, another thread ends the process, even if the main thread is synchronising."""
    has = importlib.util.find_spec("pytest_timeout") is not None
    timeout = ("--timeout", str(TEST_TIMEOUT), "--timeout-method=thread") if has else ()
    few = ("-k", "transforms and float32", "-x") if dry else ()
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *timeout, *few, f"python_tests/{file}")


def test_environment(dry: bool) -> dict[str, str]:
    """Only these backends, on tensors that device_proxy.py moves: see python_tests/conftest.py."""
    return {"GRPO_KERNELS_TEST_BACKENDS": "cpu" if dry else "cuda,triton"}
