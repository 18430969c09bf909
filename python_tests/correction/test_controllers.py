"""The adaptive coefficients against verl's controller and TRL's own training loss."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from oracle_cases import make_batch
from oracle_cases import one_thread as one_thread

import grpo_kernels as gk

KLS = [0.02, 0.1, 0.5, 0.0, 0.09, 0.13, math.inf, 0.1001]


def kl_by_hand(init, target, horizon, steps):
    values = [init]
    for kl, n in steps:
        error = max(-0.2, min(0.2, kl / target - 1))
        values.append(values[-1] * (1 + error * n / horizon))
    return values[1:]


@pytest.mark.parametrize("horizon", [100, 10_000, math.inf])
def test_kl_follows_the_formula(horizon):
    controller = gk.AdaptiveKLController(0.2, 0.1, horizon)
    steps = [(kl, 8 * i) for i, kl in enumerate(KLS)]
    got = [controller.update(torch.tensor(kl, dtype=torch.float64), n) for kl, n in steps]
    assert got == pytest.approx(kl_by_hand(0.2, 0.1, horizon, steps), rel=1e-14)
    assert got[-1] == controller.coef and (controller.coef == 0.2) == (horizon == math.inf)


def test_kl_is_verls():
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="pip install verl==0.9.1")
    theirs, ours = core_algos.AdaptiveKLController(0.05, 0.1, 300), gk.AdaptiveKLController(0.05, 0.1, 300)
    for i, kl in enumerate(KLS * 5):
        theirs.update(kl, 16 + i)
        assert ours.update(kl, 16 + i) == pytest.approx(theirs.value, rel=1e-14)


def test_a_tensor_of_the_coefficient_follows_the_controller():
    kl, entropy = gk.AdaptiveKLController(0.1, 0.01, 10), gk.AdaptiveEntropyController(0.2, target=1.0, delta=0.1)
    on_kl, on_entropy = kl.coef_on("cpu", torch.float64), entropy.coef_on("cpu")
    assert on_kl.item() == 0.1 and on_entropy.item() == 0.0 and kl.coef_on("cpu", torch.float64) is on_kl
    config = gk.LossConfig(kl_coef=on_kl, entropy_coef=on_entropy)
    kl.update(1.0), entropy.observe(torch.full((3,), 0.5))
    entropy.update()
    assert on_kl.item() == kl.coef != 0.1 and on_entropy.item() == pytest.approx(entropy.coef) and entropy.coef > 0
    assert config.kl_coef is kl.coef_on("cpu", torch.float64)
    kl.load_state_dict({"coef": 0.7})
    assert on_kl.item() == 0.7


def test_kl_coefficient_reaches_the_loss():
    b = make_batch()
    controller, config = gk.AdaptiveKLController(0.1, 0.01, 10), gk.LossConfig(kl_coef=0.1)
    parts = []
    for _ in range(3):
        config = dataclasses.replace(config, kl_coef=controller.coef)
        out = gk.policy_loss(b.logps, b.advantages, b.mask, old_logps=b.old, ref_logps=b.ref, config=config)
        parts.append(float(out.metrics["kl_loss"]))
        controller.update(out.metrics["kl"], 5)
    assert parts == pytest.approx([parts[0], parts[0] * 1.1, parts[0] * 1.21], rel=1e-9)


def test_kl_never_leaves_zero_and_stays_above_it():
    controller = gk.AdaptiveKLController(0.0, 0.1, 1)
    assert controller.update(5.0, 3) == 0
    controller = gk.AdaptiveKLController(1.0, 0.1, 100)
    assert all(controller.update(0.0, 64) > 0 for _ in range(50))


@pytest.mark.parametrize(
    "arguments, name",
    [
        ((-0.1, 0.1, 10), "init"), ((math.nan, 0.1, 10), "init"), ((0.1, 0.0, 10), "target"),
        ((0.1, math.inf, 10), "target"), ((0.1, 0.1, 0), "horizon"), ((0.1, 0.1, -5), "horizon"),
    ],
)  # fmt: skip
def test_kl_arguments(arguments, name):
    with pytest.raises(ValueError, match=name):
        gk.AdaptiveKLController(*arguments)


def test_kl_refuses_nan_and_keeps_its_value():
    controller = gk.AdaptiveKLController(0.1, 0.1, 10)
    with pytest.raises(ValueError, match="current must be a number; got nan"):
        controller.update(torch.tensor(math.nan), 1)
    with pytest.raises(ValueError, match="n_steps must be at least 0; got -1"):
        controller.update(0.1, -1)
    assert controller.coef == 0.1


# ---- entropy ----

OPTIONS = [
    {"init": 0.0, "target": 1.4, "delta": 0.01, "low": 0.0, "high": 1.0},
    {"init": 0.02, "target": 1.4, "delta": 0.015, "low": 0.01, "high": 0.03},
    {"init": 0.3, "target": 0.0, "delta": 0.2, "low": 0.1, "high": 0.5},
]


def windows(g):
    """Steps of two micro-batches whose entropies fluctuate around the target; the last step has no active token."""
    for level in (1.2, 1.6, 1.1, 1.0, 1.3, 1.9, 1.8, 1.2, 1.39, 1.41, 2.0, 2.0):
        yield [
            (level * torch.rand(3, n, generator=g, dtype=torch.float64) * 2, torch.rand(3, n, generator=g) < 0.7)
            for n in (9, 4)
        ]
    yield [(torch.rand(3, 4, generator=g, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.bool))]


def by_hand(options, steps):
    value, seen = options["init"], []
    for batches in steps:
        total = sum(float((h * m).sum()) for h, m in batches) / max(sum(int(m.sum()) for _, m in batches), 1)
        up = total <= options["target"]
        value = min(value + options["delta"], options["high"]) if up else max(value - options["delta"], options["low"])
        seen.append((value if up else 0.0, value, total))
    return seen


@pytest.mark.parametrize("options", OPTIONS)
def test_entropy_follows_the_rule(options):
    controller = gk.AdaptiveEntropyController(**options)
    assert controller.coef == 0, "no bonus before the first entropy"
    steps = list(windows(torch.Generator().manual_seed(0)))
    for batches, (coef, value, entropy) in zip(steps, by_hand(options, steps), strict=True):
        before = controller.coef
        for h, m in batches:
            controller.observe(torch.where(m, h, math.nan), m)
            assert controller.coef == before
        assert controller.update() == controller.coef == pytest.approx(coef)
        assert controller.value == pytest.approx(value) and controller.last_entropy == pytest.approx(entropy)


def test_entropy_without_a_mask_uses_every_token():
    controller = gk.AdaptiveEntropyController(target=1.0)
    controller.observe(torch.tensor([0.5, 1.5, 2.5]))
    controller.update()
    assert controller.last_entropy == 1.5


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_entropy_is_trls(options):
    """TRL's _compute_loss over a training run of many windows: the bonus of each micro-batch, and the state."""
    trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="pip install trl==1.16.0")
    from test_oracle_trl import Case, trainer, trl_inputs

    batch, case = make_batch(holes=True), Case(bonus=True, accumulation=2, holes=True)
    me = trainer("grpo", "token", case, (batch.logps, batch.entropy))
    me.use_adaptive_entropy, me._last_world_entropy, me._entropy_window_stats = True, math.inf, None
    me.entropy_coef = options["init"]
    me.args.entropy_target, me.args.entropy_coef_delta = options["target"], options["delta"]
    me.args.entropy_coef_min, me.args.entropy_coef_max = options["low"], options["high"]
    plain = trainer("grpo", "token", Case(accumulation=2, holes=True), (batch.logps, batch.entropy))
    without = trl.GRPOTrainer._compute_loss(plain, None, trl_inputs(batch, case))
    controller = gk.AdaptiveEntropyController(**options)
    applied = []
    for level in (0.5, 1.5, 0.9, 0.8, 0.95, 1.4, 1.4, 0.6, 0.7, 0.8):
        for me.accelerator.sync_gradients in (False, True):
            entropy = level * batch.entropy
            me._get_per_token_logps_and_entropies = lambda *_, h=entropy, **__: (batch.logps, h, None)
            coef = controller.coef
            config = gk.LossConfig.preset("trl_grpo", entropy_coef=coef)
            theirs = trl.GRPOTrainer._compute_loss(me, None, trl_inputs(batch, case)) - without
            ours = gk.policy_loss(
                batch.logps,
                batch.advantages,
                batch.mask,
                entropy=entropy,
                return_entropy=True,
                config=config,
                scale=0.5,
            )
            assert float(ours.metrics["entropy_loss"]) == pytest.approx(float(theirs), abs=1e-12)
            controller.observe(ours.entropy, batch.mask)
            applied.append(coef)
        controller.update()
        assert controller.value == pytest.approx(me.entropy_coef, rel=1e-12)
        assert controller.last_entropy == pytest.approx(me._last_world_entropy, rel=1e-12)
    assert len(set(applied)) >= 3 and 0.0 in applied[2:], "the batch covers too few cases"


def test_entropy_defaults_are_trls():
    config = pytest.importorskip("trl.trainer.grpo_config", reason="pip install trl==1.16.0")
    default = {field.name: field.default for field in dataclasses.fields(config.GRPOConfig)}
    c = gk.AdaptiveEntropyController()
    assert (c.value, c.target, c.delta, c.low, c.high) == tuple(
        default[f"entropy_{name}"] for name in ("coef", "target", "coef_delta", "coef_min", "coef_max")
    )


@pytest.mark.parametrize(
    "options, name",
    [
        ({"init": 2.0}, "init"), ({"init": -0.1}, "init"), ({"low": -1.0}, "low"), ({"low": 0.5, "high": 0.1}, "low"),
        ({"high": math.inf}, "high"), ({"delta": -0.1}, "delta"), ({"target": math.nan}, "target"),
    ],
)  # fmt: skip
def test_entropy_arguments(options, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        gk.AdaptiveEntropyController(**options)


def test_entropy_refuses_invalid_inputs():
    controller = gk.AdaptiveEntropyController()
    with pytest.raises(ValueError, match="needs an observe"):
        controller.update()
    with pytest.raises(ValueError, match=r"\(2, 3\); got \(2,\)"):
        controller.observe(torch.zeros(2, 3), torch.ones(2))
    controller.observe(torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="the mean entropy must be a number; got nan"):
        controller.update()
    assert controller.value == 0 and controller.last_entropy == math.inf


# ---- state ----


def test_state_survives_json_and_continues():
    kl, entropy = gk.AdaptiveKLController(0.1, 0.1, 10), gk.AdaptiveEntropyController(target=1.0, delta=0.1)
    kl.update(5.0, 3)
    entropy.observe(torch.tensor([0.5]))
    entropy.update()
    for trained, fresh in (
        (kl, gk.AdaptiveKLController(1.0, 0.1, 10)),
        (entropy, gk.AdaptiveEntropyController(target=1.0)),
    ):
        fresh.load_state_dict(json.loads(json.dumps(trained.state_dict())))
        assert fresh.state_dict() == trained.state_dict() and fresh.coef == trained.coef != 0
    with pytest.raises(ValueError, match="state must have value, last_entropy; got coef"):
        entropy.load_state_dict(kl.state_dict())
    with pytest.raises(ValueError, match="got nothing"):
        kl.load_state_dict({})
