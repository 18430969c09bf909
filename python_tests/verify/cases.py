"""The launches that are verified, of both backends, each with the rewrites that it needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.backends.native import _new_stats
from grpo_kernels.inputs.grouping import AdvantageForm, Samples
from grpo_kernels.inputs.layout import PolicyInputs, Rows, layout_of, rows_of
from grpo_kernels.loss.policy import Advantages, LossArguments, policy_inputs

from .capture import Captured, Launch, with_threads
from .check import Options

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Case(NamedTuple):
    launch: Callable[[Any, Any], list[Tensor] | None]  # (backend, capture)
    kernel: str
    options: Options = Options()
    machine: Mapping[str, Any] = NOTHING  # as in ptx/cases.py
    threads: tuple[int, ...] = ()  # of with_threads
    soak: bool = False


def launched(capture: Captured, backend: Any, case: Case) -> list[Launch]:
    """The launches of the case's kernel."""
    case.launch(backend, capture)
    launches = [launch for launch in capture.take() if launch.kernel == case.kernel]
    return [with_threads(launch, *case.threads) for launch in launches] if case.threads else launches


def on(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


# ---- rows ----


def rows(capture: Captured, count: int, vocab: int, dtype: torch.dtype = torch.bfloat16) -> Rows:
    made = rows_of(
        torch.zeros(1, count, vocab, dtype=dtype), torch.full((1, count), 5), None, temperature=1.0, logit_scale=1.0,
        softcap=None, ignore_index=-100,
    )  # fmt: skip
    capture.readable = [made.active, made.targets]
    return made


def inputs(shape: torch.Size, active: Tensor, config: gk.LossConfig, cu_seqlens: Tensor | None = None) -> PolicyInputs:
    layout = layout_of(shape, cu_seqlens)
    x = torch.zeros(layout.shape)
    return policy_inputs(
        layout, active, torch.float32, config, Advantages(x), LossArguments(x, x, x),
    )  # fmt: skip


def forward(count: int, vocab: int, sum_p2: bool = False) -> Callable:
    return lambda backend, capture: backend.row_forward(rows(capture, count, vocab), sum_p2)


def backward(count: int, vocab: int, inplace: bool = False) -> Callable:
    def launch(backend: Any, capture: Captured) -> None:
        r, g = rows(capture, count, vocab), torch.ones(1, count)
        capture.readable.append(g)
        backend.row_backward(r, _new_stats(r), g, g, r.logits if inplace else torch.zeros_like(r.logits))

    return launch


def policy(count: int, vocab: int, inplace: bool = False) -> Callable:
    def launch(backend: Any, capture: Captured) -> None:
        r = rows(capture, count, vocab)
        config = gk.LossConfig(kl_coef=0.1)
        gradient = r.logits if inplace else torch.zeros_like(r.logits)
        backend.row_policy(r, inputs(r.targets.shape, r.active, config), gradient)

    return launch


def scale(vocab: int, dtype: torch.dtype) -> Callable:
    def launch(backend: Any, capture: Captured) -> None:
        factor = torch.full((), 2.0)
        backend.scale(torch.zeros(1, 2, vocab, dtype=dtype), factor)

    return launch


# ---- tokens and samples ----


def tokens(count: int, level: str, cu_seqlens: list[int] | None = None) -> Callable:
    def launch(backend: Any, capture: Captured) -> None:
        x, active = torch.zeros(1, count), on(1, count)
        cu = None if cu_seqlens is None else torch.tensor(cu_seqlens)
        capture.readable = [active] if cu is None else [active, cu]
        shape = x.shape if cu is None else x[0].shape
        backend.token_policy(x, x, active, cu, inputs(shape, active, gk.LossConfig(kl_coef=0.1, ratio_level=level), cu))

    return launch


def gae(count: int) -> Callable:
    def launch(backend: Any, capture: Captured) -> None:
        x, active = torch.zeros(1, count), on(1, count)
        capture.readable = [active]
        backend.gae(x, torch.zeros_like(x), active, None, 0.99, 0.95)

    return launch


def value(backend: Any, capture: Captured) -> None:
    active = on(2, 300)
    capture.readable = [active]
    backend.value_loss(*(torch.zeros(2, 300) for _ in range(4)), active, 0.2)


def group(of: str) -> Callable:
    def launch(backend: Any, capture: Captured) -> None:
        valid = on(8)
        capture.readable = [valid]
        form = AdvantageForm(4, "mean", of, 1, 1e-4, 0.0, -9.0, 9.0, False)
        backend.group_advantages(Samples(torch.zeros(8, 1), None, valid, None, None, None), form)

    return launch


# ---- all cases ----

# Two slots or more of 8 KiB (bf16, 256 computing threads) and a row of one tile; and slots of 16 KiB (512 threads).
ONE_TILE = {"shared_bytes": 36 << 10, "multiprocessors": 1}
RING = {"shared_bytes": (2 << 10) + 3 * (16 << 10), "multiprocessors": 1}  # three slots, one resident, five tiles
CLUSTER = {"shared_bytes": (2 << 10) + 2 * (16 << 10), "multiprocessors": 1}  # of two blocks with two slots
BRANCHES = {"taken": True, "not taken": False}

CUDA = {
    "scale": Case(scale(4160, torch.float32), "scale_kernel", Options(aligned=True)),
    "gae": Case(gae(600), "gae_kernel", Options(atomics=True)),
    "rows, backward": Case(backward(2, 2048), "row_kernel", Options(nonzero=True, taken=True), ONE_TILE),
    "rows, policy in place": Case(
        policy(2, 2048, inplace=True), "row_kernel", Options(taken=True), ONE_TILE, (96, 512)
    ),
    "rows, ring": Case(policy(1, 5 * 8192), "row_kernel", Options(taken=True), RING, (96, 5 * 1024)),
    "value": Case(value, "value_kernel", Options(atomics=True), soak=True),
    "rows, policy in place of 288 threads": Case(
        policy(2, 2048, inplace=True), "row_kernel", Options(taken=True), ONE_TILE, soak=True
    ),
    "rows, forward": Case(forward(2, 2048), "row_kernel", Options(taken=True), ONE_TILE, (96, 512), soak=True),
    "rows, forward with head and tail": Case(
        forward(2, 4 * 497), "row_kernel", Options(taken=True), ONE_TILE, (96, 497), soak=True
    ),
    "rows, backward in place": Case(
        backward(2, 2048, inplace=True), "row_kernel", Options(nonzero=True, taken=True), ONE_TILE, soak=True
    ),
    **{
        f"rows, ring of two rows in place, branches {name}": Case(
            policy(2, 5 * 8192, inplace=True), "row_kernel", Options(taken=taken), RING, (96, 5 * 1024), soak=True
        )
        for name, taken in BRANCHES.items()
    },
    "rows, ring of 544 threads": Case(policy(1, 5 * 8192), "row_kernel", Options(taken=True), RING, soak=True),
    "rows by cp.async": Case(
        policy(2, 2048), "row_kernel", Options(taken=True), {**ONE_TILE, "bulk_copies": False}, (96, 512), soak=True
    ),
    **{
        f"rows, cluster of 2, branches {name}": Case(
            policy(2, 30 * 1024), "row_kernel", Options(taken=taken), CLUSTER, (96, 30 * 128), soak=True
        )
        for name, taken in BRANCHES.items()
    },
    "tokens": Case(tokens(100, "token"), "token_kernel", Options(atomics=True, taken=True), threads=(64,), soak=True),
    "tokens of a sequence": Case(tokens(100, "sequence"), "token_kernel", Options(atomics=True, taken=True), soak=True),
}
SEGMENTS = 3 * 8192 - 64  # columns of two or three programs
UNSPLIT = {"split_below": 0}  # one program per row
TRITON = {
    "scale": Case(scale(4104, torch.bfloat16), "scale_kernel"),
    "gradient": Case(backward(1, SEGMENTS), "gradient_kernel"),
    "gradient in place": Case(backward(1, SEGMENTS, inplace=True), "gradient_kernel"),
    "policy, split rows": Case(policy(1, SEGMENTS), "policy_kernel"),
    "policy in place, split rows": Case(policy(1, SEGMENTS, inplace=True), "policy_kernel"),
    "group": Case(group("group"), "group_kernel"),
    "batch": Case(group("batch"), "batch_kernel"),
    "statistics, segments and their merge": Case(forward(1, SEGMENTS), "stats_kernel", soak=True),
    "statistics, unsplit rows": Case(forward(1, SEGMENTS, sum_p2=True), "stats_kernel", machine=UNSPLIT, soak=True),
    "policy, unsplit rows": Case(policy(1, SEGMENTS), "policy_kernel", machine=UNSPLIT, soak=True),
    "policy in place, unsplit rows": Case(
        policy(1, SEGMENTS, inplace=True), "policy_kernel", machine=UNSPLIT, soak=True
    ),
    "value": Case(value, "value_kernel", Options(atomics=True), soak=True),
}
CASES = {"cuda": CUDA, "triton": TRITON}


def backend_of(name: str) -> tuple[Any, Any]:
    """The backend and the capture of its launches; for a separate process."""
    from .capture import CudaCapture, TritonCapture

    if name == "cuda":
        capture = CudaCapture()
        return capture, capture
    return importlib.import_module("grpo_kernels.backends.triton"), TritonCapture()
