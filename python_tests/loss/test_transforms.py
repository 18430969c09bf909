"""The table of docs/reliability.md, "What a loss can stand in": each row is a test here, and what is not supported raises
an error that says what to do instead."""

import copy
import dataclasses
import itertools
import json
import pickle
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_quick import CALLS, CASES, Inputs, asks_for_a_backend, scalar_of, tensors
from torch.utils.checkpoint import checkpoint

import grpo_kernels as gk
from grpo_kernels.correction.config import CORRECTION_PRESETS
from grpo_kernels.presets import PRESETS
from grpo_kernels.testing.inputs import make_batch

B = make_batch(3, 4, 40).to(torch.float32)
ARGS = (B.targets, B.advantages, B.mask)
HIDDEN, HEAD = B.logits[..., :8].contiguous(), torch.linspace(-1, 1, 320).view(40, 8)
VALUES, REWARDS = B.old_logps, torch.linspace(-1, 2, 4)
MASK4 = torch.tensor([[1, 1, 1, 0]] * 4)

LOSSES = {  # f(x, backend), differentiable in x
    "token_logps": (lambda x, **k: gk.token_logps(x, B.targets, **k).logps, B.logits),
    "linear_token_logps": (lambda x, **k: gk.linear_token_logps(x, HEAD, B.targets, **k).logps, HIDDEN),
    "policy_loss": (lambda x, **k: gk.policy_loss(x, *ARGS[1:], old_logps=B.old_logps, **k).loss, B.old_logps + 0.1),
    "grpo_loss": (lambda x, **k: gk.grpo_loss(x, *ARGS, old_logps=B.old_logps, **k).loss, B.logits),
    "linear_grpo_loss": (lambda x, **k: gk.linear_grpo_loss(x, HEAD, *ARGS, **k).loss, HIDDEN),
    "value_loss": (lambda x, **k: gk.value_loss(x, B.ref_logps, B.rollout_logps, B.mask, **k).loss, VALUES),
}
STEPS = torch.tensor([[0, 1, 3]]).expand(4, -1)
TOKENS4 = torch.linspace(-2, -0.1, 16).view(4, 4)
DETACHED = {  # of a tensor, everything else the same
    "group_advantages": (lambda x: gk.group_advantages(x, group_size=2).advantages, REWARDS),
    "gdpo_advantages": (lambda x: gk.gdpo_advantages(x, group_size=2).advantages, TOKENS4[:, :3]),
    "pass_at_k_advantages": (lambda x: gk.pass_at_k_advantages(x, group_size=2).advantages, REWARDS),
    "gpg_advantages": (lambda x: gk.gpg_advantages(x, group_size=2).advantages, REWARDS),
    "process_advantages": (lambda x: gk.process_advantages(x, STEPS, MASK4, group_size=2), TOKENS4[:, :3]),
    "gae": (lambda x: gk.gae(x, TOKENS4, MASK4, gamma=0.9, lam=0.9).advantages, TOKENS4),
    "reinforce_plus_plus": (lambda x: gk.reinforce_plus_plus(x, MASK4).advantages, TOKENS4),
    "reinforce_plus_plus_baseline": (lambda x: gk.reinforce_plus_plus_baseline(x, MASK4, group_size=2)[0], REWARDS),
    "remax": (lambda x: gk.remax(TOKENS4, x, MASK4).advantages, REWARDS),
    "optimal_token_baseline": (
        lambda x: gk.optimal_token_baseline(TOKENS4, x, TOKENS4.exp(), MASK4, group_size=2)[0], TOKENS4,
    ),
    "whiten": (lambda x: gk.whiten(x, MASK4), TOKENS4),
    "group_diversity": (lambda x: gk.group_diversity(x, MASK4, group_size=2).similarity, torch.arange(16).view(4, 4) % 5),
    "rollout_correction": (lambda x: gk.rollout_correction(x, TOKENS4, MASK4, weight="ratio").token_weights, TOKENS4),
}  # fmt: skip


def gradient(f, values):
    x = values.clone().requires_grad_()
    f(x).sum().backward()  # which a reentrant checkpoint needs
    return x.grad


# ---- torch.func ----

TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_torch_func_of_a_loss(name):
    """On the kernels an error that names the function and the way out, which is then walked."""
    f, x = LOSSES[name]
    expected = gradient(lambda x: f(x, backend="reference"), x)
    for transform, run in TRANSFORMS.items():
        with pytest.raises(RuntimeError, match=rf"\b{name}\b.*: torch.func .*backend='reference'"):
            run(lambda x: f(x, backend="cpu"), x)
        found = run(lambda x: f(x, backend="reference"), x)
        if transform in ("grad", "vjp"):
            torch.testing.assert_close(found, expected)
        elif transform == "jvp":
            torch.testing.assert_close(found[1].sum(), expected.sum(), rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(found, torch.stack([f(x, backend="reference")] * 2))


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_of_a_loss(name):
    f, x = LOSSES[name]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match=rf"\b{name}\b.*: .*forward-mode AD .*backend='reference'"):
            f(dual, backend="cpu")
        tangent = torch.autograd.forward_ad.unpack_dual(f(dual, backend="reference")).tangent
    expected = gradient(lambda x: f(x, backend="reference"), x)
    torch.testing.assert_close(tangent.sum(), expected.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DETACHED)
def test_torch_func_of_what_is_detached(name):
    """vmap is a loop, and a gradient an error."""
    f, x = DETACHED[name]
    y = (x + 1) % 5 if name == "group_diversity" else x.flip(0) * 0.7
    assert torch.equal(torch.vmap(f)(torch.stack([x, y])), torch.stack([f(x), f(y)]))
    if x.is_floating_point():
        with pytest.raises(ValueError, match=r"requires grad, but is not differentiated here; pass \w+\.detach\(\)"):
            torch.func.grad(lambda x: f(x).sum())(x)


def test_torch_func_of_kl_divergence():
    def f(x):
        return gk.kl_divergence(x, B.ref_logps)

    expected = gradient(f, B.old_logps)
    torch.testing.assert_close(torch.func.grad(lambda x: f(x).sum())(B.old_logps), expected)
    assert torch.equal(torch.vmap(f)(B.old_logps[None]), f(B.old_logps)[None])
    per_sample = torch.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([B.old_logps] * 2))
    torch.testing.assert_close(per_sample, torch.stack([expected] * 2))


# ---- torch.export, checkpoint, autocast ----


class Head(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.linear, self.options = torch.nn.Linear(8, 40), options

    def forward(self, hidden, targets, advantages, mask):
        return gk.grpo_loss(self.linear(hidden), targets, advantages, mask, **self.options).loss


@pytest.mark.parametrize("single_pass", [True, False])
def test_export(single_pass):
    """A program has the value; its gradient is an error, with the reference it is there."""
    model = Head(backend="cpu", single_pass=single_pass)
    program = torch.export.export(model, (HIDDEN, *ARGS), strict=False).module()
    with torch.no_grad():
        assert torch.equal(program(HIDDEN, *ARGS), model(HIDDEN, *ARGS))
    with pytest.raises(RuntimeError, match=r"no gradient outside of its loss.*torch.export.*torch\.no_grad\(\)"):
        program(HIDDEN, *ARGS)
    model.options["backend"] = "reference"
    program = torch.export.export(model, (HIDDEN, *ARGS), strict=False).module()
    for m in (model, program):
        m(HIDDEN, *ARGS).backward()
    for p, q in zip(model.parameters(), program.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) and p.grad.any()


CHECKPOINTED = {**{name: LOSSES[name] for name in LOSSES}}
CHECKPOINTED["in place"] = (lambda x, **k: gk.grpo_loss(x * 1, *ARGS, inplace=True, **k).loss, B.logits)
CHECKPOINTED["in place, two sweeps"] = (
    lambda x, **k: gk.grpo_loss(x * 1, *ARGS, inplace=True, single_pass=False, **k).loss, B.logits,
)  # fmt: skip


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoint(name, reentrant):
    f, x = CHECKPOINTED[name]
    expected = gradient(lambda x: f(x, backend="cpu"), x)
    found = gradient(lambda x: checkpoint(lambda x: f(x, backend="cpu"), x, use_reentrant=reentrant), x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_a_loss_in_place_of_logits_from_outside(reentrant):
    """They are gone when it is run again."""
    z, dummy = B.logits.clone().requires_grad_() * 1, torch.zeros((), requires_grad=True)

    def f(_):
        return gk.grpo_loss(z, *ARGS, inplace=True).loss

    if reentrant:  # nothing is written until the second run, which is the only one
        checkpoint(f, dummy, use_reentrant=True).backward()
        return
    with pytest.raises(RuntimeError, match=r"checkpoint.*pass inplace=False"):
        checkpoint(f, dummy, use_reentrant=False).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [n for n in CALLS if n not in ("AdaptiveKLController", "AdaptiveEntropyController")])
def test_autocast(name, dtype):
    """The linear functions compute as if hidden and weight had been cast; everything else takes no notice."""
    form, linear = next(iter(CALLS[name])), "linear" in name.lower()
    k = {"backend": "cpu"} if asks_for_a_backend(name) else {}
    found = []
    for cast in (True, False):
        x = Inputs(torch.float32)
        leaf = x.leaf
        if linear and not cast:  # what autocast is to do
            x.leaf = lambda v, leaf=leaf: leaf(v).to(dtype)
        with torch.autocast("cpu", dtype, enabled=cast):
            outputs = tensors(CALLS[name][form](x, **k))
        total = scalar_of(outputs)
        found.append([*(y.detach() for y in outputs), *(torch.autograd.grad(total, x.leaves) if x.leaves else ())])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# ---- grad modes ----

FIRST = [case for case in CASES if case[1] == next(iter(CALLS[case[0]]))]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", FIRST, ids=lambda c: c[0] + " packed" * c[2])
def test_no_grad_and_inference_mode(case, mode):
    name, form, packed = case
    k = {"backend": "cpu"} if asks_for_a_backend(name) else {}
    with_grad = tensors(CALLS[name][form](Inputs(torch.float32, packed), **k))
    with mode():
        x = Inputs(torch.float32, packed)
        x.leaf = lambda v: v
        without = tensors(CALLS[name][form](x, **k))
    assert not any(y.requires_grad for y in without)
    for a, b in zip(with_grad, without, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-6, atol=1e-7)


def test_in_place_without_grad_writes_nothing():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z = B.logits.clone()
            gk.grpo_loss(z, *ARGS, inplace=True)
            gk.grpo_loss(z, *ARGS, inplace=True)
        assert torch.equal(z, B.logits)


# ---- copies ----

CONFIGS = [
    *(
        gk.LossConfig.preset(n, **({"dro_beta": 0.1} if p.get("objective") == "dro" else {}))
        for n, p in PRESETS.items()
    ),
    *(gk.CorrectionConfig.preset(name) for name in CORRECTION_PRESETS),
    gk.RejectionFilter("k1", "mean", low=-0.5),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_configs_are_copied_and_go_through_json(config):
    as_dict = config.to_dict() if isinstance(config, gk.LossConfig) else dataclasses.asdict(config)
    for other in (
        copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config),
        type(config)(**json.loads(json.dumps(as_dict))),
    ):  # fmt: skip
        assert other == config and hash(other) == hash(config) and repr(other) == repr(config)
        if isinstance(config, gk.LossConfig):
            assert torch.equal(other.scalars, config.scalars) and other.form == config.form


def test_a_tensor_is_not_json():
    config = gk.LossConfig(kl_coef=torch.tensor(0.5))
    with pytest.raises(TypeError, match="Tensor"):
        json.dumps(config.to_dict())
    number = {**config.to_dict(), "kl_coef": config.kl_coef.item()}
    assert gk.LossConfig(**json.loads(json.dumps(number))) == gk.LossConfig(kl_coef=0.5)


@pytest.mark.parametrize("module", [gk.GRPOLoss, gk.LinearGRPOLoss])
@pytest.mark.parametrize("coefficient", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_modules_are_copied(module, coefficient):
    loss = module(gk.LossConfig(kl_coef=coefficient), temperature=0.7)
    first = (B.logits,) if module is gk.GRPOLoss else (HIDDEN, HEAD)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        a, b = (m(*first, *ARGS, ref_logps=B.ref_logps).loss for m in (loss, other))
        assert torch.equal(a, b) and other.options == loss.options and not list(other.state_dict())


# ---- threads ----


def test_several_threads_at_once():
    """Each its own calls of every function, forward and backward, bit for bit as alone."""

    def run(case):  # fmt: skip
        name, form, packed = case
        x = Inputs(torch.float32, packed)
        found = tensors(CALLS[name][form](x, **({"backend": "cpu"} if asks_for_a_backend(name) else {})))
        gradients = torch.autograd.grad(scalar_of(found), x.leaves) if x.leaves else ()
        return [y.detach() for y in (*found, *gradients)]

    cases = [c for c in CASES if c[1] != "clip_cov"]  # which draws from torch's one generator
    alone, together = [run(c) for c in cases], {}
    barrier = threading.Barrier(4)

    def work(thread):
        barrier.wait()
        order = cases[thread * 7 :] + cases[: thread * 7]
        together[thread] = {c: run(c) for c in order}

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for thread, (case, expected) in itertools.product(range(4), zip(cases, alone, strict=True)):
        assert all(map(torch.equal, together[thread][case], expected)), case


# ---- the table ----


def test_every_row_of_the_table_is_a_test():
    text = (ROOT / "docs" / "reliability.md").read_text()
    section = re.search(r"## What a loss can stand in\n(.*?)\n## ", text, re.DOTALL)[1]
    named = {
        name for row in re.findall(r"^\|.*\|$", section, re.MULTILINE) for name in re.findall(r"`(test_\w+)`", row)
    }
    rows = [row for row in re.findall(r"^\|.*\|$", section, re.MULTILINE)][2:]
    assert len(rows) > 15 and all("`test_" in row for row in rows)
    sources = "".join(p.read_text() for p in Path(ROOT / "python_tests").rglob("test_*.py"))
    assert not [name for name in named if f"def {name}(" not in sources]
