"""Random calls of the losses and the advantages on every backend, compared with other implementations (fuzz/)."""

import dataclasses
import secrets

import fuzz.__main__ as fuzzing
import numpy as np
import pytest
from conftest import BACKENDS_HERE, TRAVELLING
from fuzz import advantages, compare, oracle
from fuzz.build import build
from fuzz.calls import calls
from hypothesis import HealthCheck, Phase, assume, find, given, settings
from hypothesis.errors import NoSuchExample
from oracle_cases import one_thread as one_thread

pytestmark = pytest.mark.skipif(bool(TRAVELLING), reason="an oracle of its own, not of these backends")
EXAMPLES = {"cpu": 200, "reference": 100, "emulated": 80, "triton": 15}
IN_SOAK = {"triton": 15_000}  # an hour in its interpreter; 20,000 elsewhere
quick = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(params=[name for name in BACKENDS_HERE if name in EXAMPLES])
def every_backend(request):
    return request.param


def test_losses(every_backend):
    counts = fuzzing.fuzz(every_backend, EXAMPLES[every_backend])
    assert counts["compared"] > 5 * counts["undecided"]


@pytest.mark.soak
def test_many_losses(every_backend):
    fuzzing.fuzz(every_backend, IN_SOAK.get(every_backend, 20_000), secrets.randbits(32))


def test_group_advantages(every_backend):
    @settings(max_examples=EXAMPLES[every_backend], **quick)
    @given(advantages.group_calls())
    def every(call):
        assume(call["dtype"] != "float64" or every_backend not in fuzzing.conftest.NO_FLOAT64)
        advantages.check_group(call, every_backend)

    every()


def test_gae(every_backend):
    @settings(max_examples=EXAMPLES[every_backend], **quick)
    @given(advantages.return_calls(8 if every_backend == "triton" else 40))
    def every(call):
        assume(call["dtype"] != "float64" or every_backend not in fuzzing.conftest.NO_FLOAT64)
        advantages.check_gae(call, every_backend)

    every()


# ---- the oracle, and what it notices ----

PATHWISE = ("clip", "sapo", "gmpo", "tv_mask", "ipo", "dro", "reinforce", "clip_cov")


def test_the_oracles_derivative_is_that_of_its_value():
    """By differences, where the loss's gradient is its derivative: no weight without gradient in it."""
    compared = []

    @settings(max_examples=120, **quick)
    @given(calls(("float64",), entries=("policy",)))
    def every(call):
        near = call._replace(extreme="none", distance=min(call.distance, 0.3), given=call.given | {"old"})
        compared.append(differences_agree(near))

    every()
    assert sum(compared) > 10


def differences_agree(call):
    """Whether there was something to compare."""
    b = build(call)
    c = b.config
    pathwise = not c.has_kl or c.kl_gradient in ("pathwise", "importance_weighted", "behaviour_weighted")
    logp, entropy = (np.where(b.tokens.active, compare.numpy(x), 0.0) for x in (b.logps, b.entropy))
    near_0 = (logp[b.tokens.active] > -1e-3).any()
    if c.objective not in PATHWISE or c.ratio_level == "sequence_token" or not pathwise or near_0:
        return False
    exact = oracle.policy_loss(c, b.tokens, logp, entropy)
    for t in np.flatnonzero(b.tokens.active):
        step = np.zeros(len(logp))
        step[t] = 1e-5 * min(1, -logp[t])
        up, down = (oracle.policy_loss(c, b.tokens, logp + s * step, entropy) for s in (1, -1))
        if not all(np.array_equal(*pair) for pair in zip(up.decisions, down.decisions, strict=True)):
            continue  # a kink between them
        slope, size = (up.loss - down.loss) / (2 * step[t]), 1 + exact.d_logp_size[t]
        assert abs(slope - exact.d_logp[t]) <= 1e-5 * size + 1e-10 * abs(exact.loss_terms).sum() / step[t]
    return bool(b.tokens.active.any())


def with_config(**changes):
    """The library is given another config than the oracle."""

    def mutate(call, b):
        changed = {k: v(getattr(b.config, k)) if callable(v) else v for k, v in changes.items()}
        return b._replace(config=dataclasses.replace(b.config, **changed))

    return mutate


def without_argument(name):
    def mutate(call, b):
        return b._replace(arguments={k: v for k, v in b.arguments.items() if k != name})

    return mutate


CALLED_OTHERWISE = {
    "eps_low": with_config(eps_low=lambda eps: eps + 0.01),
    "clamp": with_config(log_ratio_clamp=lambda c: 0.19 if c else 0.5),
    "aggregation": with_config(aggregation="sequence_mean"),
    "entropy_aggregation": with_config(entropy_aggregation="sequence_sum"),
    "entropy_mask_bonus": with_config(entropy_mask_bonus=lambda on: not on),
    "count_empty_sequences": with_config(count_empty_sequences=lambda on: not on),
    "kl_gradient": with_config(kl_gradient="pathwise"),
    **{
        name: without_argument(name)
        for name in ("old_logps", "token_weights", "entropy_mask", "sequence_weights", "denominator", "mask", "scale")
    },
}


def off_by(field, factor):
    def mutate(got):
        value = getattr(got, field)
        return got._replace(**{field: value if value is None else value * factor})

    return mutate


ANSWERED_OTHERWISE = {
    "loss": off_by("loss", 1 + 1e-4),
    "logps": off_by("logps", 1 + 1e-4),
    "entropy": off_by("entropy", 1 + 1e-4),
    "per token": off_by("per_token", 1 + 1e-4),
    "gradient": off_by("gradient", 1.01),
    "head": lambda got: got._replace(of_head=got.of_head and [1.001 * g for g in got.of_head]),
    **{
        name: lambda got, name=name: got._replace(metrics=got.metrics and {**got.metrics, name: got.metrics[name] * 1.001})
        for name in ("kl", "approx_kl_k3", "clip_high", "gradient_weight", "weight_ess")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [*CALLED_OTHERWISE, *ANSWERED_OTHERWISE])
def test_a_change_is_noticed(monkeypatch, name):
    run = compare.run
    if name in CALLED_OTHERWISE:
        monkeypatch.setattr(
            compare, "run", lambda call, b, backend: run(call, CALLED_OTHERWISE[name](call, b), backend)
        )
    else:
        monkeypatch.setattr(compare, "run", lambda call, b, backend: ANSWERED_OTHERWISE[name](run(call, b, backend)))

    def noticed(call):
        try:
            compare.check(call, "cpu")
        except AssertionError:
            return True
        except ValueError:  # a config that there is not
            return False
        return False

    options = settings(max_examples=400, phases=(Phase.generate,), **quick)
    try:
        find(calls(("float32", "float64")), noticed, settings=options)
    except NoSuchExample:
        pytest.fail("no call of 400 notices it")
