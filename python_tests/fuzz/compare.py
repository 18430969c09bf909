"""Runs a call and compares it with the oracle by the accuracy rule of grpo_kernels/testing/compare.py, refined.

Ours may err at most twice as far from float64 as the noise of the type: the largest of what the same formulas err in
that type, of what a log-prob's own rounding does to the exact answer, and of one rounding of a 16-bit gradient.
`SLACK` is relative to what the summands add up to without their signs, as nothing promises more where they cancel. A
call whose branches such a rounding may change has no answer to compare with: it is `undecided`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from . import oracle, vocabulary
from .answer import Got, numpy, run
from .build import DTYPES, build
from .calls import Call
from .oracle import Array

# A log-prob is rounded as a sum, a logarithm and a difference; float64 kernels add up in longer chains.
ROUNDINGS = {np.float32: 2, np.float64: 8}
SLACK = {np.float32: 8, np.float64: 64}  # roundings of everything else
FAR = 32  # roundings of a log-prob that may not change a branch
LARGEST = {np.float32: 1e30, np.float64: 1e290}  # beyond which a type's intermediate results may overflow
GRADIENT_LIMIT = {torch.float16: 3e4}


class Undecided(Exception):
    """The call has no answer that every rounding agrees on."""


class Check:
    """Comparisons of one call."""

    def __init__(self, call: Call, backend: str) -> None:
        self.call, self.b, self.backend = call, build(call), backend
        self.dtype = DTYPES[call.dtype]
        self.real, self.wide = (np.float64, np.longdouble) if call.dtype == "float64" else (np.float32, np.float64)
        self.eps = float(np.finfo(self.real).eps)
        self.rounding, self.slack = ROUNDINGS[self.real] * self.eps, SLACK[self.real] * self.eps
        self.skipped: Counter[str] = Counter()

    # ---- the oracle ----

    def evaluations(self) -> None:
        call, b = self.call, self.b
        rng = np.random.default_rng(call.seed + 1)
        if call.entry == "policy":
            logp, entropy = (np.where(b.tokens.active, numpy(x), 0.0) for x in (b.logps, b.entropy))
            if not (b.config.has_entropy or call.single_pass):
                entropy = None
            eager, size = (logp, entropy), np.zeros(len(logp))
        else:
            exact_rows, own = b.rows[self.wide], b.rows[self.real]
            logp, entropy, size = exact_rows.logp, exact_rows.entropy, exact_rows.size
            eager = (own.logp, own.entropy)
        unit = self.rounding * (1 + abs(np.nan_to_num(logp, neginf=0)) + size)
        self.unit = unit
        evaluate = lambda lp, h, real: oracle.policy_loss(b.config, b.tokens, lp, h, real)  # noqa: E731
        self.exact = evaluate(logp, entropy, self.wide)
        self.eager = evaluate(*eager, self.real)
        self.exact_logp, self.exact_entropy = logp, entropy
        signs = [1.0, -1.0, rng.choice([-1.0, 1.0], len(logp))]
        h_unit = None if entropy is None else self.rounding * ((1 + entropy) ** 2 + size) * (call.entry != "policy")
        self.moved = [
            evaluate(
                np.minimum(logp + FAR * s * unit, 0), None if h_unit is None else entropy + FAR * s * h_unit, self.wide
            )
            for s in signs
        ]
        for other in (self.eager, *self.moved):
            same = all(np.array_equal(a, b) for a, b in zip(self.exact.decisions, other.decisions, strict=True))
            if other.uncertain or not same:
                raise Undecided("a branch")

    # ---- comparisons ----

    def check(
        self, what: str, ours: Any, exact: Any, eager: Any, moved: list[Any], size: Any, unit: float = 0.0
    ) -> None:
        """Element by element."""
        ours, exact, eager, size = (np.atleast_1d(np.asarray(x, dtype=self.wide)) for x in (ours, exact, eager, size))
        assert ours.shape == exact.shape, f"{what}: shape {ours.shape}, not {exact.shape}"
        held = np.isfinite(exact) & (abs(exact) < LARGEST[self.real]) & np.isfinite(eager)
        if (np.isfinite(exact) & ~held).any():
            self.skipped[what] += 1
        nan = np.isnan(exact)
        assert (np.isnan(ours) == nan)[held | nan].all(), f"{what}: {ours} where float64 has {exact}"
        with np.errstate(all="ignore"):
            noise = np.maximum(abs(eager - exact), unit * abs(exact))
            for m in moved:
                noise = np.maximum(noise, abs(np.atleast_1d(np.asarray(m, dtype=self.wide)) - exact) / FAR)
            limit = 2 * np.nan_to_num(noise) + self.slack * size + 100 * float(np.finfo(np.float32).tiny)
            wrong = held & ~(abs(ours - exact) <= limit)
        if wrong.any():
            i = tuple(np.argwhere(wrong)[0])
            error = abs(ours[i] - exact[i])
            raise AssertionError(
                f"{what}{list(map(int, i))}: {ours[i]!r}, not {exact[i]!r} (the type's own formulas: {eager[i]!r}); "
                f"error {error:.3g}, limit {limit[i]:.3g}"
            )

    def check_sum(
        self, what: str, ours: Any, exact: Any, eager: Any, terms: Array, moved: list[Array], more: float = 0.0
    ) -> None:
        """A sum over tokens: each may have been rounded in its own direction."""
        with np.errstate(all="ignore"):
            apart = np.max([abs(m - terms) for m in moved], 0, initial=0).sum()
        self.check(what, ours, exact, eager, [exact + apart], abs(terms).sum() + more)

    def check_loss(self, got: Got) -> None:
        e, r, m = self.exact, self.eager, self.moved
        self.check(
            "per_token_loss", got.per_token, e.per_token, r.per_token, [x.per_token for x in m], e.per_token_size
        )
        of_entropy = 0.0 if self.exact_entropy is None else (1 + self.exact_entropy) ** 2
        bonus = float((abs(e.d_entropy) * of_entropy).sum())  # of an entropy's own rounding
        self.check_sum("loss", got.loss, e.loss, r.loss, e.loss_terms, [x.loss_terms for x in m], bonus)
        assert set(got.metrics) == set(e.metrics), set(got.metrics) ^ set(e.metrics)
        for name, value in got.metrics.items():
            what, exact, eager = f"metrics[{name}]", e.metrics[name], r.metrics[name]
            if name in e.metric_terms:
                more = {"entropy": float(np.max(of_entropy, initial=1.0)), "entropy_loss": bonus}.get(name, 0.0)
                if name.endswith("k3"):  # e^x - 1 - x
                    more = abs(e.metric_terms["approx_kl" if name.startswith("approx") else "rollout_kl"]).sum()
                self.check_sum(what, value, exact, eager, e.metric_terms[name], [x.metric_terms[name] for x in m], more)
            elif not np.isnan(exact):  # nobody says what the least of a NaN and a number is
                self.check(what, value, exact, eager, [x.metrics[name] for x in m], abs(exact))

    def check_rows(self, got: Got) -> None:
        b = self.b
        exact, eager = b.rows[self.wide], b.rows[self.real]
        moved = [exact.logp + self.unit * FAR]
        self.check("logps", got.logps, exact.logp, eager.logp, moved, self.unit / self.eps)
        assert (got.logps[np.isfinite(got.logps)] <= 0).all(), "a log-prob above 0"
        size = (1 + exact.entropy) ** 2 + exact.size  # -p log p, where equal p err alike, by 1 - log p
        if got.entropy is not None:
            self.check("entropy", got.entropy, exact.entropy, eager.entropy, [], size)
        if got.sum_p2 is not None:
            self.check("sum_p2", got.sum_p2, exact.sum_p2, eager.sum_p2, [], 1 + exact.size)
        assert not got.logps[~b.tokens.active].any(), "a masked token has a log-prob"
        if got.extra is not None:
            assert not got.extra.any(), "the position past the targets has a gradient"

    def check_gradient(self, got: Got, exact_g: Any, eager_g: Any, moved_g: list[Any]) -> None:
        """Each row by its largest element, and the column of its target on its own. `*_g`: d logp, d entropy, sizes."""
        b = self.b
        exact_rows, own = b.rows[self.wide], b.rows[self.real]
        exact, size = vocabulary.logits_gradient(exact_rows, b.targets, *exact_g)
        eager, _ = vocabulary.logits_gradient(own, b.targets, *eager_g)
        eager = torch.tensor(eager).to(self.dtype).double().numpy()
        moved = [vocabulary.logits_gradient(exact_rows, b.targets, *g)[0] for g in moved_g]
        assert not got.gradient[~b.tokens.active].any(), "a masked token has a gradient"
        if not exact.size:
            return
        if abs(np.nan_to_num(exact)).max() > GRADIENT_LIMIT.get(self.dtype, np.inf):
            self.skipped["gradient"] += 1
            return
        unit = float(torch.finfo(self.dtype).eps) / 2 if self.dtype in (torch.bfloat16, torch.float16) else 0.0
        tiny = 2.0**-24 if self.dtype == torch.float16 else 0.0
        n = np.arange(len(b.targets))
        at = (n, np.clip(b.targets, 0, exact.shape[1] - 1))
        # Infinity times 1 - p: whether that is infinity or NaN hangs on whether p is 1 to the last bit.
        infinite = np.isinf(exact_g[0])
        assert not np.isfinite(got.gradient[at][infinite]).any(), f"gradient: {got.gradient} of an infinite one"
        true, mine = (np.where(infinite, 0, x[at]) for x in (exact, got.gradient))
        self.check(
            "gradient at the target", mine, true, eager[at], [m[at] for m in moved], size[at] + tiny / self.slack, unit
        )
        held = np.isfinite(exact) & np.isfinite(eager)
        assert np.isfinite(got.gradient[held]).all(), f"gradient: {got.gradient} where float64 has {exact}"
        largest = lambda x: np.where(held, abs(x), 0).max(-1)  # noqa: E731
        zero = np.zeros(len(n))
        with np.errstate(all="ignore"):
            errors = [largest(x - exact) for x in (got.gradient, eager)]
            floor = unit * largest(exact)
            self.check(
                "gradient of a row, its error", errors[0], zero, np.maximum(errors[1], floor),
                [largest(m - exact) for m in moved], largest(size) + tiny / self.slack,
            )  # fmt: skip

    def check_linear(self, got: Got, exact_g: Any, eager_g: Any, moved_g: list[Any]) -> None:
        """The gradients of hidden states, weight and bias: products of the logits' gradient, which has an oracle."""
        b = self.b
        exact, size = vocabulary.logits_gradient(b.rows[self.wide], b.targets, *exact_g)
        eager, _ = vocabulary.logits_gradient(b.rows[self.real], b.targets, *eager_g)
        moved = [vocabulary.logits_gradient(b.rows[self.wide], b.targets, *g)[0] for g in moved_g]
        on = b.tokens.active
        weight = b.head[0].double().numpy()
        hidden = b.logits[:, :-1] if self.call.form == "extra" else b.logits
        hidden = np.where(on[:, None], hidden.detach().double().reshape(len(on), weight.shape[1]).numpy(), 0.0)
        assert not got.gradient[~on].any(), "a masked token has a gradient"
        if not np.isfinite(exact).all():
            return  # of a sum with a NaN in it nothing is left
        factors = {"hidden": lambda g, w, h: g @ w, "weight": lambda g, w, h: g.T @ h, "bias": lambda g, w, h: g.sum(0)}
        ours = [got.gradient, *got.of_head]
        for (name, product), mine in zip(factors.items(), ours, strict=False):
            terms = product(size, abs(weight), abs(hidden))
            apart = np.max([product(abs(m - exact), abs(weight), abs(hidden)) for m in moved], 0)
            true = product(exact, weight, hidden)
            self.check(f"gradient of {name}", mine, true, product(eager, weight, hidden), [true + apart], terms)

    def run(self) -> None:
        call, b = self.call, self.b
        if call.entry == "logps":
            self.unit = self.rounding * (
                1 + abs(np.nan_to_num(b.rows[self.wide].logp, neginf=0)) + b.rows[self.wide].size
            )
            got = run(call, b, self.backend)
            self.check_rows(got)
            on = b.tokens.active
            g = [np.where(on, numpy(x), 0) for x in b.upstream]
            g = (*g, abs(g[0]))
            self.check_gradient(got, g, g, [])
            return
        self.evaluations()
        got = run(call, b, self.backend)
        self.check_loss(got)
        up = call.upstream

        with np.errstate(all="ignore"):  # where the derivative is 0 by chance, what a rounding makes of it is not
            apart = np.max([abs(m.d_logp - self.exact.d_logp) for m in self.moved], 0)
        size = (self.exact.d_logp_size + np.nan_to_num(apart, posinf=0)) * abs(up)

        def g(r: oracle.Result) -> tuple[np.ndarray, ...]:
            return r.d_logp * up, r.d_entropy * up, size

        if call.entry == "policy":
            e, r = self.exact, self.eager
            self.check(
                "gradient",
                got.gradient,
                e.d_logp * up,
                r.d_logp * up,
                [m.d_logp * up for m in self.moved],
                size,
            )
            self.check(
                "entropy gradient", got.entropy_gradient, e.d_entropy * up, r.d_entropy * up, [], abs(e.d_entropy * up)
            )
        elif call.entry == "linear":
            self.check_rows(got)
            self.check_linear(got, g(self.exact), g(self.eager), [g(m) for m in self.moved])
        else:
            self.check_rows(got)
            self.check_gradient(got, g(self.exact), g(self.eager), [g(m) for m in self.moved])


def check(call: Call, backend: str, counts: Counter[str] | None = None) -> None:
    """Compares one call; counts what was compared and what had no answer."""
    counts = Counter() if counts is None else counts
    checking = Check(call, backend)
    try:
        checking.run()
    except Undecided:
        counts["undecided"] += 1
        return
    counts["compared"] += 1
    counts[f"{call.entry} {checking.b.config.objective if call.entry != 'logps' else ''}".strip()] += 1
    counts.update({f"skipped, too large for the type: {k}": v for k, v in checking.skipped.items()})
