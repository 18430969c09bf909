"""`make test-quick`: every public function on every available backend, with small inputs, by the accuracy rule, in
minutes.

The rest of the suite tests edge cases. This file tests whether each function's values and gradients are right at all,
for padded and for packed sequences. It fails if it does not call some public function.
"""

import dataclasses
import inspect
from collections.abc import Mapping

import pytest
import torch
from forms import OBJECTIVES

import grpo_kernels as gk
from grpo_kernels.config import RATIO_LEVELS
from grpo_kernels.correction.config import CORRECTION_PRESETS
from grpo_kernels.testing.compare import assert_as_accurate
from grpo_kernels.testing.inputs import make_batch

SEQUENCES, TOKENS, VOCAB, HIDDEN = 4, 4, 37, 8
GROUP = {"group_size": 2}
EVERYTHING = {"kl_coef": 0.1, "entropy_coef": 0.05}


class Inputs:
    """A batch in one dtype, padded or packed. Each call makes a new one from the same numbers."""

    def __init__(self, dtype, packed=False, rounded=None, leaves=()):
        """`rounded`: a dtype to which the numbers are rounded first. `leaves`: used instead of new ones."""
        g, b = torch.Generator().manual_seed(0), make_batch(SEQUENCES, TOKENS, VOCAB).to(rounded or dtype)
        self.dtype, self.packed, self.leaves, self.given = dtype, packed, [], list(leaves)
        self.layout = {"cu_seqlens": torch.arange(SEQUENCES + 1) * TOKENS} if packed else {}
        self.logits, self.targets, self.mask = (self.shaped(x) for x in (b.logits, b.targets, b.mask))
        self.a_token = {name: self.shaped(x) for name, x in b.keywords().items()}
        self.advantages = b.advantages.to(dtype)
        self.rewards, self.hidden, self.weight = (
            torch.randn(*shape, generator=g).to(rounded or dtype).to(dtype)
            for shape in ((SEQUENCES, 3), (*self.targets.shape, HIDDEN), (VOCAB, HIDDEN))
        )

    def shaped(self, x):
        x = x.flatten(0, 1) if self.packed else x
        return x.to(self.dtype) if x.is_floating_point() else x

    def leaf(self, x):
        self.leaves.append(self.given.pop(0) if self.given else x.clone().requires_grad_())
        return self.leaves[-1]

    def token(self, name):
        return self.a_token[name]


def loss(function, *first, options=None, **more):
    """A loss, or its module, whose first arguments are leaves."""

    def call(x, **k):
        k = {**x.a_token, **x.layout, **more, **k, "config": gk.LossConfig(**(options or EVERYTHING))}
        leaves = [x.leaf(getattr(x, name)) for name in first]
        return function(*leaves, x.targets, x.advantages, x.mask, **k)

    return call


def module_of(made, *first):
    def call(x, **k):
        leaves = [x.leaf(getattr(x, name)) for name in first]
        module = made(gk.LossConfig(**EVERYTHING), temperature=0.8, **k)
        return module(*leaves, x.targets, x.advantages, x.mask, **x.layout, **x.a_token)

    return call


def policy_loss(options=None):
    def call(x, **k):
        logps = x.leaf((x.token("rollout_logps") + x.token("old_logps")) / 2)
        k |= {"entropy": x.leaf(x.token("token_weights")), "config": gk.LossConfig(**{**EVERYTHING, **(options or {})})}
        return gk.policy_loss(logps, x.advantages, x.mask, **x.a_token, **x.layout, **k)

    return call


def coefficient_of_kl(x):
    return torch.tensor(gk.AdaptiveKLController(0.1, 1.0, 100).update(2.0), dtype=torch.float64)


def coefficient_of_entropy(x):
    controller = gk.AdaptiveEntropyController()
    controller.observe(x.token("token_weights"), x.mask)
    return torch.tensor(controller.update(), dtype=torch.float64)


def one(name):
    """A function of the rewards of each sequence."""
    return lambda x, **k: getattr(gk, name)(x.rewards[:, 0].contiguous(), **GROUP, **k)


# name -> form -> call(inputs, backend=...), which returns tensors in any structure.
CALLS = {
    "token_logps": {
        "": lambda x, **k: gk.token_logps(
            x.leaf(x.logits), x.targets, mask=x.mask, temperature=0.8, softcap=20.0, return_entropy=True, return_sum_p2=True, **k
        )[:2]
    },
    "linear_token_logps": {
        "": lambda x, **k: gk.linear_token_logps(
            x.leaf(x.hidden), x.leaf(x.weight), x.targets, mask=x.mask, return_entropy=True, chunk_rows=8, **k
        )
    },
    "policy_loss": {
        "": policy_loss(),
        **{level: policy_loss({"ratio_level": level}) for level in RATIO_LEVELS[1:]},
        **{name: policy_loss(options) for name, options in OBJECTIVES.items()},
    },
    "grpo_loss": {
        "": loss(gk.grpo_loss, "logits"),
        "two passes": loss(gk.grpo_loss, "logits", single_pass=False, temperature=0.7),
        "sequence": loss(gk.grpo_loss, "logits", options={"ratio_level": "sequence"}),
        "from rewards": lambda x, **k: gk.grpo_loss(
            x.leaf(x.logits), x.targets, None, x.mask, rewards=x.advantages, group_size=2, **x.layout, **k
        ),
    },
    "linear_grpo_loss": {
        "": loss(gk.linear_grpo_loss, "hidden", "weight"),
        "chunks": loss(gk.linear_grpo_loss, "hidden", "weight", chunk_rows=8),
    },
    "GRPOLoss": {"": module_of(gk.GRPOLoss, "logits")},
    "LinearGRPOLoss": {"": module_of(gk.LinearGRPOLoss, "hidden", "weight")},
    "group_advantages": {
        "": one("group_advantages"),
        "ids, several rewards": lambda x, **k: gk.group_advantages(
            x.rewards, group_ids=torch.tensor([7, -1, 7, -1]), reward_weights=[1.0, 0.5, 2.0], scale="batch", **k
        ),
    },
    "gdpo_advantages": {"": lambda x, **k: gk.gdpo_advantages(x.rewards, **GROUP, **k)},
    "pass_at_k_advantages": {"": one("pass_at_k_advantages")},
    "gpg_advantages": {"": one("gpg_advantages")},
    "process_advantages": {
        "": lambda x, **k: gk.process_advantages(
            x.rewards, torch.tensor([[0, 1, 3]]).expand(SEQUENCES, -1), x.mask, **GROUP, **k
        )
    },
    "group_diversity": {
        "": lambda x, **k: gk.group_diversity(x.targets % 5, x.mask, threshold=0.6, ngram=2, **GROUP, **x.layout, **k)
    },
    "gae": {
        "": lambda x, **k: gk.gae(
            x.token("token_weights"), x.token("old_logps"), x.mask, gamma=0.9, lam=0.8, **x.layout, **k
        )
    },
    "reinforce_plus_plus": {
        "": lambda x, **k: gk.reinforce_plus_plus(
            x.rewards[:, 0].contiguous(), x.mask, gamma=0.9, kl=x.token("token_weights"), kl_coef=0.1, **x.layout, **k
        )
    },
    "reinforce_plus_plus_baseline": {
        "": lambda x, **k: gk.reinforce_plus_plus_baseline(
            x.rewards[:, 0].contiguous(), x.mask, **GROUP, **x.layout, **k
        )
    },
    "remax": {
        "": lambda x, **k: gk.remax(x.token("token_weights"), x.rewards[:, 0].contiguous(), x.mask, **x.layout, **k)
    },
    "optimal_token_baseline": {
        "": lambda x, **k: gk.optimal_token_baseline(
            x.token("token_weights"), x.token("old_logps"), x.token("entropy_mask") * 0.5, x.mask, **GROUP, **k
        )
    },
    "value_loss": {
        "": lambda x, **k: gk.value_loss(
            x.leaf(x.token("old_logps")), x.token("ref_logps"), x.token("rollout_logps"), x.mask, **x.layout, **k
        )
    },
    "whiten": {"": lambda x, **k: gk.whiten(x.token("old_logps"), x.mask, **k)},
    "kl_divergence": {
        estimator: lambda x, e=estimator: gk.kl_divergence(x.leaf(x.token("old_logps")), x.token("ref_logps"), e, mask=x.mask)
        for estimator in ("k1", "abs", "k2", "k3")
    },
    "rollout_correction": {
        preset: lambda x, p=preset: gk.rollout_correction(
            x.token("old_logps"), x.token("rollout_logps"), x.mask, logps=x.token("ref_logps"), advantages=x.advantages,
            config=gk.CorrectionConfig.preset(p), **x.layout,
        )
        for preset in CORRECTION_PRESETS
    },
    "token_details": {
        level: lambda x, o=level: gk.token_details(
            x.token("old_logps"), x.advantages, x.mask, old_logps=x.token("ref_logps"), **x.layout,
            token_weights=x.token("token_weights"), config=gk.LossConfig(ratio_level=o),
        )
        for level in RATIO_LEVELS
    },
    "combine_metrics": {
        "": lambda x: gk.combine_metrics([
            gk.policy_loss(x.token("old_logps"), x.advantages, x.mask, old_logps=x.token(old), **x.layout).metrics
            for old in ("ref_logps", "rollout_logps")
        ])
    },
    "AdaptiveKLController": {"": coefficient_of_kl},
    "AdaptiveEntropyController": {"": coefficient_of_entropy},
}  # fmt: skip
# Their gradient is not the derivative of their value: it treats a ratio or a weight as constant.
HELD = {
    ("grpo_loss", "from rewards"),
    *(("policy_loss", form) for form in ("sequence_token", "cispo", "vespo", "dppo_tv", "dppo_kl")),
}
DTYPES = (torch.float32, torch.bfloat16)
OF_MATRICES = ("token_logps", "linear_token_logps", "grpo_loss", "linear_grpo_loss", "GRPOLoss", "LinearGRPOLoss")


def asks_for_a_backend(name):
    return name in ("GRPOLoss", "LinearGRPOLoss") or "backend" in inspect.signature(getattr(gk, name)).parameters


def takes_packed(name):
    return "cu_seqlens" in inspect.signature(getattr(gk, name)).parameters


CASES = [(name, form, False) for name, forms in CALLS.items() for form in forms]
CASES += [(name, next(iter(forms)), True) for name, forms in CALLS.items() if takes_packed(name)]
ids = [" ".join(filter(None, (name, form, "packed" * packed))) for name, form, packed in CASES]
OF_BACKENDS = [pytest.param(case, id=i) for case, i in zip(CASES, ids, strict=True) if asks_for_a_backend(case[0])]
OF_TORCH = [pytest.param(case, id=i) for case, i in zip(CASES, ids, strict=True) if not asks_for_a_backend(case[0])]


def tensors(out):
    """Every tensor of a call's result, in order."""
    if isinstance(out, torch.Tensor):
        return [out]
    values = out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else ()
    return [x for value in values for x in tensors(value)]


def scalar_of(outputs):
    """A weighted sum of all differentiable outputs; None if there are none."""
    parts = [y.double().flatten() for y in outputs if y.requires_grad]
    return (
        torch.stack([y @ torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64) for y in parts]).sum()
        if parts
        else None
    )


def outcome(case, dtype, rounded=None, **options):
    """A call's outputs, then the gradients of a weighted sum of them with respect to the leaves."""
    name, form, packed = case
    x = Inputs(dtype, packed, rounded)
    outputs = tensors(CALLS[name][form](x, **options))
    total, gradients = scalar_of(outputs), ()
    assert outputs and (total is None) == (not x.leaves)
    if total is not None:
        gradients = torch.autograd.grad(total, x.leaves)
        assert all(g.any() for g in gradients)
    return [y.detach() if y.is_floating_point() else y.double() for y in (*outputs, *gradients)]


def test_every_public_function_is_called():
    public = {name: getattr(gk, name) for name in gk.__all__ if name not in ("available_backends", "Metrics")}
    assert {*CALLS} == {n for n, f in public.items() if not dataclasses.is_dataclass(f) and not hasattr(f, "_fields")}


@pytest.mark.parametrize("case", OF_BACKENDS)
def test_kernels_err_no_further_than_eager_torch(backend, case):
    for dtype in DTYPES[: 2 if case[0] in OF_MATRICES else 1]:
        mine, eager = outcome(case, dtype, backend=backend), outcome(case, dtype, backend="reference")
        exact = outcome(case, torch.float64, rounded=dtype, backend="reference")
        for i, (a, b, c) in enumerate(zip(mine, eager, exact, strict=True)):
            assert_as_accurate(a, b, c, what=f"{backend} {dtype} {i}")


@pytest.mark.parametrize("case", OF_BACKENDS + OF_TORCH)
def test_the_reference_agrees_with_itself(case):
    """float32 agrees with float64, and gradients agree with finite differences."""
    options = {"backend": "reference"} if asks_for_a_backend(case[0]) else {}
    exact = outcome(case, torch.float64, rounded=torch.float32, **options)
    for a, b in zip(outcome(case, torch.float32, **options), exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-4)
    name, form, packed = case
    call, x = CALLS[name][form], Inputs(torch.float64, packed)
    call(x, **options)

    def scalar(*leaves):
        return scalar_of(tensors(call(Inputs(torch.float64, packed, leaves=leaves), **options)))

    if x.leaves and (name, form) not in HELD:
        assert torch.autograd.gradcheck(scalar, x.leaves, fast_mode=True)
