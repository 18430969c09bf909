"""The kernels per token, per sequence and per group."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.config import OBJECTIVES, RATIO_LEVELS

from .case import Case, Context
from .compare import Call, accurate
from .protocol import Figures

FP32 = torch.float32
TOKENS_PER_TILE = 2048  # tokens of a block in CUDA C++
FORMS = {
    **{f"level {level}": {"ratio_level": level} for level in RATIO_LEVELS},
    **{name: {"objective": name} for name in OBJECTIVES if name not in ("clip", "dro", "clip_cov")},
    "dro": {"objective": "dro", "dro_beta": 0.3},
    # All tokens are within the bounds, so that nothing is random.
    "clip_cov": {"objective": "clip_cov", "cov_ratio": 1.0, "cov_low": -0.3, "cov_high": 0.2},
}
FIRST_FORMS = ("level token", "level sequence", "gmpo")
MOVED = 0.02  # deviation of the log-ratios: their product over 4099 tokens stays finite

Inputs = Mapping[str, Any]


def check(context: Context, name: str, call: Call, inputs: Inputs) -> Figures:
    return accurate(call, inputs, context.kernels, FP32, tuple(inputs))


def case(name: str, family: str, context: Context, inputs_of: Any, call: Call) -> Case:
    family = "triton" if context.backend == "triton" else family

    def run(context: Context) -> Figures:
        return check(context, name, call, inputs_of(context, name))

    return Case(name, family, run)


# ---- the loss from log-probs ----


def token_inputs(context: Context, name: str, shape: tuple[int, ...], cu: tuple[int, ...] | None = None) -> Inputs:
    g, device = context.generator(name), context.device

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    logps = -3 * torch.rand(shape, generator=g, device=device)
    mask = torch.rand(shape, generator=g, device=device) < 0.8
    near = {f"{who}_logps": logps + MOVED * normal(*shape) for who in ("old", "ref", "rollout")}
    boundaries = None if cu is None else torch.tensor(cu, device=device)
    sequences = shape[0] if cu is None else len(cu) - 1
    return {"logps": logps, "entropy": -logps, "advantages": normal(sequences), "mask": mask, "cu": boundaries, **near}


def policy(inputs: Inputs, backend: str, **config: Any) -> dict[str, Tensor]:
    x, h = (inputs[name].clone().requires_grad_() for name in ("logps", "entropy"))
    others = {name: inputs[name] for name in ("old_logps", "ref_logps", "rollout_logps")}
    out = gk.policy_loss(
        x, inputs["advantages"], inputs["mask"], entropy=h, cu_seqlens=inputs["cu"], backend=backend, **others,
        config=gk.LossConfig(**config, kl_coef=0.1, entropy_coef=0.05),
    )  # fmt: skip
    gradients = torch.autograd.grad(out.loss, (x, h))
    metrics = torch.stack([value.double() for value in out.metrics.values()])
    return {
        "loss": out.loss.detach(), "per_token": out.per_token_loss, "metrics": metrics, "gradient": gradients[0],
        "entropy gradient": gradients[1],
    }  # fmt: skip


def loss_cases(context: Context, names: tuple[str, ...], family: str) -> Iterator[Case]:
    """Padded sequences over several tiles."""
    tokens = 67 if context.small else 2 * TOKENS_PER_TILE + 3
    for name in names:
        inputs = functools.partial(token_inputs, shape=(2, tokens))
        yield case(f"loss, {name}", family, context, inputs, functools.partial(policy, **FORMS[name]))


def packed_cases(context: Context, family: str) -> Iterator[Case]:
    """Sequences of several tiles, of one token and of none, and tokens after the last sequence."""
    cu = (0, 1, 1, 50, 59) if context.small else (0, 1, 1, 3 * TOKENS_PER_TILE, 5900 + TOKENS_PER_TILE)
    inputs = functools.partial(token_inputs, shape=(cu[-1] + 100,), cu=cu)
    for name in ("level sequence", "level token"):
        yield case(f"packed loss, {name}", family, context, inputs, functools.partial(policy, **FORMS[name]))


# ---- advantages, returns, the critic ----


def bt_inputs(context: Context, name: str, shape: tuple[int, ...], cu: tuple[int, ...] | None = None) -> dict[str, Any]:
    g, device = context.generator(name), context.device
    inputs: dict[str, Any] = {
        who: torch.randn(shape, generator=g, device=device) for who in ("rewards", "values", "old", "returns")
    }
    inputs["mask"] = torch.rand(shape, generator=g, device=device) < 0.8
    inputs["cu"] = None if cu is None else torch.tensor(cu, device=device)
    return inputs


def gae_of(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    out = gk.gae(
        inputs["rewards"], inputs["values"], inputs["mask"], gamma=0.99, lam=0.95, cu_seqlens=inputs["cu"],
        backend=backend,
    )  # fmt: skip
    return {"advantages": out[0], "returns": out[1]}


def value_of(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    x = inputs["values"].clone().requires_grad_()
    out = gk.value_loss(x, inputs["old"], inputs["returns"], inputs["mask"], backend=backend)
    return {
        "loss": out.loss.detach(), "per_token": out.per_token_loss, "gradient": torch.autograd.grad(out.loss, x)[0],
    }  # fmt: skip


def whitened(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    return {"whitened": gk.whiten(inputs["values"], inputs["mask"], backend=backend)}


def reward_inputs(context: Context, name: str, samples: int) -> Inputs:
    g, device = context.generator(name), context.device
    return {
        "rewards": torch.randn(samples, generator=g, device=device),
        "ids": torch.randint(9, (samples,), generator=g, device=device),
    }


def advantages(inputs: Inputs, backend: str, size: int | None, scale: str) -> dict[str, Tensor]:
    grouping = {"group_size": size} if size else {"group_ids": inputs["ids"]}
    out = gk.group_advantages(inputs["rewards"], scale=scale, backend=backend, **grouping)
    return {"advantages": out.advantages, "mean": out[1], "std": out[2]}


def group_cases(context: Context) -> Iterator[Case]:
    for scale in ("group", "batch", "leave_one_out"):
        inputs, call = functools.partial(reward_inputs, samples=300), functools.partial(advantages, scale=scale)
        yield case(f"ragged groups, {scale}", "plain", context, inputs, functools.partial(call, size=None))
    for size in (16, 1024):
        inputs = functools.partial(reward_inputs, samples=4 * size)
        call = functools.partial(advantages, size=size, scale="group")
        yield case(f"groups of {size}", "plain", context, inputs, call)


def critic_cases(context: Context) -> Iterator[Case]:
    inputs = functools.partial(bt_inputs, shape=(3, 50 if context.small else 5000))
    yield case("value loss", "plain", context, inputs, value_of)
    yield case("whitening", "plain", context, inputs, whitened)


def gae(context: Context) -> Iterator[Case]:
    shapes: dict[str, tuple[int, ...]] = {"three tiles": (3, 5000), "nine tiles": (2, 9 * TOKENS_PER_TILE - 5)}
    for name, shape in shapes.items():
        inputs = functools.partial(bt_inputs, shape=(shape[0], 77) if context.small else shape)
        yield case(f"gae, {name}", "waits", context, inputs, gae_of)
    cu = (0, 1, 1, 40, 60) if context.small else (0, 1, 1, 3 * TOKENS_PER_TILE, 5900 + TOKENS_PER_TILE)
    inputs = functools.partial(bt_inputs, shape=(cu[-1] + 10,), cu=cu)
    yield case("gae, packed", "waits", context, inputs, gae_of)


# ---- near-duplicates ----


def token_ids(context: Context, name: str, samples: int, tokens: int) -> Inputs:
    """Every third sample equals its predecessor."""
    g = context.generator(name)
    ids = torch.randint(50, (samples, tokens), generator=g, device=context.device)
    ids[1::3] = ids[::3][: len(ids[1::3])]
    return {"ids": ids}


def diverse(inputs: Inputs, backend: str, ngram: int) -> dict[str, Tensor]:
    out = gk.group_diversity(inputs["ids"], group_size=6, ngram=ngram, backend=backend)
    return {"keep": out[0], "similarity": out[1], "weights": out[2]}


def diversity(context: Context) -> Iterator[Case]:
    for name, tokens, ngram in (("tables in shared memory", 300, 2), ("global tables", 4400, 3)):
        inputs = functools.partial(token_ids, samples=12, tokens=40 if context.small else tokens)
        yield case(f"diversity, {name}", "waits", context, inputs, functools.partial(diverse, ngram=ngram))


# ---- lists ----


def plain(context: Context) -> Iterator[Case]:
    """Kernels whose blocks do not wait for each other."""
    yield from group_cases(context)
    yield from critic_cases(context)
    yield from loss_cases(context, ("level token",), "plain")


def sequences(context: Context) -> Iterator[Case]:
    yield from packed_cases(context, "waits")
    yield from loss_cases(context, ("level sequence", "gmpo"), "waits")


def tokens(context: Context) -> Iterator[Case]:
    """All of them in one family, for Triton."""
    yield from loss_cases(context, FIRST_FORMS, "triton")
    yield from group_cases(context)
    yield from gae(context)
    yield from critic_cases(context)
    yield from packed_cases(context, "triton")
    yield from diversity(context)


def forms(context: Context) -> Iterator[Case]:
    """Every form of the loss that the earlier lists lack."""
    yield from loss_cases(context, tuple(name for name in FORMS if name not in FIRST_FORMS), "waits")


def few(context: Context) -> Iterator[Case]:
    """One case per kernel: under a sanitizer a case takes a hundred times as long."""
    from .rows import NARROW, cases_of

    yield from (case for case in cases_of(NARROW[:2], context) if case.name.startswith(("log-probs", "loss")))
    for some in (loss_cases(context, FIRST_FORMS[1:2], "waits"), group_cases(context), critic_cases(context),
                 gae(context), diversity(context)):  # fmt: skip
        yield next(iter(some))
