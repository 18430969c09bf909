"""PTX instructions that the kernels execute. `python -m ptx.counts cuda|triton` prints them, `--pin` writes them into
counts.json, with which test_counts.py compares. They are counted per thread and before ptxas: use them to compare
versions of a kernel, not as a GPU's issue slots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import grpo_kernels as gk

from .cases import logits_of, tokens
from .frame import LANES
from .machine import Options
from .run import backend_on_ptx

PINNED = Path(__file__).with_name("counts.json")
PLAIN = Options(resident=1, order="forward", races=False, late=False)


class Figure(NamedTuple):
    """Instructions per thread for one more element, computed from two sizes, and per warp for none. Where more elements
    mean more programs, the first includes a program's fixed cost, and the second is 0."""

    per_element: float
    per_warp: int


def compiler(backend: str) -> str:
    if backend == "cuda":
        from .nvcc import version

        return f"nvcc {version()}"
    import triton

    return f"triton {triton.__version__}"


def executed(on_ptx: Any, call: Callable[[], object], kernel: str) -> tuple[int, int]:
    """Instructions of all warps of a kernel's launches, and how many warps there were."""
    on_ptx.options = PLAIN
    on_ptx.ran.clear()
    call()
    grids = [r.grid for r in on_ptx.ran if r.kernel == kernel]
    assert grids, (kernel, [r.kernel for r in on_ptx.ran])
    return sum(g.instructions for g in grids), sum(g.warps * g.blocks[0] * g.blocks[1] for g in grids)


def slope(on_ptx: Any, make: Callable[[int], Callable[[], object]], sizes: tuple[int, int], kernel: str) -> Figure:
    (few, warps), (many, _) = (executed(on_ptx, make(n), kernel) for n in sizes)
    each = (many - few) / (sizes[1] - sizes[0])
    return Figure(round(LANES * each, 2), round((few - each * sizes[0]) / warps))


# ---- the calls ----


def statistics(backend: str, dtype: torch.dtype) -> Callable[[int], Callable[[], object]]:
    def make(vocab: int) -> Callable[[], object]:
        x, targets = logits_of(1, vocab, dtype), torch.tensor([[5]])
        return lambda: gk.token_logps(x, targets, backend=backend)

    return make


def gradient(backend: str, dtype: torch.dtype) -> Callable[[int], Callable[[], object]]:
    def make(vocab: int) -> Callable[[], object]:
        x, targets = logits_of(1, vocab, dtype).requires_grad_(), torch.tensor([[5]])
        return lambda: gk.token_logps(x, targets, backend=backend).logps.sum().backward()

    return make


def single_pass(backend: str, dtype: torch.dtype) -> Callable[[int], Callable[[], object]]:
    def make(vocab: int) -> Callable[[], object]:
        x, targets = logits_of(1, vocab, dtype).requires_grad_(), torch.tensor([[5]])
        old = x.detach().float().log_softmax(-1)[..., 5]
        return lambda: gk.grpo_loss(x * 1, targets, torch.ones(1), torch.ones(1, 1), old_logps=old, backend=backend)

    return make


def policy_loss(backend: str, kl_coef: float) -> Callable[[int], Callable[[], object]]:
    def make(count: int) -> Callable[[], object]:
        logps, _, others = tokens((1, count))
        old, ref = (x.nan_to_num(-1) for x in (others["old_logps"], others["ref_logps"]))
        config = gk.LossConfig(kl_coef=kl_coef)
        return lambda: gk.policy_loss(
            logps.nan_to_num(-1), torch.ones(1), torch.ones(1, count), old_logps=old,
            ref_logps=ref if kl_coef else None, config=config, backend=backend,
        )  # fmt: skip

    return make


def returns(backend: str) -> Callable[[int], Callable[[], object]]:
    def make(count: int) -> Callable[[], object]:
        x = torch.randn(1, count)
        return lambda: gk.gae(x, x, torch.ones(1, count, dtype=torch.bool), gamma=0.99, lam=0.95, backend=backend)

    return make


def critic(backend: str) -> Callable[[int], Callable[[], object]]:
    def make(count: int) -> Callable[[], object]:
        x = torch.randn(1, count)
        return lambda: gk.value_loss(x, x, x + 1, torch.ones(1, count), backend=backend)

    return make


def groups(backend: str) -> Callable[[int], Callable[[], object]]:
    return lambda count: lambda: gk.group_advantages(torch.randn(count), group_size=16, backend=backend)


ROW_KERNELS = {
    "cuda": ("row_kernel", "row_kernel", "row_kernel"),
    "triton": ("stats_kernel", "gradient_kernel", "policy_kernel"),
}
GROUP_KERNELS = {"cuda": "advantage_kernel", "triton": "group_kernel"}
# Multiples of a tile or segment; in CUDA both have one plan, two blocks per multiprocessor.
VOCABULARIES = {"cuda": (8192, 24_576), "triton": (16_384, 49_152)}
TOKENS = 512, 2048  # of one block


def figures(on_ptx: Any, backend: str) -> Iterator[tuple[str, Figure]]:
    (forward, backward, policy), sizes = ROW_KERNELS[backend], VOCABULARIES[backend]
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        first = slope(on_ptx, statistics(backend, dtype), sizes, forward)
        yield f"first sweep, per logit, {name}", first
        both = slope(on_ptx, gradient(backend, dtype), sizes, backward)
        if forward == backward:  # counted together
            both = Figure(round(both.per_element - first.per_element, 2), 2 * both.per_warp - first.per_warp)
        yield f"second sweep, per logit, {name}", both
        yield (
            f"both sweeps in one pass, per logit, {name}",
            slope(on_ptx, single_pass(backend, dtype), sizes, policy),
        )
    yield "token kernel, per token", slope(on_ptx, policy_loss(backend, 0.0), TOKENS, "token_kernel")
    yield "token kernel with k3, per token", slope(on_ptx, policy_loss(backend, 0.1), TOKENS, "token_kernel")
    yield "gae, per token", slope(on_ptx, returns(backend), TOKENS, "gae_kernel")
    yield "value loss, per token", slope(on_ptx, critic(backend), TOKENS, "value_kernel")
    yield "group advantages, per sample", slope(on_ptx, groups(backend), (64, 256), GROUP_KERNELS[backend])


def measured(backend: str) -> dict[str, Figure]:
    on_ptx = backend_on_ptx(backend)
    if backend == "triton":  # one program per row and per sequence, as in a launch with many of them
        from grpo_kernels.backends.triton import token, tuning

        token.PROGRAMS = 1
        tuning.TABLE["cuda", 90] = tuning.TABLE["cuda", 90]._replace(split_below=0)
    return dict(figures(on_ptx, backend))


def table(pinned: dict[str, dict[str, list[float]]]) -> str:
    rows = list(dict.fromkeys(name for figures in pinned.values() for name in figures))
    lines = [
        "| instructions per thread + per warp | " + " | ".join(pinned) + " |",
        "|---" * (1 + len(pinned)) + "|",
    ]
    for row in rows:
        cells = [f"{f[row][0]} + {f[row][1]}" if row in f else "" for f in pinned.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=ROW_KERNELS)
    parser.add_argument("--pin", action="store_true", help="write them into counts.json")
    args = parser.parse_args()
    pinned = json.loads(PINNED.read_text()) if PINNED.exists() else {}
    now = {compiler(args.backend): {name: list(figure) for name, figure in measured(args.backend).items()}}
    if args.pin:
        PINNED.write_text(json.dumps({**pinned, **now}, indent=1) + "\n")
    print(json.dumps(now) if not args.pin else table({**pinned, **now}))


if __name__ == "__main__":
    main()
