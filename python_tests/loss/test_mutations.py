"""The comparisons can fail: each single change to the specification is noticed."""

import pytest
import torch
from forms import OBJECTIVES

import grpo_kernels as gk
from grpo_kernels.reference import loss as reference
from grpo_kernels.reference import objectives as reference_objectives
from grpo_kernels.testing.inputs import make_batch

FULL = {"eps_high": 0.4, "delta": 1.6, "kl_coef": 0.1, "entropy_coef": 0.05, "kl_output_clamp": 0.05}


def with_scalars(**changes):
    def patch(monkeypatch):
        original = reference.scalars_of

        def changed(*args):
            s = original(*args)
            return s._replace(**{name: f(s) for name, f in changes.items()})

        monkeypatch.setattr(reference, "scalars_of", changed)

    return patch


def swapped(name, replacement):
    return lambda monkeypatch: monkeypatch.setattr(reference, name, replacement)


def other_objective(replacement):
    return lambda monkeypatch: monkeypatch.setitem(reference_objectives.OBJECTIVES, "clip", replacement)


clip, kl, log_ratios, estimate = (
    reference_objectives.clip_objective,
    reference.kl_penalty,
    reference.log_ratios,
    reference.kl_estimate,
)
CHANGES = {
    "swap the clip bounds": with_scalars(ratio_low=lambda s: 2 - s.ratio_high, ratio_high=lambda s: 2 - s.ratio_low),
    "drop delta": with_scalars(delta=lambda s: float("inf")),
    "drop the dual clip": with_scalars(dual_clip=lambda s: float("inf")),
    "drop the output clamp": with_scalars(kl_output_clamp=lambda s: float("inf")),
    "negate the advantage": other_objective(lambda v, s: clip(v._replace(adv=-v.adv), s)),
    "detach the ratio": other_objective(lambda v, s: clip(v._replace(log_ratio=v.log_ratio.detach()), s)),
    "detach the KL": swapped("kl_penalty", lambda *args: kl(*args).detach()),
    "k1 for k3": swapped("kl_estimate", lambda name, u: estimate("k1", u)),
    "forget the mask in the ratio": swapped("log_ratios", lambda lp, old, active, *rest: log_ratios(lp, old, torch.ones_like(active), *rest)),
    "sum for mean": swapped("log_ratios", lambda lp, old, active, layout, level, s: log_ratios(lp, old, active, layout, "sequence_product", s)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_specification_is_noticed(monkeypatch, name):
    caps = {"delta": None, "dual_clip": 1.5} if "dual" in name else {}  # the lower bound of the two hides the other
    b, config = make_batch(), gk.LossConfig(ratio_level="sequence", **{**FULL, **caps})
    b = b._replace(old_logps=b.old_logps + torch.tensor([-0.6, -0.8, 0.6, 0.6, 0.0])[:, None])  # beyond each bound

    def run(backend):
        x = b.logits.clone().requires_grad_()
        out = gk.grpo_loss(
            x,
            b.targets,
            torch.tensor([1.0, -1.0, 0.5, -2.0, 1.0]),
            b.mask,
            config=config,
            backend=backend,
            **b.keywords(),
        )
        return torch.cat([out.loss.detach()[None], torch.autograd.grad(out.loss, x)[0].flatten()])

    torch.testing.assert_close(run("cpu"), run("reference"), rtol=1e-10, atol=1e-12)
    CHANGES[name](monkeypatch)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run("cpu"), run("reference"), rtol=1e-4, atol=1e-6)


MUTATIONS = {  # objective, and the change to its specification
    "cispo": lambda v: v._replace(log_ratio=v.log_ratio * 0.5),
    "sapo": lambda v: v._replace(adv=v.adv.abs()),
    "gmpo": lambda v: v._replace(pooled_adv=v.adv * 0.9),
    "vespo": lambda v: v._replace(pooled_log_ratio=v.log_ratio),
    "reinforce": lambda v: v._replace(adv=-v.adv),
    "dppo_tv": lambda v: v._replace(old=v.logp.detach()),
    "dppo_kl": lambda v: v._replace(old=v.logp.detach()),
    "tv_mask": lambda v: v._replace(old=v.logp.detach()),
    "ipo": lambda v: v._replace(old=v.logp.detach()),
    "dro": lambda v: v._replace(log_ratio=v.log_ratio.detach()),
    "clip_cov": lambda v: v._replace(selected=torch.zeros_like(v.selected)),
    "kl_cov": lambda v: v._replace(selected=torch.zeros_like(v.selected)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_objective_is_noticed(monkeypatch, name):
    b, config = make_batch(sequences=8, tokens=12), gk.LossConfig(**OBJECTIVES[name])

    def run(backend):
        x = b.logits.clone().requires_grad_()
        out = gk.grpo_loss(x, b.targets, b.advantages, b.mask, config=config, backend=backend, **b.keywords())
        return torch.cat([out.loss.detach()[None], torch.autograd.grad(out.loss, x)[0].flatten()])

    torch.testing.assert_close(run("cpu"), run("reference"), rtol=1e-10, atol=1e-12)
    original = reference_objectives.OBJECTIVES[name]
    monkeypatch.setitem(reference_objectives.OBJECTIVES, name, lambda v, s: original(MUTATIONS[name](v), s))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run("cpu"), run("reference"), rtol=1e-4, atol=1e-6)


def test_the_forms_reach_their_bounds():
    """Each objective that clips does so for both signs of the advantage, and never for all tokens."""
    b = make_batch(sequences=12, tokens=24)
    for name, options in OBJECTIVES.items():
        m = gk.grpo_loss(
            b.logits, b.targets, b.advantages, b.mask, config=gk.LossConfig(**options), **b.keywords()
        ).metrics
        if name not in ("sapo", "vespo", "reinforce", "dro", "kl_cov"):
            assert m["clip_low"] > 0 and m["clip_high"] > 0 and m["clip_region"] < 1, name
        if name in ("cispo", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov"):
            assert 0 < m["clip_cap"] < 1, name
