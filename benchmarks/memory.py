"""Peak memory of loss and gradients by provider: `python -m benchmarks.memory --model qwen2.5 --rows 512`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.testing.bench import SHAPES, Shape, machine_info, produced
from grpo_kernels.testing.memory import peak_memory

from . import eager
from .batch import Batch, Tokens, sampled_tokens
from .bench_losses import DTYPES, with_gradient
from .report import MIB, machine_line, markdown_table

HEADINGS = ("provider", "tensors MiB", "x logits", "largest MiB", "process MiB")
CONFIG = gk.LossConfig(eps_low=eager.EPS, kl_coef=0.04)
NUMBERS = (CONFIG.kl_coef, 0.0, "token")
TOKENS = 128  # of a sequence

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Options:
    shape: Shape
    grid: tuple[int, int]
    dtype: torch.dtype
    chunk_rows: int | None
    compile: bool

    @property
    def logits_bytes(self) -> int:
        return self.grid[0] * self.grid[1] * self.shape.vocab * self.dtype.itemsize


def options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="smollm2", help="whose vocabulary and hidden size")
    parser.add_argument("--rows", type=int, default=1024, help=f"tokens in all; sequences of up to {TOKENS}")
    parser.add_argument("--vocab", type=int, help="instead of the model's")
    parser.add_argument("--hidden", type=int, help="instead of the model's")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--chunk-rows", type=int, help="of the linear path; its own choice when left out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args()
    model = SHAPES[given.model]
    shape = Shape(model.model, given.vocab or model.vocab, given.hidden or model.hidden)
    length = min(TOKENS, given.rows)
    if given.rows % length:
        parser.error(f"--rows must be at most {TOKENS} or a multiple of it; got {given.rows}")
    return Options(shape, (given.rows // length, length), DTYPES[given.dtype], given.chunk_rows, not given.no_compile)


def head_inputs(o: Options) -> tuple[Tensor, Tensor, Tokens]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*o.grid, o.shape.hidden, generator=generator).to(o.dtype)
    weight = (torch.randn(o.shape.vocab, o.shape.hidden, generator=generator) * (3 * o.shape.hidden**-0.5)).to(o.dtype)
    rows = hidden.view(-1, o.shape.hidden)
    tokens = sampled_tokens(lambda part: rows[part] @ weight.t(), o.grid, seed=1)
    return hidden.requires_grad_(), weight.requires_grad_(), tokens


def logits_calls(o: Options, batch: Batch) -> dict[str, Call]:
    tokens = batch.tokens

    def ours(inplace: bool) -> tuple[Tensor, ...]:
        logits = produced(batch.buffer)
        output = gk.grpo_loss(
            logits, *tokens.arguments, old_logps=tokens.old_logps, ref_logps=tokens.ref_logps, config=CONFIG,
            inplace=inplace, backend="cpu",
        )  # fmt: skip
        return with_gradient(output.loss, logits)

    def baseline(function: Callable) -> tuple[Tensor, ...]:
        logits = produced(batch.buffer)
        return with_gradient(function(logits, tokens, *NUMBERS), logits)

    calls: dict[str, Call] = {
        "from logits: ours, in place": lambda: ours(True),
        "from logits: ours": lambda: ours(False),
        "from logits: eager": lambda: baseline(eager.grpo_loss),
    }
    if o.compile:
        graph = torch.compile(eager.grpo_loss, dynamic=False)
        calls["from logits: compile"] = lambda: baseline(graph)
    return calls


def linear_calls(o: Options, hidden: Tensor, weight: Tensor, tokens: Tokens) -> dict[str, Call]:
    def ours(single_pass: bool) -> tuple[Tensor, ...]:
        output = gk.linear_grpo_loss(
            hidden, weight, *tokens.arguments, old_logps=tokens.old_logps, ref_logps=tokens.ref_logps, config=CONFIG,
            chunk_rows=o.chunk_rows, single_pass=single_pass, backend="cpu",
        )  # fmt: skip
        return with_gradient(output.loss, hidden, weight)

    def baseline(function: Callable) -> tuple[Tensor, ...]:
        return with_gradient(function(hidden, weight, tokens, *NUMBERS), hidden, weight)

    calls: dict[str, Call] = {
        "from hidden: ours": lambda: ours(True),
        "from hidden: ours, recompute": lambda: ours(False),
        "from hidden: eager": lambda: baseline(eager.linear_grpo_loss),
    }
    if o.compile:
        graph = torch.compile(eager.linear_grpo_loss, dynamic=False)
        calls["from hidden: compile"] = lambda: baseline(graph)
    return calls


def measured(o: Options, calls: dict[str, Call], setup: Callable[[], None] | None) -> list[list[str]]:
    rows = []
    for name, call in calls.items():
        peak = peak_memory(call, setup=setup)
        process = "" if peak.resident_bytes is None else f"{peak.resident_bytes / MIB:.1f}"
        share = f"{peak.tensor_bytes / o.logits_bytes:.2f}"
        rows.append([name, f"{peak.tensor_bytes / MIB:.2f}", share, f"{peak.largest_tensor_bytes / MIB:.2f}", process])
    return rows


def main() -> None:
    o = options()
    hidden, weight, tokens = head_inputs(o)
    with torch.no_grad():
        logits = hidden @ weight.t()
    batch = Batch(logits, logits.clone(), logits, tokens)
    rows = measured(o, logits_calls(o, batch), batch.restore)
    del batch, logits
    rows += measured(o, linear_calls(o, hidden, weight, tokens), None)
    dtype = str(o.dtype).removeprefix("torch.")
    print(machine_line(machine_info()))
    print(
        f"{o.shape.model}: hidden [{o.grid[0] * o.grid[1]}, {o.shape.hidden}], vocabulary {o.shape.vocab}, {dtype}",
        end="; ",
    )
    print(f"the logits are {o.logits_bytes / MIB:.1f} MiB. Peak above what was there before: loss and gradients.\n")
    print(markdown_table(HEADINGS, rows))


if __name__ == "__main__":
    main()
