"""Every public function that takes tensors, in every form that runs different code: name -> form -> call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.config import METRICS
from grpo_kernels.correction.config import CORRECTION_PRESETS

from . import losses
from .inputs import GROUP, REWARDS, SEQUENCES, Call, Inputs, backward, both_layouts, gpu

# ---- advantages ----


def _groups() -> dict[str, dict[str, Any]]:
    return {"size": {"group_size": GROUP}, "ids": {"group_ids": gpu(SEQUENCES, dtype=torch.int64)}}


def _each_group(f: Callable[..., Any], *a: Tensor, **k: Any) -> Iterator[tuple[str, Call]]:
    for form, group in _groups().items():
        yield form, lambda group=group: f(*a, **group, **k)


def group_advantages() -> Iterator[tuple[str, Call]]:
    one, several = gpu(SEQUENCES), gpu(SEQUENCES, REWARDS)
    yield from _each_group(gk.group_advantages, one)
    forms = {
        "list of weights": {"reward_weights": [1.0, 0.5, 2.0]},
        "weights on the GPU": {"reward_weights": gpu(REWARDS)},
        "several rewards": {},
    }
    for form, k in forms.items():
        yield form, lambda k=k: gk.group_advantages(several, group_size=GROUP, **k)
    everything = {
        "baseline": "length_weighted", "lengths": gpu(SEQUENCES, dtype=torch.int64), "critic_weight": 0.5,
        "critic_values": gpu(SEQUENCES), "valid": gpu(SEQUENCES, dtype=torch.bool), "scale": "batch", "clip": 5.0,
    }  # fmt: skip
    yield "everything", lambda: gk.group_advantages(one, group_size=GROUP, **everything)


def gdpo_advantages() -> Iterator[tuple[str, Call]]:
    rewards = gpu(SEQUENCES, REWARDS)
    yield from _each_group(gk.gdpo_advantages, rewards)
    for form, weights in (("list of weights", [1.0, 0.5, 2.0]), ("weights on the GPU", gpu(REWARDS))):
        yield form, lambda w=weights: gk.gdpo_advantages(rewards, group_size=GROUP, reward_weights=w)
    lengths = gpu(SEQUENCES, dtype=torch.int64)
    yield "lengths", lambda: gk.gdpo_advantages(rewards, group_size=GROUP, lengths=lengths)


def pass_at_k_advantages() -> Iterator[tuple[str, Call]]:
    return _each_group(gk.pass_at_k_advantages, gpu(SEQUENCES))


def gpg_advantages() -> Iterator[tuple[str, Call]]:
    return _each_group(gk.gpg_advantages, gpu(SEQUENCES))


def process_advantages() -> Iterator[tuple[str, Call]]:
    steps, ends = gpu(SEQUENCES, 3), gpu(SEQUENCES, 3, dtype=torch.int64)
    return _each_group(gk.process_advantages, steps, ends, Inputs().mask())


def group_diversity() -> Iterator[tuple[str, Call]]:
    x, packed = Inputs(), Inputs(packed=True)
    yield from _each_group(gk.group_diversity, x.targets(), x.mask(), ngram=2)
    yield "packed", lambda: gk.group_diversity(packed.targets(), group_size=GROUP, cu_seqlens=packed.cu_seqlens)
    long = gpu(SEQUENCES, 5000, dtype=torch.int32)
    yield "long", lambda: gk.group_diversity(long, group_size=GROUP)


def gae() -> Iterator[tuple[str, Call]]:
    for layout, x, k in both_layouts():
        a = (x.per_token(), x.per_token())
        yield layout, lambda a=a, k=k: gk.gae(*a, gamma=0.9, lam=0.9, **k)
        yield f"{layout}, mask", lambda a=a, x=x, k=k: gk.gae(*a, x.mask(), gamma=0.9, lam=0.9, **k)
        yield (
            f"{layout}, a reward per sequence",
            lambda x=x, a=a, k=k: gk.gae(x.per_sequence(), a[1], x.mask(), gamma=0.9, lam=0.9, **k),
        )


def reinforce_plus_plus() -> Iterator[tuple[str, Call]]:
    for layout, x, k in both_layouts():
        yield layout, lambda x=x, k=k: gk.reinforce_plus_plus(x.per_token(), x.mask(), **k)
        yield (
            f"{layout}, KL",
            lambda x=x, k=k: gk.reinforce_plus_plus(x.per_sequence(), x.mask(), kl=x.per_token(), kl_coef=0.1, **k),
        )


def reinforce_plus_plus_baseline() -> Iterator[tuple[str, Call]]:
    for layout, x, k in both_layouts():
        for form, call in _each_group(gk.reinforce_plus_plus_baseline, x.per_sequence(), x.mask(), **k):
            yield f"{layout}, {form}", call


def remax() -> Iterator[tuple[str, Call]]:
    for layout, x, k in both_layouts():
        yield layout, lambda x=x, k=k: gk.remax(x.per_token(), x.per_sequence(), x.mask(), **k)
        yield (
            f"{layout}, a reward per sequence",
            lambda x=x, k=k: gk.remax(x.per_sequence(), x.per_sequence(), x.mask(), **k),
        )


def optimal_token_baseline() -> Iterator[tuple[str, Call]]:
    x = Inputs()
    for turns in (False, True):
        for form, call in _each_group(
            gk.optimal_token_baseline, x.per_token(), x.per_token(), x.per_token(), x.mask(), multi_turn=turns,
            token_weights=x.per_token(),
        ):  # fmt: skip
            yield f"{form}, several turns" if turns else form, call


def value_loss() -> Iterator[tuple[str, Call]]:
    for layout, x, k in both_layouts():
        values = x.per_token(grad=True)
        for form, more in {
            "": {},
            ", mask": {"mask": x.mask()},
            ", sequences": {"aggregation": "sequence_mean"},
        }.items():
            yield (
                layout + form,
                lambda v=values, x=x, k={**k, **more}: backward(
                    gk.value_loss(v, x.per_token(), x.per_token(), **k).loss
                ),
            )
    x = Inputs()
    v = x.per_token(grad=True)
    yield "no clip", lambda: backward(gk.value_loss(v, None, x.per_token(), clip=None).loss)
    yield "scale=tensor", lambda: backward(gk.value_loss(v, None, x.per_token(), clip=None, scale=gpu()).loss)


def whiten() -> Iterator[tuple[str, Call]]:
    x = Inputs()
    values, mask = x.per_token(), x.mask()
    yield "plain", lambda: gk.whiten(values)
    yield "mask", lambda: gk.whiten(values, mask)
    for mode in ("floor", "std"):
        yield mode, lambda m=mode: gk.whiten(values, mask, eps_mode=m, shift_mean=False)
    yield "centred", lambda: gk.whiten(values, mask, divide=False)


# ---- around the loss ----


def kl_divergence() -> Iterator[tuple[str, Call]]:
    x = Inputs()
    logps = x.per_token(grad=True)
    for estimator in ("k1", "abs", "k2", "k3"):
        yield estimator, lambda e=estimator: backward(gk.kl_divergence(logps, x.per_token(), e).sum())
    for gradient in ("straight_through", "importance_weighted", "score_function", "behaviour_weighted"):
        k = {"gradient": gradient, "mask": x.mask(), "input_clamp": 20.0, "output_clamp": 10.0}
        k |= {"rollout_logps": x.per_token()} if gradient == "behaviour_weighted" else {}
        yield gradient, lambda k=k: backward(gk.kl_divergence(logps, x.per_token(), **k).sum())


def rollout_correction() -> Iterator[tuple[str, Call]]:
    for layout, x, k in both_layouts():
        for name in CORRECTION_PRESETS if layout == "padded" else ("trl_sequence_mask", "verl_seq_is_rs", "slime_opsm"):
            config = gk.CorrectionConfig.preset(name)
            more = {} if config.opsm_delta is None else {"logps": x.per_token(), "advantages": x.per_sequence()}
            more |= {"config": config, "mask": x.mask(), **k}
            yield f"{layout}, {name}", lambda x=x, m=more: gk.rollout_correction(x.per_token(), x.per_token(), **m)
        yield f"{layout}, metrics", lambda x=x, k=k: gk.rollout_correction(x.per_token(), x.per_token(), **k)
        all_of_them = {"batch_normalise": True, "veto": 1e-4, "weight": "clip", "low": 0.5, "high": 2.0}
        yield (
            f"{layout}, normalised",
            lambda x=x, k={**k, **all_of_them}: gk.rollout_correction(x.per_token(), x.per_token(), x.mask(), **k),
        )


def token_details() -> Iterator[tuple[str, Call]]:
    for layout, x, k in both_layouts():
        for level in ("token", "sequence"):
            options = {"old_logps": x.per_token(), "config": gk.LossConfig(ratio_level=level), "mask": x.mask(), **k}
            a = (x.per_token(), x.per_sequence())
            yield f"{layout}, {level}", lambda a=a, o=options: gk.token_details(*a, **o)


def combine_metrics() -> Iterator[tuple[str, Call]]:
    metrics = gk.Metrics(gpu(len(METRICS)))
    yield "one", lambda: gk.combine_metrics(metrics)
    yield "micro-batches", lambda: gk.combine_metrics([metrics, metrics], losses="mean")


def controllers() -> tuple[Callable[[], Iterator[tuple[str, Call]]], ...]:
    def kl() -> Iterator[tuple[str, Call]]:
        yield "update", lambda: gk.AdaptiveKLController(0.1, 1.0, 100).update(gpu())

    def entropy() -> Iterator[tuple[str, Call]]:
        x = Inputs()
        yield "observe", lambda: gk.AdaptiveEntropyController().observe(x.per_token(), x.mask())
        observed = gk.AdaptiveEntropyController()
        observed._window = gpu(3, dtype=torch.float64)
        yield "update", lambda: observed.update()

    return kl, entropy


AdaptiveKLController, AdaptiveEntropyController = controllers()
FUNCTIONS: dict[str, Callable[[], Iterator[tuple[str, Call]]]] = {
    "GRPOLoss": lambda: losses.modules(gk.GRPOLoss, lambda x: [x.logits()]),
    "LinearGRPOLoss": lambda: losses.modules(gk.LinearGRPOLoss, lambda x: x.head()),
    **{
        f.__name__: f
        for f in (
            losses.token_logps, losses.linear_token_logps, losses.policy_loss, losses.grpo_loss,
            losses.linear_grpo_loss, group_advantages,
            gdpo_advantages, pass_at_k_advantages, gpg_advantages, process_advantages, group_diversity, gae,
            reinforce_plus_plus, reinforce_plus_plus_baseline, remax, optimal_token_baseline, value_loss, whiten,
            kl_divergence, rollout_correction, token_details, combine_metrics,
        )
    },
    "AdaptiveKLController": AdaptiveKLController,
    "AdaptiveEntropyController": AdaptiveEntropyController,
}  # fmt: skip


# These use no operators of the library, so there is nothing inside to record.
LOSSES = ("policy_loss", "grpo_loss", "linear_grpo_loss")
PLAIN_TORCH = (
    "kl_divergence", "rollout_correction", "token_details", "combine_metrics", "AdaptiveKLController",
    "AdaptiveEntropyController",
)  # fmt: skip
# Common forms of the losses in which operators run different code: the others differ before them, or in the kernels.
INSIDE = ("plain", "mask", "weights per sequence", "entropy", "sequence", "gmpo", "vespo", "clip_cov")


@functools.cache
def _common_forms() -> set[str]:
    return set(losses.loss_forms(Inputs()))


def differs_inside(function: str, form: str) -> bool:
    """Whether an operator may run different code for this form."""
    if function not in LOSSES:
        return function not in PLAIN_TORCH
    form = form.removeprefix("packed, ")
    return form in INSIDE or form not in _common_forms()


def takes_tensors(name: str) -> bool:
    """Whether a public name is a function or class that takes tensors, rather than a result or a config."""
    public = getattr(gk, name)
    holds_numbers = dataclasses.is_dataclass(public) or name in ("available_backends", "Metrics")
    return not holds_numbers and not hasattr(public, "_fields")
