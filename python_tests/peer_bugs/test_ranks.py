"""Peers' bugs with several processes: two ranks, started once."""

import traceback

import pytest
import torch
import torch.distributed as dist

import grpo_kernels as gk

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def r24_train_under_ddp(rank):
    class Policy(torch.nn.Module):
        """Calls the loss in its forward, so that DDP sees it."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 9, bias=False)
            self.loss = gk.LinearGRPOLoss()

        def forward(self, x, targets, adv, denominator):
            return self.loss(self.body(x), self.head.weight, targets, adv, denominator=denominator).loss

    g = torch.Generator().manual_seed(0)
    x, targets, adv = torch.randn(4, 3, 4, generator=g), torch.arange(12).view(4, 3) % 9, torch.randn(4, generator=g)
    policy = Policy()
    whole = torch.autograd.grad(policy(x, targets, adv, 12), list(policy.parameters()))
    mine = slice(0, 1) if rank == 0 else slice(1, 4)
    ddp = torch.nn.parallel.DistributedDataParallel(policy)
    ddp(x[mine], targets[mine], adv[mine], 12 / 2).backward()  # the mean over two ranks
    for p, g in zip(policy.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)


def x1_a_rank_without_tokens(rank):
    values, mask, group = torch.arange(6.0).view(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), dist.group.WORLD
    mine = gk.whiten(values[rank : rank + 1], mask[rank : rank + 1], dp_group=group)
    torch.testing.assert_close(mine, gk.whiten(values, mask)[rank : rank + 1])
    none = gk.group_advantages(torch.tensor([1.0, 2.0])[: 2 * (1 - rank)], group_size=2, dp_group=group)
    assert len(none.advantages) == 2 * (1 - rank)
    controller = gk.AdaptiveEntropyController(init=0.1, target=0.5, delta=0.01)
    if rank == 0:
        controller.observe(torch.full((1, 3), 0.25))
    assert controller.update(group) == pytest.approx(0.11) and controller.last_entropy == 0.25
    with pytest.raises(ValueError, match="none since"):  # on no rank, so on each of them
        controller.update(group)


def x2_metrics_of_all_ranks(rank):
    torch.manual_seed(0)
    logps, old, adv = -torch.rand(4, 3), -torch.rand(4, 3), torch.randn(4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]])  # the second rank has no tokens
    whole = gk.policy_loss(logps, adv, mask, old_logps=old, denominator=3.0).metrics
    mine = slice(2 * rank, 2 * rank + 2)
    part = gk.policy_loss(logps[mine], adv[mine], mask[mine], old_logps=old[mine], denominator=3.0).metrics
    for losses, factor in (("sum", 1), ("mean", 0.5)):
        combined = gk.combine_metrics([part, part], dist.group.WORLD, losses=losses)
        torch.testing.assert_close(combined["policy_loss"], 2 * factor * whole["policy_loss"])
        torch.testing.assert_close(combined["tokens"], 2 * whole["tokens"])
        torch.testing.assert_close(combined.stacked[4:], whole.stacked[4:])


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    errors = {}
    for test in (r24_train_under_ddp, x1_a_rank_without_tokens, x2_metrics_of_all_ranks):
        try:
            test(rank)
        except Exception:
            errors[test.__name__] = traceback.format_exc()
    torch.save(errors, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_r24_every_rank_gets_the_gradient_of_all(errors):
    """TRL 1.14.0: the fused loss ran on the unwrapped model, and every rank kept its own gradient."""
    assert not [e for rank in errors if (e := rank.get("r24_train_under_ddp"))]


def test_x1_a_rank_without_tokens_takes_part(errors):
    """slime #2235: it skipped the collective, and the others waited for it."""
    assert not [e for rank in errors if (e := rank.get("x1_a_rank_without_tokens"))]


def test_x2_metrics_are_weighted_by_tokens_over_ranks(errors):
    """TRL #6380: metrics were averaged over ranks, however many tokens each had."""
    assert not [e for rank in errors if (e := rank.get("x2_metrics_of_all_ranks"))]
