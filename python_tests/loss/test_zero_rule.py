"""The zero rule of docs/objectives.md as one table, (term, what removes it) x (inf, -inf, overflow, NaN): value and
gradient of what is removed are exactly 0, and all others are bitwise those beside a harmless token."""

import itertools
import math

import pytest
import torch
from conftest import BACKENDS_HERE
from forms import OBJECTIVES
from oracle_cases import one_thread as one_thread  # small tensors wait for a second thread longer than they compute

import grpo_kernels as gk
from grpo_kernels import config
from grpo_kernels.config import KL_ESTIMATORS, KL_GRADIENTS, RATIO_LEVELS

INF, NAN = math.inf, math.nan

# A token's log-prob, that of the policy its ratio is taken against, and the reference's.
KINDS = {
    "ratio inf": (-1.0, -INF, -1.0),
    "ratio overflows": (-1.0, -2000.0, -1.0),
    "no probability": (-INF, -1.0, -1.0),
    "hardly any": (-2000.0, -1.0, -1.0),
    "ref -inf": (-1.0, -1.0, -INF),
    "ratio and ref inf": (-1.0, -INF, -INF),
    "0 / 0": (-INF, -INF, -INF),
    "NaN old": (-1.0, NAN, -1.0),
    "NaN ref": (-1.0, -1.0, NAN),
    "NaN": (NAN, -1.0, -1.0),
    "NaN everywhere": (NAN, NAN, NAN),
}
HARMLESS, GOOD = (-1.0, -1.0, -1.0), (-0.5, -0.75, -1.0)
TERMS = {
    **{"clip": {}, "dual": {"dual_clip": 3.0}, "delta": {"delta": 1.5}},
    **OBJECTIVES,
    **{f"{o}-{level}": {"objective": o, "ratio_level": level} for o in ("clip", "cispo", "sapo") for level in RATIO_LEVELS[1:]},
}  # fmt: skip
KL = {f"{k}-{g}": {"kl_estimator": k, "kl_gradient": g} for k, g in itertools.product(KL_ESTIMATORS[1:], KL_GRADIENTS)}


@pytest.fixture(params=BACKENDS_HERE)
def every_backend(request):
    return request.param


def acc_of(backend):
    return torch.float32 if backend in ("cuda", "emulated") else torch.float64


def run(tokens, adv, backend, options=None, **keywords):
    """Loss, per-token loss and gradient of [B, T] tokens, each a triple of KINDS."""
    real = acc_of(backend)
    lp, old, ref = (torch.tensor([[t[i] for t in row] for row in tokens], dtype=real) for i in range(3))
    x = lp.requires_grad_()
    c = gk.LossConfig(**{"aggregation": "token_sum", **(options or {})})
    read = {"old_logps": old, "ref_logps": ref, "rollout_logps": old, **keywords}
    out = gk.policy_loss(x, torch.tensor(adv, dtype=real), config=c, backend=backend, **read)
    return out.loss.detach(), out.per_token_loss, torch.autograd.grad(out.loss, x)[0]


def pools(term):
    o = TERMS[term]
    return config.OBJECTIVES[o.get("objective", "clip")].pooling != "none" or "ratio_level" in o


def of_probability(kinds):
    return [kind for kind in kinds if KINDS[kind][0] == -1.0]


# A triple for each token that is removed, then a good one.


def check_removed(kinds, adv, backend, options, **keywords):
    """All but the last token: their gradients are 0, and everything else is as beside harmless ones. Their per-token
    losses are before aggregation, but after everything else that removes."""
    bad, harmless = [KINDS[kind] for kind in kinds], [HARMLESS for _ in kinds]
    loss, per_token, g = run([[*bad, GOOD]], [[*adv, 2.0]], backend, options, **keywords)
    expected = run([[*harmless, GOOD]], [[*adv, 2.0]], backend, options, **keywords)
    told = list(zip(kinds, adv, g[0].tolist(), per_token[0].tolist(), strict=False))
    assert (g[0, :-1] == 0).all() and (per_token[0, :-1] == expected[1][0, :-1]).all(), told
    assert torch.equal(loss, expected[0]) and torch.equal(g, expected[2]) and g.isfinite().all(), (told, loss, expected)


def check_sequence_removed(kinds, adv, backend, options):
    """By its weight of 0: nothing is left."""
    weights = torch.zeros(1, dtype=acc_of(backend))
    loss, _, g = run(
        [[*(KINDS[kind] for kind in kinds), GOOD]], [[*adv, 2.0]], backend, options, sequence_weights=weights
    )
    assert loss == 0 and (g == 0).all(), (loss, g)


def zeros_then_one(n, backend):
    return torch.tensor([[0.0] * n + [1.0]], dtype=acc_of(backend))


@pytest.mark.parametrize("term", TERMS)
def test_a_policy_term_of_weight_0(every_backend, term):
    """By the mask, the sequence's weight, the token's weight and the mask of the top entropies."""
    objective = TERMS[term].get("objective", "clip")
    kinds = [*KINDS] * 2
    adv = [1.0] * len(KINDS) + [-1.0] * len(KINDS)
    check_removed(kinds, adv, every_backend, TERMS[term], mask=zeros_then_one(len(kinds), every_backend))
    check_sequence_removed(kinds, adv, every_backend, TERMS[term])
    if pools(term) and objective != "gmpo":
        return  # what is pooled is not removed
    if config.OBJECTIVES[objective].selects_tokens:  # by the log-probs of the batch
        kinds = of_probability(KINDS) * 2
        adv = [1.0] * (len(kinds) // 2) + [-1.0] * (len(kinds) // 2)
    off = zeros_then_one(len(kinds), every_backend)
    one_by_one = torch.arange(off.numel()).view(1, -1) % 2 == 0
    halves = [torch.where(one_by_one, off, 1.0), torch.where(one_by_one, 1.0, off)]
    weights = (
        {"entropy_mask": off}
        if objective == "gmpo"
        else dict(zip(("token_weights", "entropy_mask"), halves, strict=True))
    )
    check_removed(kinds, adv, every_backend, TERMS[term], **weights)


@pytest.mark.parametrize("term", [t for t in TERMS if not pools(t) and t not in ("dro", "kl_cov")] + ["gmpo"])
def test_a_policy_term_of_advantage_0(every_backend, term):
    """vespo and the other ratio levels pool the log-ratio of every token, dro and kl_cov have a term without A."""
    options = {**TERMS[term], **({"ratio_sq_coef": 0.0} if term in ("tv_mask", "ipo") else {})}
    kinds = [kind for kind in KINDS if not kind.startswith(("NaN", "0 / 0"))]
    if term == "clip_cov":
        kinds = of_probability(kinds)
    check_removed(kinds, [0.0] * len(kinds), every_backend, options)


@pytest.mark.parametrize("term", TERMS)
def test_a_nan_is_not_hidden(every_backend, term):
    """By no advantage, clip, clamp, cap, trust region or selection. reinforce does not read the old log-prob, and the
    derivatives of it and of dro in the log-prob do not depend on it."""
    if pools(term):
        for adv in (0.0, 1.0, -1.0):
            loss, per_token, _ = run([[KINDS["NaN old"], GOOD]], [[adv, 1.0]], every_backend, TERMS[term])
            assert loss.isnan() and per_token[0, 0].isnan(), (adv, per_token)
        return
    kinds = ["NaN"] if term == "reinforce" else ["NaN old"] if "cov" in term else ["NaN old", "NaN", "NaN everywhere"]
    adv = [a for a in (0.0, 1.0, -1.0) for _ in kinds]
    loss, per_token, g = run([[*(KINDS[kind] for kind in kinds * 3), GOOD]], [[*adv, 1.0]], every_backend, TERMS[term])
    assert loss.isnan() and per_token[0, :-1].isnan().all() and per_token[0, -1].isfinite(), per_token
    assert (term == "reinforce" or g[0, :-1].isnan().all()) and g[0, -1].isfinite(), g


@pytest.mark.parametrize("term", [t for t in TERMS if t not in ("kl_cov", "clip_cov")])
def test_no_metric_counts_a_nan_as_clipped(every_backend, term):
    """It is on no side of a bound."""
    real = acc_of(every_backend)
    x, old = torch.tensor([[-1.0, -0.5, -0.5]], dtype=real), torch.tensor([[NAN, -0.5, -0.5]], dtype=real)
    metrics = gk.policy_loss(
        x, torch.tensor([[1.0, 1.0, -1.0]], dtype=real), old_logps=old, rollout_logps=old, backend=every_backend,
        config=gk.LossConfig(**TERMS[term]),
    ).metrics  # fmt: skip
    assert all(metrics[name] == 0 for name in ("clip_low", "clip_high", "clip_region", "clip_cap"))


# Bounds that are powers of two, and what they leave of a token of log-prob -1 whose ratio is infinite: value, derivative.
BOUNDED = {
    "clip": ({"eps_high": 0.25}, 1.0, -1.25, 0.0),
    "delta": ({"delta": 1.5}, -1.0, 1.5, 0.0),
    "delta above the range": ({"delta": 1.5, "eps_high": 0.25}, 1.0, -1.25, 0.0),
    "dual": ({"dual_clip": 3.0}, -1.0, 3.0, 0.0),
    "cispo": ({"objective": "cispo", "cispo_high": 4.0}, 2.0, 8.0, -8.0),
    "sapo up": ({"objective": "sapo"}, 1.0, -4.0, 0.0),
    "sapo down": ({"objective": "sapo", "sapo_tau_neg": 2.0}, -1.0, 2.0, 0.0),
    "dppo_tv": ({"objective": "dppo_tv"}, 1.0, 0.0, 0.0),
    "dppo_kl": ({"objective": "dppo_kl"}, 1.0, 0.0, 0.0),
    "ratio_cap": ({"objective": "dppo_tv", "ratio_cap": 2.0}, -1.0, -2.0, 2.0),
    "tv_mask": ({"objective": "tv_mask"}, 1.0, 0.0, 0.0),
    "ipo": ({"objective": "ipo"}, -1.0, 0.0, 0.0),
    "log_ratio_clamp": ({"objective": "dro", "dro_beta": 2.0, "log_ratio_clamp": 4.0}, 1.0, 17.0, -1.0),
    "gmpo": ({"objective": "gmpo", "eps_high": 0.0}, 1.0, -1.0, 0.0),
    "clip_cov": ({"objective": "clip_cov", "eps_high": 0.25}, 1.0, -1.25, 0.0),
    "sequence_log_ratio_max": ({"ratio_level": "sequence", "sequence_log_ratio_max": 0.0}, -1.0, 1.0, 0.0),
    "sequence_token, max": ({"ratio_level": "sequence_token", "sequence_log_ratio_max": 0.0}, -1.0, 1.0, 0.0),
    "sequence_product, max": ({"ratio_level": "sequence_product", "sequence_log_ratio_max": 0.0}, -1.0, 1.0, 0.0),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_bound_removes_an_infinite_ratio(every_backend, name):
    options, adv, value, slope = BOUNDED[name]
    for kind in ("ratio inf", "ratio overflows"):
        loss, per_token, g = run([[KINDS[kind]]], [[adv]], every_backend, options)
        assert (loss.item(), per_token.item(), g.item()) == (value, value, slope), kind


@pytest.mark.parametrize("term", ["cispo", "dppo_tv", "dppo_kl", "tv_mask", "clip", "delta"])
def test_a_ratio_of_0_weighs_nothing(every_backend, term):
    """A token of probability 0, and one of next to none: the loss is 0 times an infinite log-prob. clip leaves its
    bound for A < 0."""
    options = {"clip": {"eps_low": 0.5}, "delta": {"eps_low": 0.5, "delta": 4.0}, "cispo": {"objective": "cispo"}}
    options |= {"tv_mask": {"objective": "tv_mask", "tv_low": 2.0}}
    options = options.get(term, {"objective": term, "eps_low": 2.0})
    kinds = ["no probability", "hardly any"] * 2
    _, per_token, g = run([[KINDS[k] for k in kinds]], [[1.0, 1.0, -1.0, -1.0]], every_backend, options)
    left = 0.5 if term in ("clip", "delta") else 0.0
    assert per_token.tolist() == [[0.0, 0.0, left, left]] and (g == 0).all()


# ---- KL ----


def with_kl(name, **options):
    return {"objective": "reinforce", **KL[name], "kl_coef": 0.5, **options}


@pytest.mark.parametrize("name", KL)
def test_a_kl_that_is_removed(every_backend, name):
    """By the mask, the sequence's weight and a tensor of 0; a number of 0 leaves no KL."""
    kinds = list(KINDS)
    adv = [0.0] * len(kinds)
    check_removed(kinds, adv, every_backend, with_kl(name), mask=zeros_then_one(len(kinds), every_backend))
    check_sequence_removed(kinds, adv, every_backend, with_kl(name))
    there = [kind for kind in kinds if not math.isnan(KINDS[kind][0])]  # reinforce reads the log-prob
    zero = torch.zeros((), dtype=acc_of(every_backend))
    check_removed(there, [0.0] * len(there), every_backend, with_kl(name, kl_coef=zero))
    if name == "k3-importance_weighted":
        check_removed(there, [0.0] * len(there), every_backend, with_kl(name, kl_coef=0.0))


@pytest.mark.parametrize("name", KL)
def test_a_clamp_removes_an_infinite_kl(every_backend, name):
    estimator, gradient = KL[name].values()
    kinds = ("ref -inf", "ratio and ref inf", "no probability", "hardly any")
    options = with_kl(name, kl_output_clamp=8.0)
    _, per_token, g = run([[KINDS[kind] for kind in kinds]], [[0.0] * 4], every_backend, options)
    weight = 0.0 if gradient in ("importance_weighted", "behaviour_weighted") else 1.0  # of tokens of probability 0
    sign = -1.0 if estimator == "k1" else 1.0
    assert per_token.tolist() == [[4.0, 4.0, weight * sign * 4.0, weight * sign * 4.0]]
    assert gradient == "straight_through" or (g == 0).all(), g
    if estimator != "k3" and gradient in ("pathwise", "score_function"):
        options = with_kl(name, kl_input_clamp=2.0)
        loss, _, g = run([[KINDS["ref -inf"]]], [[0.0]], every_backend, options)
        assert loss.item() == 1.0 and g.item() == 0


@pytest.mark.parametrize("name", KL)
def test_a_kl_of_0_under_an_infinite_weight(every_backend, name):
    """logp = ref; k1 alone has a slope there, which the weight multiplies."""
    loss, _, g = run([[KINDS["ratio inf"]]], [[0.0]], every_backend, with_kl(name))
    estimator, gradient = KL[name].values()
    slope = 0.0 if estimator != "k1" or gradient == "straight_through" else 0.5
    weighted = gradient in ("importance_weighted", "behaviour_weighted")
    assert loss == 0
    if every_backend != "reference" or not (slope and weighted):  # autograd multiplies that infinity by the KL of 0
        assert g.item() == (INF if slope and weighted else slope)


@pytest.mark.parametrize("name", KL)
def test_a_nan_of_a_kl_is_not_hidden(every_backend, name):
    """By no clamp of its input, of its output or of the log-ratio. k1 and abs have slopes that do not look at it."""
    estimator, gradient = KL[name].values()
    options = {**KL[name], "kl_coef": 0.5, "kl_input_clamp": 2.0, "kl_output_clamp": 1.0, "log_ratio_clamp": 5.0}
    loss, per_token, g = run([[KINDS["NaN ref"], GOOD]], [[0.0, 1.0]], every_backend, options)
    flat = estimator in ("k1", "abs") and gradient == "pathwise"
    assert loss.isnan() and per_token[0, 0].isnan() and (g[0, 0].isnan() or flat) and g[0, 1].isfinite()


# ---- entropy ----

ENTROPIES = {"inf": INF, "-inf": -INF, "NaN": NAN, "overflow": 3e38}


@pytest.mark.parametrize("kind", ENTROPIES)
def test_an_entropy_that_is_removed(every_backend, kind):
    real, mask = acc_of(every_backend), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    x = torch.full((2, 2), -1.0, dtype=real)
    bonus = {"entropy_coef": 0.5, "entropy_mask_bonus": True}
    ways = {  # loss without the bonus of tokens whose entropy is 1, and how many of those there are
        "mask": (bonus, {"mask": mask}, -3.0, 3),
        "entropy_mask": (bonus, {"entropy_mask": mask}, -3.0, 3),
        "sequence_weights": (bonus, {"sequence_weights": mask[:, 0]}, -2.0, 2),
        "coefficient": ({}, {"return_entropy": True}, -4.0, 0),
        "tensor": ({"entropy_coef": torch.zeros((), dtype=real)}, {}, -4.0, 0),
    }
    for way, (options, keywords, loss, bonuses) in ways.items():
        entropy = torch.ones(2, 2, dtype=real)
        entropy[0, 0] = ENTROPIES[kind]
        lp = x.clone().requires_grad_()
        entropy.requires_grad_()
        out = gk.policy_loss(
            lp, torch.ones(2, 2, dtype=real), old_logps=x, entropy=entropy, backend=every_backend,
            config=gk.LossConfig(aggregation="token_sum", **options), **keywords,
        )  # fmt: skip
        g, h = torch.autograd.grad(out.loss, (lp, entropy), allow_unused=True)
        assert out.loss.item() == loss - 0.5 * bonuses, (way, out.loss)
        expected = torch.zeros_like(entropy) if h is None or bonuses == 0 else torch.full_like(entropy, -0.5)
        expected[0] = torch.tensor([0.0, -0.5 * (bonuses == 3)])
        assert h is None or torch.equal(h, expected), (way, h)
        assert g.isfinite().all()


# ---- weights ----


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_a_weight_that_is_removed(every_backend, bad):
    """A sequence's weight by its mask; a token's weight by a mask and by the sequence's weight."""
    real = acc_of(every_backend)
    on, off = [1.0, bad], torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=real)
    token = torch.tensor([[1.0, 1.0], [bad, bad]], dtype=real)
    for keywords in (
        {"sequence_weights": torch.tensor(on, dtype=real), "mask": off},
        {"token_weights": token, "mask": off},
        {"token_weights": token, "entropy_mask": off},
        {"token_weights": token, "sequence_weights": off[:, 0]},
    ):
        loss, _, g = run([[HARMLESS] * 2] * 2, [[1.0] * 2] * 2, every_backend, **keywords)
        assert loss.item() == -2.0 and g.tolist() == [[-1.0, -1.0], [0.0, 0.0]], (keywords, g)


# ---- the critic, advantages, rollout correction ----


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("bad", [INF, -INF, NAN, 3e38])
def test_a_value_that_is_removed(every_backend, bad, which):
    """By a mask and by a scale of 0; a NaN that is neither is not hidden by the clip."""
    tensors = [torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]])]
    tensors[which][0, 0] = bad
    values = tensors[0].requires_grad_()

    def loss(**options):
        out = gk.value_loss(*tensors, backend=every_backend, aggregation="token_sum", **options)
        return out.loss.item(), torch.autograd.grad(out.loss, values)[0].tolist()

    assert loss(mask=torch.tensor([[0, 1]])) == (0.5, [[0.0, 1.0]])
    assert loss(scale=0.0) == (0.0, [[0.0, 0.0]])
    if bad != bad:
        value, ((g, other),) = loss()
        assert value != value and g != g and other == 1


@pytest.mark.parametrize("bad", [INF, -INF, NAN, 3e38])
def test_a_reward_that_is_removed(every_backend, bad):
    """A sample by `valid` and a component by its weight: as if it were not there. A NaN never was."""
    rewards = torch.tensor([1.0, bad, 3.0, 5.0])
    there, alone = torch.tensor([True, False, True, True]), torch.tensor([1.0, 3.0, 5.0])
    for options in ({}, {"scale": "none"}, {"baseline": "leave_one_out", "scale": "mean"}, {"scale": "batch"}):
        expected = gk.group_advantages(alone, group_size=3, backend=every_backend, **options).advantages.tolist()
        for valid in (there, None)[: 1 + (bad != bad)]:
            a = gk.group_advantages(rewards, group_size=4, valid=valid, backend=every_backend, **options).advantages
            assert a.tolist() == [expected[0], 0.0, *expected[1:]], (options, a)
    both = torch.stack([torch.tensor([1.0, 2.0, 3.0, 5.0]), rewards], 1)
    one = gk.group_advantages(both[:, 0].contiguous(), group_size=4, backend=every_backend).advantages
    a = gk.group_advantages(
        both, group_size=4, reward_weights=torch.tensor([1.0, 0.0]), backend=every_backend
    ).advantages
    assert torch.equal(a, one)


def test_a_clip_bounds_an_advantage_that_overflows(every_backend):
    rewards = torch.tensor([3e38, -3e38, 0.0, 0.0])
    a = gk.group_advantages(rewards, group_size=4, scale="none", clip=2.0, backend=every_backend).advantages
    assert a.tolist() == [2.0, -2.0, 0.0, 0.0]


DRIFTS = {
    "inf": (-1.0, -INF),
    "overflow": (-1.0, -2000.0),
    "-inf": (-INF, -1.0),
    "NaN": (-1.0, NAN),
    "0 / 0": (-INF, -INF),
}


@pytest.mark.parametrize("kind", DRIFTS)
def test_a_correction_that_is_removed(kind):
    """Weights of masked and rejected tokens are 0; a bound leaves a number; a NaN is told, as `nan` says."""
    old, rollout = (torch.tensor([[x, -1.0]]) for x in DRIFTS[kind])
    missing = float(math.isnan(DRIFTS[kind][0] - DRIFTS[kind][1]))
    filters = (gk.RejectionFilter("k1", "token", low=-1.0, high=1.0),)
    for options in (
        {"weight": "ratio"},
        {"weight": "truncate", "high": 2.0},
        {"weight": "mask", "low": 0.5, "high": 2.0},
    ):
        masked = gk.rollout_correction(old, rollout, torch.tensor([[0, 1]]), log_clamp=None, **options)
        assert masked.token_weights.tolist() == [[0.0, 1.0]] and masked.metrics["missing_tokens"] == 0
        rejected = gk.rollout_correction(old, rollout, filters=filters, nan="reject", log_clamp=None, **options)
        assert rejected.token_weights.tolist() == [[0.0, 1.0]]
        assert rejected.metrics["missing_tokens"] == missing / 2
    bounded = gk.rollout_correction(old, rollout, weight="truncate", high=2.0, log_clamp=None)
    expected = {"inf": 2.0, "overflow": 2.0, "-inf": 0.0}.get(kind, 1.0)
    assert bounded.token_weights.tolist() == [[expected, 1.0]]


# ---- rows of logits ----

ROWS = {
    "NaN": [NAN, 1.0, 0.0],
    "inf": [0.0, INF, 0.0],
    "-inf": [-INF, 1.0, 0.0],
    "nothing but -inf": [-INF, -INF, -INF],
    "overflow": [-3e38, 3e38, 0.0],
}


@pytest.mark.parametrize("single_pass", [True, False])
def test_a_row_of_logits_that_is_removed(every_backend, single_pass):
    good, n = [0.5, 1.0, 0.0], len(ROWS)
    logits, harmless = torch.tensor([[*ROWS.values(), good]]), torch.tensor([[good] * (n + 1)])
    off, full = torch.tensor([[0.0] * n + [1.0]]), {"entropy_coef": 0.1, "kl_coef": 0.1}
    ways = [
        (full, {"mask": off}),
        (full, {"sequence_weights": torch.zeros(1)}),
        ({}, {"token_weights": off}),
        ({"entropy_coef": 0.1, "entropy_mask_bonus": True}, {"entropy_mask": off}),
    ]
    # torch's own log_softmax multiplies a gradient of 0 by the row's NaN: of the reference's rows the mask alone is kept.
    for options, keywords in ways[:1] if every_backend == "reference" else ways:
        results = []
        for z in (logits, harmless):
            x, other = z.clone().requires_grad_(), torch.full((1, n + 1), -1.5)
            out = gk.grpo_loss(
                x * 1, torch.zeros(1, n + 1, dtype=torch.int64), torch.ones(1), old_logps=other, ref_logps=other,
                config=gk.LossConfig(aggregation="token_sum", eps_high=3.0, **options), single_pass=single_pass,
                backend=every_backend, **keywords,
            )  # fmt: skip
            results.append((out.loss.detach(), torch.autograd.grad(out.loss, x)[0]))
        (loss, g), (expected, expected_g) = results
        assert torch.equal(loss, expected) and torch.equal(g, expected_g), (keywords, loss, expected, g)
        assert (g[0, :-1] == 0).all() and ("sequence_weights" in keywords or g[0, -1].all())


# ---- metrics ----

ONE = {
    "ratio_mean", "ratio_min", "ratio_max", "gradient_weight", "weight_mean", "weight_min", "weight_max", "weight_ess"
}  # fmt: skip


def test_the_metrics_of_nothing(every_backend):
    x = torch.full((2, 3), NAN, dtype=acc_of(every_backend))
    out = gk.policy_loss(
        x, torch.ones(2), torch.zeros(2, 3), old_logps=x, rollout_logps=x, token_weights=x, backend=every_backend
    )
    expected = {name: float(name in ONE) for name in out.metrics}
    assert {name: value.item() for name, value in out.metrics.items()} == expected


def test_a_masked_token_has_log_prob_entropy_and_sum_of_squares_0(every_backend):
    row = torch.full((1, 2, 3), NAN)
    out = gk.token_logps(
        row,
        torch.tensor([[7, 0]]),
        mask=torch.zeros(1, 2),
        return_entropy=True,
        return_sum_p2=True,
        backend=every_backend,
    )
    assert all((x == 0).all() for x in (out.logps, out.entropy, out.sum_p2))
