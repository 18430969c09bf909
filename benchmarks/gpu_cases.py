"""Small calls of every kernel of a backend, each checked against the reference: what compute-sanitizer looks at.

`--traffic` instead runs the row kernel on logits of a real vocabulary, for a profiler to count its bytes.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.testing.inputs import Batch, make_batch

TRAFFIC_ROWS, TRAFFIC_VOCAB = 2048, 151936
Case = Callable[[str], tuple[Tensor, ...]]


def batch_on(device: str, dtype: torch.dtype = torch.float32) -> Batch:
    batch = make_batch(sequences=6, tokens=17, vocab=1031).to(dtype)
    return Batch(*(x.to(device) for x in batch))


def loss_case(device: str, **config: object) -> Case:
    b = batch_on(device)

    def call(backend: str) -> tuple[Tensor, ...]:
        x = b.logits.clone().requires_grad_()
        out = gk.grpo_loss(
            x, b.targets, b.advantages, b.mask, config=gk.LossConfig(**config), backend=backend, **b.keywords()
        )  # type: ignore[arg-type]
        return out.loss.detach(), out.per_token_loss, *torch.autograd.grad(out.loss, x)

    return call


def rewards_case(device: str) -> Case:
    b = batch_on(device)

    def call(backend: str) -> tuple[Tensor, ...]:
        x = b.logits.clone().requires_grad_()
        out = gk.grpo_loss(x, b.targets, mask=b.mask, rewards=b.advantages, group_size=3, backend=backend)
        return out.loss.detach(), *torch.autograd.grad(out.loss, x)

    return call


def packed_case(device: str) -> Case:
    """Sequences over several pieces of 2048 tokens, of one token and of none, and tokens behind the last."""
    g = torch.Generator().manual_seed(0)
    logps, old = (-torch.rand(6000, generator=g).to(device) for _ in range(2))
    cu = torch.tensor([0, 1, 1, 5000, 5900], device=device)
    advantages, mask = torch.tensor([1.0, -1.0, 0.5, -0.5], device=device), (logps < -0.1)
    config = gk.LossConfig(ratio_level="sequence", kl_coef=0.1)

    def call(backend: str) -> tuple[Tensor, ...]:
        x = logps.clone().requires_grad_()
        out = gk.policy_loss(
            x, advantages, mask, old_logps=old, ref_logps=old, cu_seqlens=cu, config=config, backend=backend
        )
        return out.loss.detach(), out.per_token_loss, *torch.autograd.grad(out.loss, x)

    return call


def cases(device: str) -> Iterator[tuple[str, Case]]:
    yield "loss, token level", loss_case(device, kl_coef=0.1, entropy_coef=0.05)
    yield "loss, sequence level", loss_case(device, ratio_level="sequence", kl_coef=0.1)
    yield "loss, gmpo", loss_case(device, objective="gmpo")
    yield "loss from rewards", rewards_case(device)
    yield "policy loss, packed", packed_case(device)
    g = torch.Generator().manual_seed(1)
    rewards, values, old = (torch.randn(3, 5000, generator=g).to(device) for _ in range(3))
    mask = torch.rand(3, 5000, generator=g).to(device) < 0.8
    flat, ids = torch.randn(300, generator=g).to(device), torch.randint(0, 9, (300,), generator=g).to(device)
    tokens = torch.randint(0, 50, (12, 300), generator=g).to(device)
    tokens[1::3] = tokens[::3]
    yield "gae", lambda backend: tuple(gk.gae(rewards, values, mask, gamma=0.99, lam=0.95, backend=backend))
    yield "value loss", lambda b: (gk.value_loss(values, old, rewards, mask, backend=b).loss,)
    yield "whitening", lambda backend: (gk.whiten(rewards, mask, backend=backend),)
    for scale in ("group", "batch", "leave_one_out"):
        ragged = functools.partial(gk.group_advantages, flat, group_ids=ids, scale=scale)
        yield f"advantages, {scale}", lambda b, ragged=ragged: tuple(ragged(backend=b))
    yield "advantages, consecutive", lambda b: tuple(gk.group_advantages(flat, group_size=30, backend=b))
    yield "diversity", lambda b: tuple(gk.group_diversity(tokens, group_size=6, ngram=2, backend=b))


def check(backend: str, device: str) -> int:
    """Runs every case and prints which; the number of those that differ from the reference."""
    wrong = 0
    for name, call in cases(device):
        mine, theirs = call(backend), call("reference")
        same = all(
            torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5) for a, b in zip(mine, theirs, strict=True)
        )
        wrong += not same
        print(f"{'ok' if same else 'WRONG'}: {name}", flush=True)
    return wrong


def traffic(backend: str, device: str) -> None:
    """One launch of each kind; the last line says over how many logits."""
    logits = torch.randn(1, TRAFFIC_ROWS, TRAFFIC_VOCAB, device=device, dtype=torch.bfloat16)
    targets = torch.randint(TRAFFIC_VOCAB, (1, TRAFFIC_ROWS), device=device)
    gk.token_logps(logits, targets, backend=backend)
    x = logits.requires_grad_()
    gk.grpo_loss(x, targets, torch.ones(1, device=device), backend=backend).loss.backward()
    print(json.dumps({"logits": logits.numel()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--traffic", action="store_true")
    arguments = parser.parse_args()
    if arguments.traffic:
        traffic(arguments.backend, arguments.device)
    elif check(arguments.backend, arguments.device):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
