"""The row kernels: log-probs, their backward, the single pass in and out of place, a masked row of NaN."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.tools.providers.batch import produced

from .case import Case, Context
from .compare import accurate, in_dtype, same_bits
from .protocol import Figures

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REPEATS = 20
CONFIG = {"kl_coef": 0.1, "entropy_coef": 0.05, "delta": 1.6, "dual_clip": 1.4}
CLUSTERS_FROM = 110_000  # columns: one block holds a smaller row


@dataclass(frozen=True)
class Rows:
    vocab: int
    dtype: torch.dtype
    rows: int = 4

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.vocab} {str(self.dtype).removeprefix('torch.')}"


# 16-byte rows and odd ones, one tile and many; the wide ones re-read a tail or take a cluster.
NARROW = (
    Rows(1024, BF16), Rows(1031, BF16), Rows(4096, FP16), Rows(1031, FP32), Rows(32000, BF16), Rows(50257, BF16),
    Rows(32000, FP32), Rows(50257, FP32), Rows(32000, BF16, 1024),
)  # fmt: skip
WIDE = (
    Rows(151936, BF16), Rows(262144, BF16), Rows(151936, FP32), Rows(262144, FP32), Rows(151935, BF16),
    Rows(151936, BF16, 300),
)  # fmt: skip
SMALL = (Rows(1024, BF16), Rows(1031, FP32))  # shapes for a CPU
Inputs = Mapping[str, Any]


def inputs_of(shape: Rows, context: Context, name: str = "rows") -> dict[str, Any]:
    """Two sequences: one with all tokens active, one with the last token masked and its row NaN."""
    g = context.generator(f"{name} {shape.name}")
    device, bt_shape = context.device, (2, shape.rows // 2)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    logits = (3 * normal(*bt_shape, shape.vocab)).to(shape.dtype)
    targets = torch.randint(shape.vocab, bt_shape, generator=g, device=device)
    logps = torch.stack(
        [row.float().log_softmax(-1).gather(-1, t[:, None])[:, 0] for row, t in zip(logits, targets, strict=True)]
    )
    mask = torch.ones(bt_shape, dtype=torch.bool, device=device)
    mask[1, -1] = False
    logits[1, -1] = float("nan")
    old, ref = (torch.where(mask, logps + 0.3 * normal(*bt_shape), float("nan")) for _ in range(2))
    return {
        "logits": logits,
        "targets": targets,
        "mask": mask,
        "advantages": normal(2),
        "old_logps": old,
        "ref_logps": ref,
    }


def loss(inputs: Inputs, backend: str, inplace: bool = False, upstream: float = 1.0) -> dict[str, Tensor]:
    x = inputs["logits"].clone()
    leaf = produced(x) if inplace else x.requires_grad_()
    others = {name: inputs[name] for name in ("old_logps", "ref_logps")}
    out = gk.grpo_loss(
        leaf, inputs["targets"], inputs["advantages"], inputs["mask"], config=gk.LossConfig(**CONFIG),
        inplace=inplace, backend=backend, **others,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, leaf, torch.full_like(out.loss, upstream))
    metrics = torch.stack([value.double() for value in out.metrics.values()])
    return {"loss": out.loss.detach(), "per_token": out.per_token_loss, "metrics": metrics, "gradient": gradient}


def logps(inputs: Inputs, backend: str, **options: Any) -> dict[str, Tensor]:
    leaf = inputs["logits"].clone().requires_grad_()
    out = gk.token_logps(
        leaf,
        inputs["targets"],
        mask=inputs["mask"],
        return_entropy=True,
        return_sum_p2=True,
        backend=backend,
        **options,
    )
    total = (out.logps + 0.1 * out.entropy).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return {
        "logps": out.logps.detach(), "entropy": out.entropy.detach(), "sum_p2": out.sum_p2, "gradient": gradient,
    }  # fmt: skip


def check_loss(context: Context, shape: Rows) -> Figures:
    return accurate(loss, inputs_of(shape, context), context.kernels, shape.dtype, ("logits",))


def check_logps(context: Context, shape: Rows, **options: Any) -> Figures:
    call = functools.partial(logps, **options)
    return accurate(call, inputs_of(shape, context), context.kernels, shape.dtype, ("logits",))


def check_bits(context: Context, shape: Rows) -> Figures:
    """In place gives the bits of out of place, a masked row of NaN gives zeros, and repeats give equal bits."""
    inputs = in_dtype(inputs_of(shape, context), shape.dtype, ("logits",))
    first = loss(inputs, context.kernels)
    assert not first["gradient"][1, -1].any(), "the masked row's gradient is not 0"
    same_bits(first, loss(inputs, context.kernels, inplace=context.kernels != "reference"), "in place")
    for turn in range(2 if context.small else REPEATS):
        same_bits(first, loss(inputs, context.kernels), f"repeat {turn}")
    return {"repeats": REPEATS}


def check_upstream(context: Context, shape: Rows) -> Figures:
    """A gradient of the loss other than 1 adds a sweep, `scale`."""
    inputs = in_dtype(inputs_of(shape, context), shape.dtype, ("logits",))
    full, half = (loss(inputs, context.kernels, upstream=g)["gradient"] for g in (1.0, 0.5))
    same_bits({"gradient": full.float() / 2}, {"gradient": half.float()}, "half the upstream gradient")
    return {}


def cases_of(shapes: tuple[Rows, ...], context: Context) -> Iterator[Case]:
    for shape in SMALL if context.small else shapes:
        family = "triton" if context.backend == "triton" else "clusters" if shape.vocab > CLUSTERS_FROM else "rows"
        yield Case(f"log-probs {shape.name}", family, functools.partial(check_logps, shape=shape))
        yield Case(f"loss {shape.name}", family, functools.partial(check_loss, shape=shape))
        yield Case(f"bits {shape.name}", family, functools.partial(check_bits, shape=shape))
    first = (SMALL if context.small else shapes)[0]
    yield Case(f"softcap {first.name}", family, functools.partial(check_logps, shape=first, softcap=20.0))
    yield Case(f"upstream {first.name}", family, functools.partial(check_upstream, shape=first))


def narrow(context: Context) -> Iterator[Case]:
    return cases_of(NARROW, context)


def wide(context: Context) -> Iterator[Case]:
    return cases_of(WIDE, context)


def every(context: Context) -> Iterator[Case]:
    """All cases, by information per second, for a backend with one family: a few of each first, then the rest."""
    first = (NARROW[0], NARROW[1], WIDE[0])
    rest = tuple(shape for shape in (*NARROW, *WIDE) if shape not in first)
    return cases_of((*first, *rest), context)
