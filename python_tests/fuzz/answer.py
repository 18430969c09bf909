"""What the library answers to a drawn call."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch

import grpo_kernels as gk

from .build import Built
from .calls import Call


class Got(NamedTuple):
    loss: np.ndarray | None
    logps: np.ndarray
    entropy: np.ndarray | None
    sum_p2: np.ndarray | None
    per_token: np.ndarray | None
    metrics: dict[str, float]
    gradient: np.ndarray  # in the logits [N, V], or in the log-probs [N]
    extra: np.ndarray | None  # of the position past the targets
    entropy_gradient: np.ndarray | None = None
    of_head: list[np.ndarray] | None = None


def numpy(x: torch.Tensor | None) -> np.ndarray | None:
    return None if x is None else x.detach().double().reshape(-1).numpy()


def run(call: Call, b: Built, backend: str) -> Got:
    """The library's answer."""
    if call.entry == "policy":
        x, h = b.logps.clone().requires_grad_(), b.entropy.clone().requires_grad_()
        arguments = dict(b.arguments)
        torch.manual_seed(call.seed % 1000)
        given = {"entropy": h} if b.config.has_entropy or call.single_pass else {}
        out = gk.policy_loss(
            x, arguments.pop("advantages"), arguments.pop("mask", None), config=b.config, backend=backend,
            return_entropy=bool(given), **given, **arguments,
        )  # fmt: skip
        grads = torch.autograd.grad(out.loss * call.upstream, (x, h), allow_unused=True)
        gx, gh = (torch.zeros_like(x) if g is None else g for g in grads)
        metrics = {name: float(v) for name, v in out.metrics.items()}
        return Got(
            numpy(out.loss),
            numpy(out.logps),
            numpy(out.entropy),
            None,
            numpy(out.per_token_loss),
            metrics,
            numpy(gx),
            None,
            numpy(gh),
        )
    leaf = x = b.logits.detach().requires_grad_()
    head = None if b.head is None else [None if w is None else w.clone().requires_grad_() for w in b.head]
    inplace = call.inplace and call.entry != "linear" and call.layout != "expanded"  # whose rows are one
    if inplace:
        x = Copy.apply(leaf)
    torch.manual_seed(call.seed % 1000)
    if call.entry == "logps":
        out = gk.token_logps(
            x, return_entropy=True, return_sum_p2=True, inplace_backward=inplace, backend=backend, **b.arguments
        )
        total = (out.logps * b.upstream[0]).sum() + (out.entropy * b.upstream[1]).sum()
        (g,) = torch.autograd.grad(total, leaf)
        got = (None, numpy(out.logps), numpy(out.entropy), numpy(out.sum_p2), None, {})
    else:
        loss = gk.grpo_loss
        options = {"inplace": inplace}
        if head is not None:
            loss, options = functools.partial(gk.linear_grpo_loss, weight=head[0], bias=head[1]), {"chunk_rows": 3}
        out = loss(
            x, config=b.config, backend=backend, single_pass=call.single_pass, return_entropy=True, **options,
            **b.arguments,
        )  # fmt: skip
        leaves = [x for x in (leaf, *(head or ())) if x is not None]
        g, *of_head = torch.autograd.grad(out.loss * call.upstream, leaves)
        metrics = {name: float(v) for name, v in out.metrics.items()}
        got = (numpy(out.loss), numpy(out.logps), numpy(out.entropy), None, numpy(out.per_token_loss), metrics)
    assert g.dtype == leaf.dtype and g.shape == leaf.shape
    extra = None
    if call.form == "extra":
        g, extra = g[:, :-1], numpy(g[:, -1:])
    got = Got(*got, g.detach().double().reshape(len(b.targets), leaf.shape[-1]).numpy(), extra)
    return got if head is None else got._replace(of_head=[g.detach().double().numpy() for g in of_head])


class Copy(torch.autograd.Function):
    """x * 1 that keeps strides with holes between the rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        return out.copy_(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g.clone()
