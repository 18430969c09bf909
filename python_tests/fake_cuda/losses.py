"""The losses and log-probs in every form that runs different code: form -> call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.config import OBJECTIVES, RATIO_LEVELS

from .inputs import GROUP, SEQUENCES, TOKENS, VOCAB, Call, Inputs, backward, gpu

# ---- forms that all losses have: form -> keywords ----


def _config(**options: Any) -> dict[str, Any]:
    return {"config": gk.LossConfig(**options)}


def loss_forms(x: Inputs) -> dict[str, dict[str, Any]]:
    """Forms of policy_loss, grpo_loss and linear_grpo_loss, for padded and packed tokens."""
    old = {"old_logps": x.per_token()}
    kl = {**old, "ref_logps": x.per_token()}
    everything = {
        **kl, "rollout_logps": x.per_token(), "token_weights": x.per_token(), "entropy_mask": x.per_token(),
        "mask": x.mask(),
    }  # fmt: skip
    forms = {
        "plain": {},
        "old": old,
        "mask": {**old, "mask": x.mask()},
        "int mask": {**old, "mask": x.per_token(torch.int64)},
        "KL": {**kl, **_config(kl_coef=0.1)},
        "scale=tensor": {**old, "scale": gpu()},
        "scale on the CPU": {**old, "scale": torch.empty(())},
        "denominator on the CPU": {**old, "denominator": torch.empty((), dtype=torch.int64)},
        "scale=0.5": {**old, "scale": 0.5},
        "denominator=tensor": {**old, "denominator": gpu(dtype=torch.int64)},
        "denominator=number": {**old, "denominator": 7},
        "weights per sequence": {**old, "token_weights": x.per_sequence(), "sequence_weights": x.per_sequence()},
        "entropy": {**everything, "entropy": x.per_token(grad=True), **_config(entropy_coef=0.1)},
        "entropy per token": {
            **everything, "entropy": x.per_token(grad=True),
            **_config(entropy_coef=0.1, entropy_aggregation="token_mean", entropy_mask_bonus=True, aggregation="sequence_mean"),
        },
        "return_entropy": {**old, "entropy": x.per_token(), "return_entropy": True},
        **{how: {**old, "mask": x.mask(), **_config(aggregation=how)} for how in ("token_sum", "sequence_mean", "sequence_sum")},
        "fixed_length": {**old, **_config(aggregation="fixed_length", max_length=TOKENS)},
        "sequences with tokens": {**old, **_config(aggregation="sequence_sum", count_empty_sequences=False)},
        **{level: {**old, **_config(ratio_level=level)} for level in RATIO_LEVELS[1:]},
        **{name: {**everything, **_config(objective=name, **OPTIONS.get(name, {}))} for name in list(OBJECTIVES)[1:]},
    }  # fmt: skip
    if not x.packed:
        return forms
    return {f"packed, {name}": {**forms[name], "cu_seqlens": x.cu_seqlens} for name in BY_BOUNDARIES}


BY_BOUNDARIES = (
    "plain", "mask", "weights per sequence", "entropy per token", "sequence_mean", "fixed_length",
    "sequences with tokens",
    "sequence", "gmpo", "clip_cov",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"dro": {"dro_beta": 0.1}}


def _without_entropy(k: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in k.items() if name != "entropy"}


def _each_loss(dtype: torch.dtype = torch.float32) -> Iterator[tuple[Inputs, str, dict[str, Any]]]:
    for packed in (False, True):
        x = Inputs(packed, dtype)
        for form, keywords in loss_forms(x).items():
            yield x, form, keywords


def policy_loss() -> Iterator[tuple[str, Call]]:
    for x, form, k in _each_loss():
        logps, advantages = x.per_token(grad=True), x.per_sequence()
        yield form, lambda a=(logps, advantages), k=k: backward(gk.policy_loss(*a, **k).loss)
    x = Inputs()
    bf16 = x.per_token(torch.bfloat16, grad=True)
    yield "bfloat16", lambda: backward(gk.policy_loss(bf16, x.per_token()).loss)
    logps, entropy = x.per_token(grad=True), x.per_token(grad=True)
    yield "float64", _of_float64(lambda y: gk.policy_loss(y.per_token(grad=True), y.per_sequence()).loss)
    yield (
        "entropy alone has a gradient",
        lambda: backward(
            gk.policy_loss(logps.detach(), x.per_sequence(), entropy=entropy, **_config(entropy_coef=0.1)).loss
        ),
    )


def _of_float64(call: Callable[[Inputs], Tensor]) -> Call:
    y = Inputs(dtype=torch.float64)
    return lambda: backward(call(y))


def grpo_loss() -> Iterator[tuple[str, Call]]:
    def step(x: Inputs, k: dict[str, Any], **more: Any) -> Call:
        a = (x.logits(), x.targets(), x.per_sequence())
        return lambda: backward(gk.grpo_loss(*a, **_without_entropy(k), **more).loss)

    for x, form, k in _each_loss():
        yield form, step(x, k)
    x = Inputs()
    for form, k in _row_forms(x).items():
        yield form, step(x, k)
    yield "single_pass=False", step(x, {"single_pass": False})
    yield "bfloat16", step(Inputs(dtype=torch.bfloat16), {})
    yield "float64", step(Inputs(dtype=torch.float64), {})
    yield from _rewards(lambda **k: gk.grpo_loss(x.logits(), x.targets(), **k).loss)
    logits, targets = x.logits(), x.targets()
    for name, single in (("inplace", True), ("inplace, single_pass=False", False)):
        yield (
            name,
            lambda s=single: backward(
                gk.grpo_loss(logits * 1, targets, x.per_sequence(), inplace=True, single_pass=s).loss
            ),
        )
    yield "no grad", lambda: gk.grpo_loss(logits.detach(), targets, x.per_sequence())
    yield "upstream gradient", lambda: backward(gk.grpo_loss(logits, targets, x.per_sequence()).loss * 0.5)
    yield "two backwards", lambda: _twice(gk.grpo_loss(logits, targets, x.per_sequence()).loss)
    yield "metrics kept", lambda: list(gk.grpo_loss(logits, targets, x.per_sequence()).metrics.values())


def _twice(loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def _row_forms(x: Inputs) -> dict[str, dict[str, Any]]:
    """Forms of all functions that take rows of logits."""
    return {
        "temperature=0.7": {"temperature": 0.7},
        "temperature per row": {"temperature": gpu(SEQUENCES)},
        "temperature per token": {"temperature": x.per_token()},
        "softcap": {"softcap": 30.0, "logit_scale": 0.5},
    }


def _rewards(loss: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    rewards = gpu(SEQUENCES)
    for scale in ("group", "batch"):
        k = {"rewards": rewards, "group_size": GROUP, "advantage_scale": scale}
        yield f"rewards, {scale}", lambda k=k: backward(loss(**k))


def linear_grpo_loss() -> Iterator[tuple[str, Call]]:
    def step(x: Inputs, k: dict[str, Any]) -> Call:
        a = (*x.head(), x.targets(), x.per_sequence())
        return lambda: backward(gk.linear_grpo_loss(*a, **_without_entropy(k)).loss)

    for x, form, k in _each_loss():
        yield form, step(x, k)
    x = Inputs()
    for form, k in {**_row_forms(x), "single_pass=False": {"single_pass": False}, "chunks": {"chunk_rows": 8}}.items():
        yield form, step(x, k)
    yield "bias", step(x, {"bias": gpu(VOCAB, grad=True)})
    yield "bfloat16, chunks", step(Inputs(dtype=torch.bfloat16), {"chunk_rows": 8})
    yield "lora", step(x, {"lora": x.lora()})
    half = Inputs(dtype=torch.bfloat16)
    yield "bfloat16, chunks, lora", step(half, {"chunk_rows": 8, "lora": half.lora()})
    yield from _rewards(lambda **k: gk.linear_grpo_loss(*x.head(), x.targets(), **k).loss)
    hidden, weight = x.head()
    yield (
        "frozen head",
        lambda: backward(gk.linear_grpo_loss(hidden, weight.detach(), x.targets(), x.per_sequence()).loss),
    )


def modules(module: type, *first: Callable[[Inputs], Any]) -> Iterator[tuple[str, Call]]:
    x = Inputs()
    a = [y for f in first for y in f(x)]
    yield "plain", lambda: backward(module(temperature=0.7)(*a, x.targets(), x.per_sequence()).loss)


def _logps_forms(x: Inputs) -> dict[str, dict[str, Any]]:
    return {
        "plain": {},
        "mask": {"mask": x.mask()},
        "return_entropy": {"return_entropy": True},
        "return_sum_p2": {"return_sum_p2": True},
        **_row_forms(x),
    }


def token_logps() -> Iterator[tuple[str, Call]]:
    x = Inputs()
    logits, targets = x.logits(), x.targets()
    for form, k in _logps_forms(x).items():
        yield form, lambda k=k: gk.token_logps(logits, targets, **k).logps.backward(x.per_token())
    yield "entropy alone", lambda: gk.token_logps(logits, targets, return_entropy=True).entropy.backward(x.per_token())
    yield (
        "inplace_backward",
        lambda: gk.token_logps(logits * 1, targets, inplace_backward=True).logps.backward(x.per_token()),
    )
    yield "no grad", lambda: gk.token_logps(logits.detach(), targets)
    one_more = gpu(SEQUENCES, TOKENS + 1, VOCAB, grad=True)
    yield "one position more", lambda: gk.token_logps(one_more, targets).logps.backward(x.per_token())


def linear_token_logps() -> Iterator[tuple[str, Call]]:
    x = Inputs()
    head, targets = x.head(), x.targets()
    of_head = {"chunks": {"chunk_rows": 8}, "lora": {"lora": x.lora()}}
    of_head |= {"return_is_top1": {"return_is_top1": True}, "return_mean_logits": {"return_mean_logits": True}}
    for form, k in {**_logps_forms(x), **of_head}.items():
        yield form, lambda k=k: gk.linear_token_logps(*head, targets, **k).logps.backward(x.per_token())
    yield "no grad", lambda: gk.linear_token_logps(head[0].detach(), head[1].detach(), targets)
