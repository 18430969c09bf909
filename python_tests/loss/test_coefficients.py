"""Coefficients given as tensors: every loss uses the values that they hold when its kernels run, with the same bits as
if the values were given as numbers."""

import copy
import dataclasses
import itertools
import math
import pickle

import pytest
import torch
from conftest import BACKENDS_HERE, dtype_name
from torch._dynamo.testing import CompileCounterWithBackend

import grpo_kernels as gk
from grpo_kernels.config import Scalars
from grpo_kernels.inputs.layout import acc_dtype, layout_of
from grpo_kernels.loss.policy import Advantages, LossArguments, policy_inputs
from grpo_kernels.testing.inputs import make_batch

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SEVERAL = [(d, b) for d in DTYPES for b in BACKENDS_HERE if b != "triton" or d == torch.float32]  # slow: interpreted
META = torch.device("meta")


def single_pass(b, logits, **options):
    return gk.grpo_loss(logits, b.targets, b.advantages, b.mask, **options, **b.keywords())


def two_sweeps(b, logits, **options):
    return single_pass(b, logits, single_pass=False, **options)


def gspo(b, logits, *, config, **options):
    return single_pass(b, logits, config=dataclasses.replace(config, ratio_level="sequence"), **options)


def from_logps(b, logits, **options):
    logps, entropy = gk.token_logps(logits, b.targets, mask=b.mask, return_entropy=True, backend=options["backend"])[:2]
    return gk.policy_loss(logps, b.advantages, b.mask, entropy=entropy, **options, **b.keywords())


def linear(b, logits, **options):
    head = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return gk.linear_grpo_loss(
        logits, head, b.targets, b.advantages, b.mask, chunk_rows=5, **options, **b.keywords()
    )  # fmt: skip


LOSSES = (single_pass, two_sweeps, gspo, from_logps, linear)


def outcome(loss, dtype, backend, kl_coef, entropy_coef):
    """Loss, terms, metrics and the logits' gradient."""
    batch = make_batch(3, 4, 40)
    b, x = batch.to(acc_dtype(dtype)), batch.logits.to(dtype).requires_grad_()
    out = loss(b, x, config=gk.LossConfig(kl_coef=kl_coef, entropy_coef=entropy_coef), backend=backend)
    return out.loss.detach(), out.per_token_loss, *out.metrics.values(), *torch.autograd.grad(out.loss, x)


def assert_same(these, those):
    assert len(these) == len(those) and all(map(torch.equal, these, those))


@pytest.mark.parametrize("dtype, backend", SEVERAL, ids=lambda x: x if isinstance(x, str) else dtype_name(x))
@pytest.mark.parametrize("loss", LOSSES)
def test_a_tensor_equals_its_number_and_is_followed(loss, dtype, backend):
    """The scalars are exact in the accumulation dtype: 0.1 itself would be rounded by the tensor."""
    kl, entropy = torch.tensor(0.1, dtype=acc_dtype(dtype)), torch.tensor([0.05], dtype=acc_dtype(dtype))
    first = outcome(loss, dtype, backend, kl, entropy)
    assert_same(first, outcome(loss, dtype, backend, kl.item(), entropy.item()))
    kl.fill_(0.75), entropy.mul_(4)
    second = outcome(loss, dtype, backend, kl, entropy)
    assert_same(second, outcome(loss, dtype, backend, kl.item(), entropy.item()))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[-1], second[-1])


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_zero_keeps_the_terms_and_adds_nothing(backend):
    """The terms are still computed: their metrics are reported, and the coefficient may rise later."""
    zero, config = torch.zeros(()), gk.LossConfig(kl_coef=torch.zeros(()), entropy_coef=torch.zeros(()))
    assert config.has_kl and config.has_entropy and not gk.LossConfig(kl_coef=0.0).has_kl
    of_tensors = outcome(from_logps, torch.float32, backend, zero, zero)
    without = outcome(from_logps, torch.float32, backend, 0.0, 0.0)
    names = ["loss", "per_token", *gk.config.METRICS, "gradient"]
    for name, a, b in zip(names, of_tensors, without, strict=True):
        assert torch.equal(a, b) == (name not in ("kl", "entropy")), name


@pytest.mark.parametrize("value", [torch.tensor(0.25, dtype=torch.bfloat16), torch.tensor(0.25, dtype=torch.float64)])
def test_any_floating_dtype_is_read_in_that_of_the_loss(backend, value):
    a = outcome(single_pass, torch.float32, backend, value, value)
    assert_same(a, outcome(single_pass, torch.float32, backend, 0.25, 0.25))


def inputs_on(device, config):
    x = torch.zeros(2, 3, device=device)
    return policy_inputs(
        layout_of(x.shape, None), torch.ones_like(x, dtype=torch.bool), torch.float32, config,
        Advantages(x[:, 0]),
        LossArguments(old_logps=x, ref_logps=x, denominator=1.0, scale=torch.ones((), device=device)),
    )  # fmt: skip


def test_devices_of_coefficients():
    """On the tokens' device the kernel gets the tensor's address; a tensor on the CPU is read by the call."""
    kl, entropy = torch.tensor(0.5), torch.tensor(0.25)
    here = inputs_on("cpu", gk.LossConfig(kl_coef=kl, entropy_coef=0.125))
    assert here.kl_coef.data_ptr() == kl.data_ptr() and here.entropy_coef is None
    assert math.isnan(Scalars(*here.scalars.tolist()).kl_coef)  # it is not used

    config = gk.LossConfig(kl_coef=kl, entropy_coef=entropy)
    elsewhere = inputs_on(META, config)
    scalars = Scalars(*elsewhere.scalars.tolist())
    assert (elsewhere.kl_coef, elsewhere.entropy_coef) == (None, None)
    assert (scalars.kl_coef, scalars.entropy_coef, scalars.eps_low) == (0.5, 0.25, 0.2)
    assert torch.isnan(config.scalars).sum() == 2
    kl.fill_(0.75)
    assert Scalars(*inputs_on(META, config).scalars.tolist()).kl_coef == 0.75

    remote = gk.LossConfig(entropy_coef=torch.zeros((), device=META))
    with pytest.raises(ValueError, match=r"entropy_coef must be on cpu, as the tokens, or on the CPU; got .* on meta"):
        inputs_on("cpu", remote)


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.ones(2), r"0-d or \[1\]; got shape \(2,\)"),
        (torch.ones(1, 1), r"0-d or \[1\]; got shape \(1, 1\)"),
        (torch.ones(0), r"0-d or \[1\]; got shape \(0,\)"),
        (torch.tensor(1), "floating dtype; got torch.int64"),
        (torch.tensor(0.1, requires_grad=True), r"must not require grad.*\.detach\(\)"),
    ],
)
@pytest.mark.parametrize("name", ["kl_coef", "entropy_coef"])
def test_refuses(name, value, message):
    with pytest.raises(ValueError, match=f"{name} .*{message}"):
        gk.LossConfig(**{name: value})


def test_refuses_what_requires_grad_later_and_other_fields():
    coef = torch.tensor(0.1)
    config = gk.LossConfig(kl_coef=coef)
    coef.requires_grad_()
    with pytest.raises(ValueError, match="kl_coef must not require grad"):
        inputs_on("cpu", config)
    with pytest.raises(ValueError, match="eps_low must be a finite number"):
        gk.LossConfig(eps_low=torch.tensor(0.2))


def test_a_config_with_tensors_is_a_frozen_value():
    """It is compared and printed without reading its tensors: on the device "meta" that would raise an error."""
    coef, other = torch.zeros((), device=META), torch.zeros((), device=META)
    a, b = gk.LossConfig(kl_coef=coef), gk.LossConfig(kl_coef=coef)
    assert a == b and hash(a) == hash(b) and len({a, b, gk.LossConfig()}) == 2
    assert a != gk.LossConfig(kl_coef=other) and a != gk.LossConfig(kl_coef=0.1) and gk.LossConfig(kl_coef=0.1) != a
    assert a != gk.LossConfig(kl_coef=coef, eps_low=0.1) and a != "config"
    assert "kl_coef=<torch.float32 on meta>, kl_estimator='k3'" in repr(a)
    replaced = dataclasses.replace(a, eps_low=0.1)
    assert replaced.kl_coef is coef and replaced.has_kl and copy.copy(a) == a
    assert dataclasses.replace(a, kl_coef=0.0).form.kl_estimator == "none"
    config = gk.LossConfig(kl_coef=torch.tensor(0.5), entropy_coef=torch.tensor(0.25))
    for c in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        c.kl_coef.fill_(2.0)  # the kernels read a copy's own tensors
        scalars = inputs_on("cpu", c)
        assert (scalars.kl_coef.item(), scalars.entropy_coef.item()) == (2.0, 0.25) and config.kl_coef.item() == 0.5


def test_a_compiled_loss_follows_without_recompiling():
    """It follows what is written into the tensors, other tensors and other configs."""
    b, counter = make_batch(3, 4, 40), CompileCounterWithBackend("eager")

    def step(x, config):
        return gk.grpo_loss(
            x * 1.0, b.targets, b.advantages, b.mask, config=config, backend="cpu", **b.keywords()
        ).loss  # fmt: skip

    def gradient(fn, config):
        x = b.logits.clone().requires_grad_()
        return torch.autograd.grad(fn(x, config), x)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    kl, entropy = (torch.tensor(v, dtype=torch.float64) for v in (0.1, 0.05))
    config, gradients = gk.LossConfig(kl_coef=kl, entropy_coef=entropy), []
    for change in (lambda: None, lambda: kl.fill_(0.9), lambda: entropy.zero_(), lambda: kl.zero_()):
        change()
        gradients.append(gradient(compiled, config))
        torch.testing.assert_close(gradients[-1], gradient(step, config), rtol=1e-12, atol=1e-15)
    other = gk.LossConfig(kl_coef=kl + 0.1, entropy_coef=entropy + 0.05)
    torch.testing.assert_close(gradient(compiled, other), gradients[0], rtol=1e-12, atol=1e-15)
    assert not any(torch.equal(x, y) for x, y in itertools.pairwise(gradients))
    assert counter.frame_count == 1


def test_calls_without_a_config_share_one(monkeypatch):
    """Making one takes as long as the rest of a small call."""
    x, made = torch.zeros(2, 3), []
    monkeypatch.setattr(gk.LossConfig, "__post_init__", lambda self: made.append(self))
    gk.policy_loss(x, x[:, 0], backend="reference")
    gk.grpo_loss(x[..., None], x.long(), x[:, 0], backend="reference")
    gk.linear_grpo_loss(x[..., None], torch.ones(1, 1), x.long(), x[:, 0], backend="reference")
    assert gk.GRPOLoss().config is gk.LinearGRPOLoss().config and not made
