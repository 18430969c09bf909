"""Value and derivative follow one branch: between the bounds, exactly at them, and where two branches tie.

Log-probs are multiples of 1/8, so that a log-ratio can equal its bound exactly in float32 and in float64. A bound on
the ratio is the exact value that the backend computes from such a log-ratio.
"""

import itertools
import math

import pytest
import torch
from forms import OBJECTIVES
from oracle_cases import one_thread as one_thread  # torch's float64 exp on two threads is sometimes off by 3e-9

import grpo_kernels as gk
from grpo_kernels.config import KL_ESTIMATORS, KL_GRADIENTS, RATIO_LEVELS

INF = math.inf


def tolerance(acc_dtype):
    return {"rtol": 2e-5, "atol": 1e-6} if acc_dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-13}


# ---- clip, literally ----

LOG_RATIOS = torch.tensor([-1.25, -0.5, -0.25, 0.0, 0.125, 0.375, 0.625, 1.125, 1.5])
SIGNED = torch.tensor([1.5, 0.5, 0.0, -0.5, -1.5])


def ratios(backend, acc_dtype):
    """The backend's own r for each of LOG_RATIOS: -A r with A = -1."""
    old = torch.full_like(LOG_RATIOS, -2.0).to(acc_dtype)
    config = gk.LossConfig(objective="tv_mask", tv_low=2.0, tv_high=2.0)
    logps, adv = (old + LOG_RATIOS.to(acc_dtype))[None], torch.full((1,), -1.0)
    return gk.policy_loss(logps, adv, rollout_logps=old[None], config=config, backend=backend).per_token_loss[0]


def literal_clip(r, a, low, high, delta, dual):
    value = -min(min(r, delta) * a, min(max(r, low), high) * a)
    return min(-dual * a, value) if a < 0 else value


def slope_of(r, a, bounds):
    """d value / d log r: -A r where the ratio itself is the active branch, also exactly at its bound; 0 elsewhere."""
    held = literal_clip(r, a, *bounds) != -r * a
    slope, h = 0.0 if held else -a * r, 1e-6
    sides = [
        (literal_clip(r * math.exp(h * (i + 1)), a, *bounds) - literal_clip(r * math.exp(h * i), a, *bounds)) / h
        for i in (-1, 0)
    ]
    assert min(abs(slope - side) for side in sides) < 1e-4 and abs(slope) >= max(map(abs, sides)) - 1e-4
    return slope, held


# Positions in LOG_RATIOS. A range may end at 1; delta and the dual clip are inside it, at its end or outside it.
RANGES, DELTAS, DUALS = [(2, 3), (3, 5)], [None, 1, 4, 5], [None, 4, 7]


def test_clip_at_every_bound_and_tie(backend, acc_dtype):
    r = ratios(backend, acc_dtype)
    old = torch.full((1, len(SIGNED) * len(r)), -2.0, dtype=acc_dtype)
    adv = SIGNED.to(acc_dtype).repeat_interleave(len(r))[None]
    log_ratios = LOG_RATIOS.to(acc_dtype).repeat(len(SIGNED))[None]

    def at(i):
        return None if i is None else r[i].item()

    for (low, high), delta, dual in itertools.product(RANGES, map(at, DELTAS), map(at, DUALS)):
        bounds = (at(low), at(high), delta or INF, dual or INF)
        config = gk.LossConfig(
            eps_low=1 - at(low), eps_high=at(high) - 1, delta=delta, dual_clip=dual, aggregation="token_sum"
        )
        x = (old + log_ratios).requires_grad_()
        out = gk.policy_loss(x, adv, old_logps=old, config=config, backend=backend)
        (g,) = torch.autograd.grad(out.loss, x)
        cases = [(a, q) for a in SIGNED.tolist() for q in r.tolist()]
        value = torch.tensor([literal_clip(q, a, *bounds) for a, q in cases], dtype=torch.float64)
        slope, held = zip(*(slope_of(q, a, bounds) for a, q in cases), strict=True)
        close = tolerance(acc_dtype)
        torch.testing.assert_close(out.per_token_loss.flatten().double(), value, **close, msg=str(bounds))
        expected = torch.tensor(slope, dtype=torch.float64)
        torch.testing.assert_close(g.flatten().double(), expected, **close, msg=lambda m: f"{bounds} {m}")  # noqa: B023
        check_reports(out.metrics, cases, held, bounds, len(cases), acc_dtype)


def check_reports(metrics, cases, held, bounds, n, acc_dtype):
    """The flags and the gradient weight say which branch was taken; A = 0, where all branches tie, counts as A > 0."""
    low, high, delta, _ = bounds
    weights = [
        0.0 if h or (a == 0 and q > min(delta, max(q, low), high)) else q for (a, q), h in zip(cases, held, strict=True)
    ]
    flags = {
        "clip_low": [h and a < 0 and q < low for (a, q), h in zip(cases, held, strict=True)],
        "clip_high": [h and a > 0 for (a, _), h in zip(cases, held, strict=True)],
        "clip_cap": [h and a < 0 and q >= low for (a, q), h in zip(cases, held, strict=True)],
    }
    for name, flag in flags.items():
        assert round(metrics[name].item() * n, 3) == sum(flag), (name, bounds)
    expected = torch.tensor(sum(weights) / n, dtype=acc_dtype)
    torch.testing.assert_close(metrics["gradient_weight"], expected, rtol=1e-6, atol=0)


# ---- every objective, level and KL form against plain torch in float64 ----

EIGHTHS = torch.arange(-8, 9) / 8


def batch():
    """[8, 8], with A = 0, log-ratios of exactly 0 and of exactly each bound, and sequences whose mean is 0."""
    g = torch.Generator().manual_seed(5)

    def pick(values, *shape):
        return values[torch.randint(len(values), shape, generator=g)].double()

    old = pick(torch.arange(-24, -8) / 8, 8, 8)
    lp = (old + pick(EIGHTHS, 8, 8)).clamp(max=-0.125)
    lp[:2] = old[:2] + pick(EIGHTHS[6:11], 2, 1) * torch.tensor([1.0, -1.0]).repeat(4)  # mean 0
    lp[2] = old[2]
    adv = pick(torch.tensor([-1.5, -0.5, 0.0, 0.5, 2.0]), 8, 8)
    others = {"old": old, "ref": lp + pick(EIGHTHS, 8, 8), "roll": lp - pick(EIGHTHS, 8, 8), "adv": adv}
    return lp, {**others, "w": pick(torch.tensor([0.0, 0.5, 1.0, 2.0]), 8, 8)}


def level_ratio(x, lp, c):
    """The log-ratio at its level, [B, T]."""
    x = x.clamp(-c.get("log_ratio_clamp", INF), c.get("log_ratio_clamp", INF))
    level, cap = c.get("ratio_level", "token"), c.get("sequence_log_ratio_max", INF)
    if level == "token":
        return x
    pooled = x.sum(-1, keepdim=True) if level == "sequence_product" else x.mean(-1, keepdim=True)
    if level == "sequence_token":
        pooled = pooled.detach() + lp - lp.detach()
    return pooled.clamp(max=cap).expand_as(x)


def clip_formula(r, adv, c):
    low, high = 1 - c.get("eps_low", 0.2), 1 + c.get("eps_high", c.get("eps_low", 0.2))
    return -torch.minimum(r.clamp(max=c.get("delta", INF)) * adv, r.clamp(low, high) * adv)


def keeps(c, moved, up, lp, old):
    name = c["objective"]
    if name == "ipo":
        return moved.abs() <= c["tv_high"]
    if name == "tv_mask":
        return torch.where(up, moved <= c["tv_high"], moved >= -c["tv_low"])
    if name == "dppo_tv":
        return torch.where(up, moved <= c["eps_high"], moved >= -c["eps_low"])
    p, q = lp.exp(), old.exp()
    coins = q * (old - lp) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    return torch.where(up, (coins <= c["eps_high"]) | (p <= q), (coins <= c["eps_low"]) | (p >= q))


def gmpo_formula(x, adv, c):
    kept = torch.where(adv > 0, x.clamp(max=c["eps_high"]), x.clamp(min=-c["eps_low"]))
    return (-kept.where(adv != 0, 0).mean(-1, keepdim=True).exp() * adv.mean(-1, keepdim=True)).expand_as(x)


def vespo_formula(x, adv, c):
    w = x.clamp(-20, 20).sum(-1, keepdim=True).clamp(math.log(1e-8), 20).detach()
    pos = w.mul(c["vespo_k_pos"]) + c["vespo_lambda_pos"] * (1 - w.exp())
    return torch.where(adv >= 0, pos, 3 * w + 2 * (1 - w.exp())).exp()


def policy_formula(c, lp, old, roll, adv, **_):
    """The policy term of each token."""
    name, up = c.get("objective", "clip"), adv > 0
    base = roll if name in ("tv_mask", "ipo") else old
    x, moved = level_ratio(lp - base, lp, c), (lp.exp() - base.exp()).detach()
    r = x.exp()
    if name == "clip":
        return clip_formula(r, adv, c)
    if name == "cispo":
        return -r.clamp(c["cispo_low"], c["cispo_high"]).detach() * adv * lp
    if name == "sapo":
        tau = torch.where(up, *(torch.tensor(c[f"sapo_tau_{s}"], dtype=torch.float64) for s in ("pos", "neg")))
        return -4 / tau * torch.sigmoid(tau * (r - 1)) * adv
    if name == "gmpo":
        return gmpo_formula(x, adv, c)
    if name == "vespo":
        return -vespo_formula(x, adv, c) * adv * lp
    if name == "dro":
        return -(adv * lp - c["dro_beta"] * x.square() / 2)
    if name == "kl_cov":
        return -r * adv + c["cov_kl"] * x.abs()
    if name == "clip_cov":
        cov = (adv - adv.mean()) * (lp - lp.mean()).detach()
        free = ~(((r > 1 + c["eps_high"]) & up) | ((r < 1 - 0.2) & (adv < 0)))
        return clip_formula(r, adv, c).where(~(free & (cov > c["cov_low"]) & (cov < c["cov_high"])), 0)
    if name == "reinforce":
        return -adv * lp
    kept = keeps(c, moved, up, lp.detach(), base)
    if name in ("tv_mask", "ipo"):
        return kept * -adv * r + c["ratio_sq_coef"] * x.square()
    return -(kept * r.clamp(max=c["ratio_cap"])).detach() * adv * lp


def kl_formula(c, lp, old, ref, roll, **_):
    u, bound = ref - lp, c.get("kl_input_clamp", INF)
    v = u.clamp(-bound, bound)
    k = {"k1": -v, "abs": v.abs(), "k2": v**2 / 2, "k3": v.exp() - v - 1}[c["kl_estimator"]]
    weight = {
        "importance_weighted": level_ratio(lp - (roll if c.get("objective") in ("tv_mask", "ipo") else old), lp, c), "score_function": lp - lp.detach(),
        "behaviour_weighted": lp - roll,
    }.get(c["kl_gradient"], torch.zeros_like(lp)).exp()  # fmt: skip
    k = (torch.where(u.abs() > bound, weight.detach(), weight) * k).clamp(
        -c.get("kl_output_clamp", INF), c.get("kl_output_clamp", INF)
    )
    return k.detach() + u**2 / 2 - (u**2 / 2).detach() if c["kl_gradient"] == "straight_through" else k


CLOSED = {"eps_low": 0.0, "eps_high": 0.375}
OPTIONS = {
    **OBJECTIVES,
    "clip": CLOSED,
    "clip-delta": {"eps_low": 0.3, "eps_high": 0.5, "delta": 1.2},
    "clip-clamped": {**CLOSED, "log_ratio_clamp": 0.5},
    "gmpo": {"objective": "gmpo", "eps_low": 0.25, "eps_high": 0.125},
    "dppo_tv": {"objective": "dppo_tv", "eps_low": 0.0, "eps_high": 0.0, "ratio_cap": 1.0},
    "dppo_kl": {"objective": "dppo_kl", "eps_low": 0.0, "eps_high": 0.0, "ratio_cap": 1.0},
    "tv_mask": {"objective": "tv_mask", "tv_low": 0.0, "tv_high": 0.0, "ratio_sq_coef": 0.5},
    "ipo": {"objective": "ipo", "tv_high": 0.0, "ratio_sq_coef": 0.25},
    "kl_cov": {"objective": "kl_cov", "cov_ratio": 1.0, "cov_kl": 0.25},
    "clip_cov": {"objective": "clip_cov", "cov_ratio": 1.0, "cov_low": 0.01, "cov_high": 0.3, "eps_high": 0.3, "delta": 1.2},
    **{
        f"{name}-{level}": {**options, "ratio_level": level, "sequence_log_ratio_max": 0.125}
        for (name, options), level in itertools.product(
            {"clip": CLOSED, "cispo": OBJECTIVES["cispo"], "sapo": OBJECTIVES["sapo"]}.items(), RATIO_LEVELS[1:]
        )
    },
}  # fmt: skip
KL = {
    f"{k}-{gradient}": {"kl_estimator": k, "kl_gradient": gradient}
    for k, gradient in itertools.product(KL_ESTIMATORS[1:], KL_GRADIENTS)
}
CLAMPS = {"kl_input_clamp": 0.5, "kl_output_clamp": 0.125}  # k1 and abs of 1/8, k2 of 1/2
SWEPT = {
    **{name: {**o, **kl} for (name, o), kl in zip(OPTIONS.items(), itertools.cycle(KL.values()))},
    **{f"{name}-clamped": {"objective": "reinforce", **o, **CLAMPS} for name, o in KL.items()},
}


@pytest.mark.parametrize("options", SWEPT.values(), ids=SWEPT)
def test_derivative_is_that_of_the_plain_formula(backend, acc_dtype, options):
    lp, o = batch()
    weights = None if options.get("objective") in ("gmpo", "vespo") else o["w"]
    leaf = lp.clone().requires_grad_()
    policy, kl = policy_formula(options, leaf, **o), kl_formula(options, leaf, **o)
    terms = (policy if weights is None else weights * policy) + 0.25 * kl
    (expected,) = torch.autograd.grad(terms.sum(), leaf)
    x = lp.to(acc_dtype).requires_grad_()
    read = {"old_logps": o["old"], "ref_logps": o["ref"], "rollout_logps": o["roll"], "token_weights": weights}
    read = {name: None if v is None else v.to(acc_dtype) for name, v in read.items()}
    config = gk.LossConfig(**options, kl_coef=0.25, aggregation="token_sum")
    out = gk.policy_loss(x, o["adv"].to(acc_dtype), config=config, backend=backend, **read)
    (g,) = torch.autograd.grad(out.loss, x)
    torch.testing.assert_close(out.per_token_loss.double(), terms.detach(), **tolerance(acc_dtype))
    torch.testing.assert_close(g.double(), expected, **tolerance(acc_dtype))


# ---- near 0, where subtracting rounded numbers would leave only their rounding errors ----


def test_k3_of_a_policy_that_has_hardly_moved(backend):
    """e^u - 1 - u is u^2 / 2 here: 5e-9, of which the difference of float32 numbers has three digits."""
    if backend == "reference":
        pytest.skip("eager torch in float32 forms the difference")
    logps = torch.full((1, 4), -1.0, requires_grad=True)
    u = torch.tensor([[1e-4, -1e-4, 3e-3, -0.4]])
    ref = logps.detach() + u
    exact = (ref.double() - logps.detach().double()).expm1() - (ref.double() - logps.detach().double())
    out = gk.policy_loss(logps, torch.zeros(1), ref_logps=ref, config=gk.LossConfig(kl_coef=1.0), backend=backend)
    torch.testing.assert_close(out.per_token_loss.double(), exact, rtol=1e-6, atol=0)
    assert out.metrics["kl"].item() == pytest.approx(exact.mean().item(), rel=1e-6)


def test_the_divergence_of_a_token_that_was_nearly_certain(backend):
    """1 - p of old = -1e-6 is 1e-6, of which 1 - exp(old) in float32 is 1 % off: the bound lies in between."""
    old, logp = torch.tensor([[-1e-6]]), torch.tensor([[-1e-3]], requires_grad=True)
    o, n = old.double(), logp.detach().double()
    other_old, other = -o.expm1(), -n.expm1()
    divergence = (o.exp() * (o - n) + other_old * ((other_old + 1e-8) / (other + 1e-8)).log()).item()
    for bound, dropped in ((divergence * (1 - 3e-5), True), (divergence * (1 + 3e-5), False)):
        config = gk.LossConfig(objective="dppo_kl", eps_low=bound)
        out = gk.policy_loss(logp, torch.tensor([-1.0]), old_logps=old, config=config, backend=backend)
        assert (torch.autograd.grad(out.loss, logp)[0] == 0) == dropped, (bound, divergence)


@pytest.mark.parametrize("old, logp, adv", [(0.0, -1.0, -1.0), (-1.0, 0.0, 1.0)])
def test_the_divergence_of_a_certain_token_is_a_number(backend, old, logp, adv):
    """1 - p is 0 on one side, where 1e-8 is added before the logarithm: 1 and 11, within bounds of 12."""
    x = torch.tensor([[logp]], requires_grad=True)
    config = gk.LossConfig(objective="dppo_kl", eps_low=12.0, eps_high=12.0)
    out = gk.policy_loss(x, torch.tensor([adv]), old_logps=torch.tensor([[old]]), config=config, backend=backend)
    assert torch.autograd.grad(out.loss, x)[0] != 0
    assert out.metrics["clip_region"] == 0
