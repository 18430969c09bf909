"""Peak memory of loss and gradients by provider: `python -m benchmarks.memory --model qwen2.5-0.5b --rows 512`."""

from __future__ import annotations

import argparse

from grpo_kernels.bench.case import Case
from grpo_kernels.bench.results import of_this_machine
from grpo_kernels.bench.table import MIB, markdown_table
from grpo_kernels.testing.batch import DTYPES
from grpo_kernels.testing.memory import peak_memory
from grpo_kernels.testing.providers import PATHS, Task, both, providers
from grpo_kernels.testing.shapes import SHAPES

HEADINGS = ("provider", "tensors MiB", "x logits", "largest MiB", "process MiB")
TOKENS = 128  # of a sequence
KL = 0.04


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m", help="whose vocabulary and hidden size")
    parser.add_argument("--rows", type=int, default=1024, help=f"tokens in all; sequences of up to {TOKENS}")
    parser.add_argument("--vocab", type=int, help="instead of the model's")
    parser.add_argument("--hidden", type=int, help="instead of the model's")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--no-compile", action="store_true", help="leave out who compiles")
    given = parser.parse_args()
    length, shape = min(TOKENS, given.rows), SHAPES[given.model]
    if given.rows % length:
        parser.error(f"--rows must be at most {TOKENS} or a multiple of it; got {given.rows}")
    sizes = (given.rows // length, length, given.vocab or shape.vocab, given.hidden or shape.hidden)
    rows: list[list[str]] = []
    for path in ("logits", "linear"):
        case = Case(Task(path, kl_coef=KL), "", *sizes, given.dtype)
        rows += measured(case, compiling=not given.no_compile)
    print(of_this_machine([], "").caption)
    print(f"{case.sizes}: the logits are {case.logits_bytes / MIB:.1f} MiB. Peak above what was there before.\n")
    print(markdown_table(HEADINGS, rows))


def measured(case: Case, *, compiling: bool) -> list[list[str]]:
    batch, rows = case.batch(), []
    for provider in providers("cpu"):
        able = provider if compiling else provider.uncompiled()
        if able is None or able.missing("cpu") or able.unsupported(case.task):
            continue
        run = able.build(case.task, batch)
        peak = peak_memory(lambda run=run: both(run), setup=run.restore)  # type: ignore[misc]
        process = "" if peak.resident_bytes is None else f"{peak.resident_bytes / MIB:.1f}"
        cells = [f"{peak.tensor_bytes / MIB:.2f}", f"{peak.tensor_bytes / case.logits_bytes:.2f}"]
        rows.append(
            [f"{PATHS[case.task.path]}: {able.name}", *cells, f"{peak.largest_tensor_bytes / MIB:.2f}", process]
        )
    return rows


if __name__ == "__main__":
    main()
