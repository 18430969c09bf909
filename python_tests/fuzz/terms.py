"""The terms of the policy loss in numpy, with the derivatives of the tables in docs/objectives.md.

It takes nothing of the library but the fields of LossConfig. Everything is a flat array of tokens, each with the number
of its sequence; masked tokens are dropped at the start, so no formula below knows a mask. In float64 it is the exact
answer; in float32 it is what the same formulas give anyone who evaluates them in that type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Tokens(NamedTuple):
    """[N] arrays of the tokens, active ones and others, in the order of the caller's."""

    active: Array  # bool
    sequence: Array  # int: the sequence of each token, below `sequences`
    sequences: int
    advantages: Array
    old: Array | None = None
    ref: Array | None = None
    rollout: Array | None = None
    token_weights: Array | None = None
    entropy_mask: Array | None = None
    sequence_weights: Array | None = None  # [sequences]
    denominator: float | None = None
    scale: float = 1.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    has_kl: bool = False
    has_entropy: bool = False
    random_order: Array | None = None  # [N] of clip_cov: it picks the largest of these


class Term(NamedTuple):
    """A policy term: value, derivative in the log-ratio at its level, derivative in the log-prob itself, and the weight
    g whose gradient is -g A; which tokens count as clipped."""

    value: Array
    d_ratio: Array
    d_logp: Array
    g: Array
    low: Array
    high: Array
    cap: Array


def without(weight: Array, x: Array) -> Array:
    """weight * x; a weight of 0 removes whatever x is."""
    return np.where(weight == 0, 0, weight * x)


def k3(u: Array) -> Array:
    """e^u - 1 - u, of infinity infinity."""
    return np.expm1(u) - np.where(u == np.inf, 0, u)


def times(a: Array, b: Array) -> Array:
    """a * b; 0 * inf is 0, and a NaN stays."""
    return np.where(((a == 0) & np.isinf(b)) | (np.isinf(a) & (b == 0)), 0, a * b)


class Sequences:
    """Sums over sequences, given back to each of their tokens."""

    def __init__(self, index: Array, count: int) -> None:
        self.index, self.count = index, count
        self.lengths = np.bincount(index, minlength=count)[:count]

    def each(self, x: Array) -> Array:
        out = np.zeros(self.count, x.dtype)
        for i in range(self.count):
            out[i] = x[self.index == i].sum()
        return out

    def sums(self, x: Array) -> Array:
        return self.each(x)[self.index]

    def means(self, x: Array) -> Array:
        return (self.each(x) / np.maximum(self.lengths, 1).astype(x.dtype))[self.index]


class Terms:
    """One evaluation of a config on the active tokens, in one floating type."""

    def __init__(self, config: Any, tokens: Tokens, logp: Array, entropy: Array | None, real: type) -> None:
        on = tokens.active
        self.c, self.tokens, self.real, self.on = config, tokens, real, on
        self.decisions: list[Array] = []
        self.uncertain = False

        def given(x: Array | None, default: Array) -> Array:
            return default if x is None else x[on].astype(real)

        self.logp = logp[on].astype(real)
        self.one, self.zero = np.ones_like(self.logp), np.zeros_like(self.logp)
        self.adv = tokens.advantages[on].astype(real)
        self.rollout = given(tokens.rollout, self.logp)
        against_rollout = config.objective in ("tv_mask", "ipo")
        self.old = self.rollout if against_rollout else given(tokens.old, self.logp)
        self.ref = given(tokens.ref, self.zero)
        self.importance = given(tokens.token_weights, self.one)
        self.mask = given(tokens.entropy_mask, self.one)
        self.entropy = self.zero if entropy is None else entropy[on].astype(real)
        self.seqs = Sequences(tokens.sequence[on], tokens.sequences)

    def number(self, x: float) -> Any:
        return self.real(x)

    def decide(self, condition: Array) -> Array:
        self.decisions.append(np.asarray(condition))
        return condition

    # ---- ratios ----

    def log_ratios(self) -> None:
        """x of each token, and the log-ratio at its level with what it passes of a gradient."""
        c, x = self.c, self.logp - self.old
        self.x_passes = self.one != 0
        if c.log_ratio_clamp is not None:
            bound = self.number(c.log_ratio_clamp)
            self.x_passes = ~self.decide(abs(x) > bound)
            x = np.clip(x, -bound, bound)
        self.x, self.log_ratio, self.passes = x, x, self.x_passes
        if c.ratio_level != "token":
            pooled = self.seqs.sums(x) if c.ratio_level == "sequence_product" else self.seqs.means(x)
            self.passes = self.one != 0
            if c.sequence_log_ratio_max is not None:
                bound = self.number(c.sequence_log_ratio_max)
                self.passes = ~self.decide(pooled > bound)
                pooled = np.minimum(pooled, bound)
            self.log_ratio = pooled
        self.ratio = np.exp(self.log_ratio)

    def through_ratio(self, d: Array) -> Array:
        """d loss / d log-ratio of each token, as d loss / d logp of each token."""
        level = self.c.ratio_level
        if level == "token":
            return np.where(self.x_passes, d, 0)
        d = np.where(self.passes, d, 0)
        if level == "sequence_token":
            return d
        shared = self.seqs.sums(d) if level == "sequence_product" else self.seqs.means(d)
        return np.where(self.x_passes, shared, 0)

    # ---- objectives ----

    def term(self, value: Array, d_ratio: Array | None, d_logp: Array | None, g: Array, **clipped: Array) -> Term:
        none = self.zero != 0
        flags = [clipped.get(name, none) for name in ("low", "high", "cap")]
        zero = self.zero
        return Term(value, zero if d_ratio is None else d_ratio, zero if d_logp is None else d_logp, g, *flags)

    def score(self, weight: Array, **clipped: Array) -> Term:
        """-sg(weight) A lp."""
        slope = times(self.adv, -weight)
        return self.term(times(slope, self.logp), None, slope, weight, **clipped)

    def clip(self) -> Term:
        c, r, adv = self.c, self.ratio, self.adv
        low = self.number(1 - c.eps_low)
        high = self.number(1 + (c.eps_low if c.eps_high is None else c.eps_high))
        delta = self.number(np.inf if c.delta is None else c.delta)
        dual = self.number(np.inf if c.dual_clip is None else c.dual_clip)
        up = np.minimum(np.minimum(r, delta), high)
        down = np.minimum(np.maximum(np.minimum(r, delta), np.clip(r, low, high)), dual)
        bounded = np.where(adv < 0, down, up)
        for bound in (low, high, delta, dual):
            self.decide(r > bound)
        held = (r < bounded) | (r > bounded)
        g = np.where(held, 0, r)
        return self.term(
            -bounded * adv, -g * adv, None, g, low=(r < low) & (adv < 0), high=(r > np.minimum(high, delta)) & (adv > 0),
            cap=(r > np.minimum(np.maximum(high, delta) if c.delta is not None else np.inf, dual)) & (adv < 0),
        )  # fmt: skip

    def cispo(self) -> Term:
        c, r = self.c, self.ratio
        low, high = self.number(-np.inf if c.cispo_low is None else c.cispo_low), self.number(c.cispo_high)
        below, above, up = self.decide(r < low), self.decide(r > high), self.adv > 0
        weight = np.minimum(np.maximum(r, low), high)
        return self.score(weight, low=below, high=above & up, cap=above & ~up)

    def sapo(self) -> Term:
        c, r, adv = self.c, self.ratio, self.adv
        tau = np.where(adv > 0, self.number(c.sapo_tau_pos), self.number(c.sapo_tau_neg))
        shut = 1 / (1 + np.exp(tau * (r - 1)))
        gate = 1 / (1 + np.exp(-tau * (r - 1)))
        g = np.where(shut == 0, 0, 4 * gate * shut * r)
        return self.term(-4 / tau * gate * adv, -g * adv, None, g)

    def gmpo(self) -> Term:
        c, x, adv = self.c, self.x, self.adv
        low, high = self.number(c.eps_low), self.number(c.eps_low if c.eps_high is None else c.eps_high)
        above, below = self.decide((adv > 0) & (x > high)), self.decide((adv < 0) & (x < -low))
        bounded = np.where(above, high, np.where(below, -low, x))
        bounded = np.where((adv == 0) & ~np.isnan(x), 0, bounded)  # a NaN is not hidden
        if np.isnan(bounded[adv == 0]).any():
            self.uncertain = True  # the value is NaN; the derivative is 0 in the kernels and NaN by autograd
        counted = np.maximum(self.seqs.sums(self.mask), 1)
        pooled = self.seqs.sums(without(self.mask, bounded)) / counted
        weight = np.exp(pooled)
        if self.tokens.token_weights is not None:
            weight = weight * np.exp(self.seqs.means(np.log(self.importance + self.number(1e-10))))
        mean_adv = self.seqs.means(adv)
        value = times(mean_adv, -weight)
        self.pooled_share = np.where(above | below | (adv == 0) | ~self.x_passes, 0, self.mask / counted)
        return self.term(value, value, None, weight, low=below, high=above)

    def vespo(self) -> Term:
        c, up = self.c, self.adv >= 0
        k = np.where(up, self.number(c.vespo_k_pos), self.number(c.vespo_k_neg))
        lam = [self.number(max(x, 1e-4)) for x in (c.vespo_lambda_pos, c.vespo_lambda_neg)]
        lam = np.where(up, *lam)
        least, most = self.number(np.log(1e-8)), self.number(20)
        each = np.clip(self.x, -most, most) + np.clip(np.log(self.importance), least, most)
        log_w = np.clip(self.seqs.sums(each), least, most)
        phi = np.exp(lam + k * log_w - lam * np.exp(log_w))
        return self.score(np.where(np.isfinite(phi) | np.isnan(log_w), phi, 0))  # a NaN is not hidden

    def reinforce(self) -> Term:
        return self.score(self.one)

    def dppo(self, outside_up: Array, outside_down: Array) -> Term:
        up = self.adv > 0
        drop = np.where(up, outside_up, outside_down)
        cap = self.number(np.inf if self.c.ratio_cap is None else self.c.ratio_cap)
        capped = self.decide(self.ratio > cap)
        weight = np.where(drop, 0, np.minimum(self.ratio, cap))
        return self.score(weight, low=drop & ~up, high=drop & up, cap=~drop & capped)

    def dppo_tv(self) -> Term:
        low, high = self.number(self.c.eps_low), self.eps_high()
        moved = np.exp(self.logp) - np.exp(self.old)
        return self.dppo(self.decide(moved > high), self.decide(moved < -low))

    def dppo_kl(self) -> Term:
        p, q, tiny = np.exp(self.old), np.exp(self.logp), self.number(1e-8)
        p_other, q_other = -np.expm1(self.old), -np.expm1(self.logp)
        divergence = times(p, self.old - self.logp) + p_other * np.log((p_other + tiny) / (q_other + tiny))
        grows, shrinks = self.decide(q > p), self.decide(q < p)
        far_up = self.decide(~(divergence <= self.eps_high()))
        far_down = self.decide(~(divergence <= self.number(self.c.eps_low)))
        return self.dppo(far_up & grows, far_down & shrinks)

    def eps_high(self) -> Any:
        return self.number(self.c.eps_low if self.c.eps_high is None else self.c.eps_high)

    def trust_region(self, drop: Array) -> Term:
        up, square = self.adv > 0, self.number(self.c.ratio_sq_coef)
        weight = np.where(drop, 0, self.ratio)
        policy = times(self.adv, -weight)
        x = self.log_ratio
        return self.term(
            policy + without(square, x * x),
            policy + without(2 * square, x),
            None,
            weight,
            low=drop & ~up,
            high=drop & up,
        )

    def tv_mask(self) -> Term:
        moved = np.exp(self.logp) - np.exp(self.old)
        above, below = (
            self.decide(moved > self.number(self.c.tv_high)),
            self.decide(moved < -self.number(self.c.tv_low)),
        )
        return self.trust_region(np.where(self.adv > 0, above, below))

    def ipo(self) -> Term:
        moved = np.exp(self.logp) - np.exp(self.old)
        return self.trust_region(self.decide(abs(moved) > self.number(self.c.tv_high)))

    def dro(self) -> Term:
        beta, x = self.number(self.c.dro_beta), self.log_ratio
        return self.term(times(-self.adv, self.logp) + beta * x * x / 2, beta * x, -self.adv, self.one)

    def covariances(self) -> Array:
        return (self.adv - self.adv.mean()) * (self.logp - self.logp.mean())

    def picked(self, candidates: Array, order: Array, near: float) -> Array:
        """The cov_ratio N candidates that come first by `order`; at least one."""
        wanted = max(int(np.floor(self.number(self.c.cov_ratio) * len(order))), 1)
        chosen = self.zero != 0
        found = np.flatnonzero(candidates)
        if np.isnan(order[found]).any():  # a log-prob of -inf leaves no covariance to sort by
            self.uncertain = True
        by_order = found[np.argsort(-order[found], kind="stable")]
        chosen[by_order[:wanted]] = True
        if len(by_order) > wanted and order[by_order[wanted - 1]] - order[by_order[wanted]] <= near:
            self.uncertain = True
        return chosen

    def clip_cov(self) -> Term:
        c, term = self.c, self.clip()
        if not len(self.logp):
            return term
        cov = self.covariances()
        inside = self.decide(cov > self.number(c.cov_low)) & self.decide(cov < self.number(c.cov_high))
        free = ~((self.ratio < self.number(1 - c.eps_low)) & (self.adv < 0))
        free &= ~((self.ratio > 1 + self.eps_high()) & (self.adv > 0))
        assert self.tokens.random_order is not None
        drop = self.picked(inside & free, self.tokens.random_order[self.on], 0.0)
        value, d, g = (np.where(drop, 0, x) for x in (term.value, term.d_ratio, term.g))
        return term._replace(value=value, d_ratio=d, g=g, cap=term.cap | drop)

    def kl_cov(self) -> Term:
        r, x, coef = self.ratio, self.log_ratio, self.number(self.c.cov_kl)
        picked = self.zero != 0
        if len(x):
            cov = self.covariances()
            picked = self.picked(self.one != 0, cov, 1e-4 * float(abs(cov).max()))
        policy = times(self.adv, -r)
        slope = np.where(picked, coef * np.sign(x), 0)
        self.decide(np.where(picked, np.sign(x), 0))
        return self.term(policy + without(slope, x), policy + slope, None, r, cap=picked)

    # ---- KL to the reference ----

    def estimate(self, u: Array) -> tuple[Array, Array, Array]:
        """The estimator, its derivative in logp, and their sum: the derivative of exp(lp - sg lp) times it."""
        name = self.c.kl_estimator
        if name == "k1":
            return -u, self.one, 1 - u
        if name == "abs":
            return abs(u), -np.sign(self.decide(np.sign(u)) * self.one), abs(u) - np.sign(u)
        if name == "k2":
            return u * u / 2, -u, u * u / 2 - u
        return k3(u), -np.expm1(u), -u

    def kl(self) -> tuple[Array, Array, Array]:
        """Value, derivative in the log-ratio, derivative in logp."""
        c, raw = self.c, self.ref - self.logp
        u, held = raw, self.zero != 0
        if c.kl_input_clamp is not None:
            bound = self.number(c.kl_input_clamp)
            held = self.decide(abs(raw) > bound)
            u = np.clip(raw, -bound, bound)
        value, d_logp, score = self.estimate(u)
        d_ratio = self.zero
        if c.kl_gradient == "importance_weighted":
            value, d_logp = times(value, self.ratio), times(d_logp, self.ratio)
            d_ratio = value
        elif c.kl_gradient == "behaviour_weighted":
            weight = np.exp(self.logp - self.rollout)
            value, d_logp = times(value, weight), times(score, weight)
        elif c.kl_gradient == "score_function":
            d_logp = score
        if c.kl_output_clamp is not None:
            bound = self.number(c.kl_output_clamp)
            held = held | self.decide(abs(value) > bound)
            value = np.clip(value, -bound, bound)
        d_ratio, d_logp = np.where(held, 0, d_ratio), np.where(held, 0, d_logp)
        return value, d_ratio, -raw if c.kl_gradient == "straight_through" else d_logp
