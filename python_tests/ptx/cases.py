"""The cases: every kernel of a backend, called through the library's public functions and compared with the reference
by the accuracy rule. A case is a function of (backend, dtype) that returns tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from forms import FORMS, with_everything
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.testing.compare import assert_as_accurate

Compute = Callable[[str, torch.dtype], dict[str, Tensor]]


class Case(NamedTuple):
    compute: Compute
    machine: Mapping[str, Any] = MappingProxyType({})  # of the GPU, where its size changes how a row is divided
    half: bool = False  # outputs are stored in bfloat16, as eager's are
    soak: bool = False


class Wrong(Exception):
    """A result that is not as accurate as eager torch's."""


def check(compute: Compute, backend: str, half: bool = False) -> None:
    """`half`: compute takes bfloat16 inputs instead of float32, and its outputs are rounded like eager's."""
    own = torch.bfloat16 if half else torch.float32
    mine, eager, exact = compute(backend, own), compute("reference", own), compute("reference", torch.float64)
    for name in exact:
        try:
            assert_as_accurate(mine[name], eager[name], exact[name], what=name)
        except AssertionError as error:
            raise Wrong(str(error)) from None


# ---- tokens ----


def tokens(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs, a mask and the other log-probs, NaN where masked; exact in float32."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) < 0.8
    logps = -3 * torch.rand(shape, generator=g)
    noise = {name: 0.1 if name == "old" else 0.3 for name in ("old", "ref", "rollout")}
    others = {
        f"{name}_logps": (logps + size * torch.randn(shape, generator=g)).masked_fill(~mask, math.nan)
        for name, size in noise.items()
    }
    if len(shape) == 1 or shape[1] > 500:  # ratios whose product over a sequence is still finite
        others["old_logps"] = logps + 0.02 * (others["old_logps"] - logps)
    others["token_weights"] = torch.rand(shape, generator=g)
    return logps.masked_fill(~mask, math.nan), mask, others


def policy(form: dict[str, Any], shape: tuple[int, ...], cu_seqlens: list[int] | None = None) -> Compute:
    sequences = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1

    def compute(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        logps, mask, others = tokens(shape)
        leaf, entropy = logps.to(dtype).requires_grad_(), (-logps).to(dtype).requires_grad_()
        config = gk.LossConfig(**with_everything(form), aggregation="sequence_mean")
        packed = {} if cu_seqlens is None else {"cu_seqlens": torch.tensor(cu_seqlens)}
        out = gk.policy_loss(
            leaf, (torch.linspace(-1, 1, sequences) + 0.25).to(dtype), mask, entropy=entropy, config=config,
            backend=backend, **packed, **{k: v.to(dtype) for k, v in others.items()},
        )  # fmt: skip
        g_logps, g_entropy = torch.autograd.grad(out.loss, (leaf, entropy))
        metrics = torch.stack(list(out.metrics.values()))
        return {
            "loss": out.loss.detach(), "per token": out.per_token_loss, "metrics": metrics,
            "g_logps": g_logps, "g_entropy": g_entropy,
        }  # fmt: skip

    return compute


# ---- samples, returns, diversity ----


def group(scale: str, ids: bool) -> Compute:
    def compute(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(0)
        rewards = torch.randn(64, generator=g).to(dtype)
        groups = {"group_ids": torch.randint(0, 5, (64,), generator=g)} if ids else {"group_size": 16}
        out = gk.group_advantages(rewards, scale=scale, backend=backend, **groups)
        return {"advantages": out.advantages, "mean": out.mean, "std": out.std}

    return compute


def gae(shape: tuple[int, int]) -> Compute:
    def compute(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        _, mask, others = tokens(shape)
        mask[0, shape[1] // 4 : shape[1] // 2] = False
        rewards, values = others["ref_logps"].to(dtype), others["old_logps"].to(dtype)
        out = gk.gae(rewards, values, mask, gamma=0.99, lam=0.97, backend=backend)
        return {"advantages": out[0], "returns": out[1]}

    return compute


def value(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    logps, mask, others = tokens((3, 300))
    leaf = logps.to(dtype).requires_grad_()
    old, returns = others["old_logps"].to(dtype), others["ref_logps"].to(dtype)
    out = gk.value_loss(leaf, old, returns, mask, backend=backend)
    return {
        "loss": out.loss.detach(), "metrics": torch.stack(list(out.metrics.values())),
        "gradient": torch.autograd.grad(out.loss, leaf)[0],
    }  # fmt: skip


def whiten(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    _, mask, others = tokens((3, 1000))
    return {"whitened": gk.whiten((others["old_logps"] + 8).to(dtype), mask, backend=backend)}


def diversity(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (8, 40), generator=g)
    ids[1::3] = ids[::3]
    out = gk.group_diversity(ids, group_size=4, ngram=2, backend=backend)
    return {f"{i}": x.to(dtype) for i, x in enumerate(out)}


# ---- rows ----


def logits_of(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Exact in bfloat16."""
    x = 3 * torch.randn(rows, 1, vocab, generator=torch.Generator().manual_seed(1))
    return x.bfloat16().to(dtype)


def loss(rows: int, vocab: int, inplace: bool = False, **options: Any) -> Compute:
    """One pass; the middle row of three is masked."""

    def compute(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x = logits_of(rows, vocab, dtype).requires_grad_()
        acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        targets = torch.randint(vocab, (rows, 1), generator=torch.Generator().manual_seed(2))
        mask = (torch.arange(rows)[:, None] != 1) | torch.tensor(rows < 3)
        at_target = x.detach().double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        out = gk.grpo_loss(
            x * 1, targets, torch.linspace(-1, 1, rows, dtype=acc_dtype) + 0.3, mask,
            old_logps=(at_target - 0.1).to(acc_dtype), config=gk.LossConfig(entropy_coef=0.05), backend=backend,
            inplace=inplace and backend != "reference", **options,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss, x)
        return {"loss": out.loss.detach(), "logps": out.logps, "gradient": gradient}

    return compute


def two_passes(rows: int, vocab: int, **options: Any) -> Compute:
    """row_forward, then row_backward: log-probs, entropy, the sum of squares."""

    def compute(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x = logits_of(rows, vocab, dtype).requires_grad_()
        targets = torch.randint(vocab, (rows, 1), generator=torch.Generator().manual_seed(2))
        out = gk.token_logps(x, targets, return_entropy=True, return_sum_p2=True, backend=backend, **options)
        (gradient,) = torch.autograd.grad(out.logps.sum() + 0.1 * out.entropy.sum(), x)
        return {
            "logps": out.logps.detach(), "entropy": out.entropy.detach(), "sum_p2": out.sum_p2, "gradient": gradient,
        }  # fmt: skip

    return compute


def scaled(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """An upstream gradient other than 1 scales the stored gradient."""
    x = logits_of(2, 264, dtype).requires_grad_()
    targets, acc_dtype = torch.tensor([[3], [200]]), torch.float64 if dtype == torch.float64 else torch.float32
    out = gk.grpo_loss(x * 1, targets, torch.tensor([1.0, -0.5], dtype=acc_dtype), torch.ones(2, 1), backend=backend)
    return {"gradient": torch.autograd.grad(0.375 * out.loss, x)[0]}


COMMON = {
    **{f"tokens {n}": Case(policy(FORMS[n], (3, 70))) for n in ("token", "sequence", "gmpo")},
    "packed": Case(policy(FORMS["sequence"], (140,), [0, 0, 5, 70, 130])),
    "group": Case(group("group", ids=False)),
    "group by ids": Case(group("leave_one_out", ids=True)),
    "batch": Case(group("batch", ids=False)),
    "value": Case(value),
    "diversity": Case(diversity),
    "scale": Case(scaled, half=True),
    **{f"form {n}": Case(policy(form, (5, 9)), soak=True) for n, form in FORMS.items()},
    **{
        f"group {scale}{' by ids' * ids}": Case(group(scale, ids), soak=True)
        for scale in ("none", "group", "batch", "leave_one_out")
        for ids in (False, True)
    },
}
TRITON = {
    **COMMON,
    "gae": Case(gae((2, 700))),
    "gae of several blocks": Case(gae((2, 2600)), soak=True),
    "tokens of several blocks": Case(policy(FORMS["sequence"], (3, 700)), soak=True),
    "loss, a program per row": Case(loss(1, 9000), {"split_below": 0}),
    "loss, rows split": Case(loss(1, 17_000, inplace=True), half=True),
    "loss in place": Case(loss(1, 9000, inplace=True), {"split_below": 0}, half=True),
    "loss, odd vocabulary": Case(loss(3, 1003, inplace=True), half=True, soak=True),
    "loss with softcap": Case(loss(1, 1003, softcap=5.0), soak=True),
    "two passes": Case(two_passes(2, 1003)),
    "two passes, rows split": Case(two_passes(1, 17_000), soak=True),
}
# With slots of 8 KiB a few thousand columns fit on chip, have a tail that is loaded again, or need a cluster.
SMALL = {"shared_bytes": 52 << 10}
CUDA = {
    **COMMON,
    "gae": Case(gae((1, 2048 + 40))),
    "whiten": Case(whiten),
    "tokens of several tiles": Case(policy(FORMS["sequence"], (1, 2048 + 40))),
    "gmpo of several tiles": Case(policy(FORMS["gmpo"], (2, 2 * 2048 + 3)), soak=True),
    "packed in several tiles": Case(policy(FORMS["sequence"], (5200,), [0, 0, 5, 2600, 5000]), soak=True),
    "loss": Case(loss(3, 1003)),
    "loss in place": Case(loss(1, 5003, inplace=True), half=True),
    "loss with a tail": Case(loss(1, 20_000), SMALL),
    "loss of a cluster": Case(loss(1, 23_000), SMALL),
    "loss of a cluster in place": Case(loss(3, 46_001, inplace=True), SMALL, half=True, soak=True),
    "loss with softcap": Case(loss(1, 1003, softcap=5.0), soak=True),
    "two passes": Case(two_passes(2, 1003)),
    "loss by cp.async": Case(loss(1, 5003), {"bulk_copies": False}),
    "two passes of a cluster": Case(two_passes(2, 23_001), SMALL, soak=True),
}
CASES = {"triton": TRITON, "cuda": CUDA}


@contextlib.contextmanager
def memory_filled_with_nans():
    """Fills what torch.empty returns, so that a value which is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
