"""Two processes (gloo) on the fused head with its loss: `python trl_ranks.py ddp|fsdp2`. Run by test_trl.py."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

from trl_cases import VOCAB, tiny

from grpo_kernels import LossConfig
from grpo_kernels.integrations import trl as ours
from grpo_kernels.integrations.forward import Boxed

ROWS, LENGTH, COMPLETION = 4, 11, 6
CONFIG = LossConfig.preset("trl_grpo")


def batch() -> tuple[torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)
    old = torch.randn(ROWS, COMPLETION, generator=generator) * 0.3 - 4
    return ids, dict(advantages=torch.randn(ROWS, generator=generator), old_logps=old)


def headed(kind: str = "llama") -> Any:
    model = tiny(kind)
    ours._utils.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    ours._FusedHead(model)
    return model


def gradients(model: Any, wrapped: Any, rows: slice, single: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, given = batch()
    labels = ids.clone()
    labels[:, :-COMPLETION] = -100
    if single:
        mask = torch.ones(ROWS, COMPLETION, dtype=torch.int)[rows]
        call = Boxed(**{k: v[rows] for k, v in given.items()}, mask=mask, config=CONFIG)
        loss = wrapped(input_ids=ids[rows], labels=labels[rows], fused_lm_head=True, grpo=call).loss
    else:
        loss = -wrapped(input_ids=ids[rows], labels=labels[rows], fused_lm_head=True).log_probs.sum() / 7
    loss.backward()
    whole = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}
    return loss.detach(), {name: g.clone() for name, g in whole.items()}


def compare(rank: int, model: Any, wrapped: Any, single: bool, what: str) -> None:
    alone = headed()
    loss, expected = gradients(alone, alone, slice(0, ROWS), single)
    mine, found = gradients(model, wrapped, slice(2 * rank, 2 * rank + 2), single)
    dist.all_reduce(mine)
    average = 1 if single else 2  # a sum over tokens, of which each rank has half
    torch.testing.assert_close(mine / 2 * average, loss, rtol=1e-5, atol=1e-6, msg=what)
    assert expected["lm_head.weight"].any()
    for name, g in expected.items():
        torch.testing.assert_close(
            found[name] * average, g, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


def run(rank: int, kind: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for single in (True, False):
        if kind == "ddp":
            model = headed()
            compare(rank, model, torch.nn.parallel.DistributedDataParallel(model), single, f"ddp, single={single}")
            continue
        from torch.distributed.fsdp import fully_shard

        for head in (False, True):  # a group of its own: its weight is a DTensor in the model's forward
            model = headed()
            for layer in model.model.layers:
                fully_shard(layer)
            if head:
                fully_shard(model.lm_head)
            fully_shard(model)
            compare(rank, model, model, single, f"fsdp2, single={single}, lm_head of its own={head}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (sys.argv[1], f"{folder}/store"), nprocs=2)
