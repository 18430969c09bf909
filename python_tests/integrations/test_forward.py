"""A loss inside a wrapped model's forward: two processes get the gradients of one that has the whole batch."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import grpo_kernels as gk
from grpo_kernels.integrations.forward import check_synchronised, in_forward

RANKS, B, T, V, H = 2, 4, 6, 41, 16
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.lm_head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(ids)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.hidden(ids))


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor([6, 2, 5, 0])[:, None]  # the ranks' tokens differ
    return {
        "ids": torch.randint(V, (B, T + 1), generator=g), "mask": mask,
        "advantages": torch.randn(B, generator=g), "old": -3.7 + 0.3 * torch.randn(B, T, generator=g),
    }  # fmt: skip


def loss_of(model: Model, b: dict[str, Tensor], scale: float) -> gk.LossOutput:
    assert b["old"].dtype == torch.float32  # mixed precision has not touched it
    return gk.linear_grpo_loss(
        model.hidden(b["ids"]), model.lm_head.weight, b["ids"][:, 1:], b["advantages"], b["mask"], old_logps=b["old"],
        denominator=13, scale=scale,
    )  # fmt: skip


def from_logits(model: Model, b: dict[str, Tensor], scale: float) -> gk.LossOutput:
    return gk.grpo_loss(
        model(b["ids"]), b["ids"][:, 1:], b["advantages"], b["mask"], old_logps=b["old"], denominator=13, scale=scale,
        inplace=True,
    )  # fmt: skip


def whole(p: nn.Parameter) -> Tensor:
    gradient: Any = p.grad
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).detach().float().clone()


def gradients(model: nn.Module) -> list[Tensor]:
    return [whole(p) for p in model.parameters()]


def made(bf16: bool = False) -> Model:
    torch.manual_seed(1)
    return Model().bfloat16() if bf16 else Model()


def fsdp2(model: Model, policy: Any = None) -> Model:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = policy or MixedPrecisionPolicy()
    fully_shard(model.layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def everything(rank: int) -> dict[str, Any]:
    part = {name: x[2 * rank : 2 * rank + 2] for name, x in batch().items()}
    results: dict[str, Any] = {}
    for name, function in (("ddp", loss_of), ("ddp_logits", from_logits)):
        model = made()
        ddp = DistributedDataParallel(model)
        in_forward(ddp, model, function, part, RANKS).loss.backward()
        check_synchronised(ddp)
        results[name] = gradients(model)

    model = made()
    ddp = DistributedDataParallel(model)
    loss_of(ddp.module, part, RANKS).loss.backward()  # the trap: DDP sees nothing
    results["bypassed"] = gradients(model)
    try:
        check_synchronised(ddp)
        results["noticed"] = ""
    except RuntimeError as error:
        results["noticed"] = str(error)

    model = fsdp2(made())
    in_forward(model, model, loss_of, part, RANKS).loss.backward()
    results["fsdp2"] = gradients(model)

    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = fsdp2(made(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    in_forward(model, model, loss_of, part, RANKS).loss.backward()
    results["fsdp2_bf16"] = gradients(model)

    from torch.distributed.fsdp import FullyShardedDataParallel

    model = made()
    fsdp1 = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    in_forward(fsdp1, model, loss_of, part, RANKS).loss.backward()
    with FullyShardedDataParallel.summon_full_params(fsdp1, with_grads=True):
        results["fsdp1"] = gradients(model)
    return results


def worker(rank: int, store: str, folder: str) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
        result: Any = everything(rank)
        dist.destroy_process_group()
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, (str(folder / "store"), str(folder)), nprocs=RANKS, start_method="spawn")
    results = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    for result in results:
        assert not isinstance(result, str), result
    return results


@pytest.fixture(scope="module")
def one_process() -> list[Tensor]:
    model = made()
    loss_of(model, batch(), 1.0).loss.backward()
    return gradients(model)


@pytest.mark.parametrize(
    ("case", "tolerance"), [("ddp", 1e-6), ("ddp_logits", 1e-6), ("fsdp2", 1e-6), ("fsdp2_bf16", 3e-2), ("fsdp1", 1e-6)]
)
def test_gradients_are_those_of_one_process(
    by_rank: list[Any], one_process: list[Tensor], case: str, tolerance: float
) -> None:
    for result in by_rank:
        for mine, exact in zip(result[case], one_process, strict=True):
            assert mine.shape == exact.shape and (mine - exact).norm() <= tolerance * (exact.norm() + 1e-3)


def test_what_bypasses_ddp_is_noticed(by_rank: list[Any], one_process: list[Tensor]) -> None:
    """`ddp.module` called directly: no error from DDP, and each rank keeps its own gradients."""
    assert max((a - b).norm() for a, b in zip(by_rank[0]["bypassed"], by_rank[1]["bypassed"], strict=True)) > 1e-2
    for result in by_rank:
        assert "differ between rank 0 and rank 1" in result["noticed"] and "not ddp.module" in result["noticed"]


def test_one_process_needs_no_group() -> None:
    model = made()
    check_synchronised(model)
    original = model.forward
    out = in_forward(model, model, loss_of, batch(), 1.0)
    assert out.loss.requires_grad and model.forward == original and "forward" not in vars(model)


def test_a_failing_function_leaves_the_forward_as_it_was() -> None:
    model = made()

    def fails(module: Model) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_forward(model, model, fails)
    assert "forward" not in vars(model) and model(batch()["ids"]).shape == (B, T + 1, V)
