"""The policy loss once more, written from docs/objectives.md: its terms weighted, added up and counted."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .terms import Array, Term, Terms, Tokens, k3, without

__all__ = ["Array", "Result", "Tokens", "policy_loss"]


class Result(NamedTuple):
    """`*_size`: what a result's summands add up to without their signs, which rounding errors are relative to."""

    loss: Any
    loss_terms: Array  # of the active tokens; the loss is their sum
    d_logp: Array  # [N]
    d_logp_size: Array
    d_entropy: Array
    per_token: Array
    per_token_size: Array
    metrics: dict[str, Any]
    metric_terms: dict[str, Array]  # likewise
    decisions: list[Array]  # every comparison that was made: which branch each token took
    uncertain: bool  # a choice among tokens that are too close to each other


class Evaluation(Terms):
    """The loss, its gradients and its metrics, from the terms."""

    def weights(self, aggregation: str, kept: Array, denominator: float | None) -> Array:
        """Each token's weight in the loss; `kept`: the tokens that count."""
        lengths = self.seqs.each(kept.astype(np.int64))
        if denominator is None:
            sequences = max(self.seqs.count if self.c.count_empty_sequences else int((lengths > 0).sum()), 1)
            denominator = {
                "token_mean": max(int(kept.sum()), 1), "token_sum": 1, "sequence_mean": sequences,
                "sequence_sum": sequences, "fixed_length": sequences * (self.c.max_length or 1),
            }[aggregation]  # fmt: skip
        weight = self.one * (self.number(self.tokens.scale) / self.number(denominator))
        if aggregation == "sequence_mean":
            weight = weight / np.maximum(lengths, 1).astype(self.real)[self.seqs.index]
        if self.tokens.sequence_weights is not None:
            weight = weight * self.tokens.sequence_weights.astype(self.real)[self.seqs.index]
        return weight

    def entropy_weights(self, weights: Array) -> tuple[Array, Array]:
        """The entropy term's weights, and the mask that multiplies it."""
        c, masked = self.c, self.c.entropy_mask_bonus and self.tokens.entropy_mask is not None
        mask = self.mask if masked else self.one
        if c.entropy_aggregation is None and not masked:
            return weights, mask
        denominator = self.tokens.denominator if c.entropy_aggregation is None else None
        return self.weights(c.entropy_aggregation or c.aggregation, mask != 0, denominator), mask

    def run(self) -> Result:
        c, t = self.c, self.tokens
        self.log_ratios()
        policy = getattr(self, c.objective)()
        # What multiplies the policy term: gmpo and vespo have the token weights in their pools, gmpo the mask too.
        outer = {"gmpo": self.one, "vespo": self.mask}.get(c.objective, self.importance * self.mask)
        weights = self.weights(c.aggregation, self.one != 0, t.denominator)
        kl_coef, entropy_coef = self.number(t.kl_coef), self.number(t.entropy_coef)
        kl, kl_ratio, kl_logp = self.kl() if t.has_kl else (self.zero,) * 3
        entropy_weights, bonus_mask = self.entropy_weights(weights)
        bonus = (entropy_coef if t.has_entropy else self.number(0)) * bonus_mask

        value = without(outer, policy.value)
        d_policy = [without(weights, without(outer, d)) for d in (policy.d_ratio, policy.d_logp)]
        d_kl = [without(weights, without(kl_coef, d)) for d in (kl_ratio, kl_logp)]
        if c.objective == "gmpo":  # the value of a sequence, through each of its tokens
            through = without(self.pooled_share, self.seqs.sums(d_policy[0]))
            size = without(self.pooled_share, self.seqs.sums(abs(d_policy[0])))
            d_policy[0], sizes = self.zero, [size, abs(self.through_ratio(d_kl[0]))]
            d_logp = through + self.through_ratio(d_kl[0]) + d_policy[1] + d_kl[1]
        else:
            d_logp = self.through_ratio(d_policy[0] + d_kl[0]) + d_policy[1] + d_kl[1]
            sizes = [self.through_ratio(abs(d_policy[0]) + abs(d_kl[0]))]
        d_logp_size = sum(sizes) + abs(d_policy[1]) + abs(d_kl[1])
        kl_value, bonus_value = without(kl_coef, kl), without(bonus, self.entropy)
        parts = {
            "policy_loss": without(weights, value), "kl_loss": without(weights, kl_value),
            "entropy_loss": -without(entropy_weights, bonus_value),
        }  # fmt: skip
        metrics, terms = self.metrics(parts, policy, kl, self.importance * self.mask)
        in_all = self.everywhere(value + kl_value - bonus_value)
        sizes = self.everywhere(abs(value) + abs(kl_value) + abs(bonus) * (1 + self.entropy) ** 2)
        return Result(
            sum(x.sum() for x in parts.values()), sum(parts.values()), self.everywhere(d_logp),
            self.everywhere(d_logp_size), self.everywhere(-bonus * entropy_weights), in_all, sizes, metrics, terms,
            self.decisions, self.uncertain,
        )  # fmt: skip

    def everywhere(self, x: Array) -> Array:
        out = np.zeros(self.on.shape, self.real)
        out[self.on] = x
        return out

    def metrics(
        self, parts: dict[str, Array], policy: Term, kl: Array, w: Array
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """All metrics; and of those that are sums over tokens the summands."""
        n = len(self.logp)
        moved, drift = self.x, self.logp - self.rollout  # x is clamped
        means = {
            "entropy": self.entropy, "kl": kl, "approx_kl": -moved, "approx_kl_k3": k3(moved),
            "clip_low": policy.low, "clip_high": policy.high, "clip_region": policy.low * self.one + policy.high,
            "clip_cap": policy.cap, "rejected": w == 0, "rollout_kl": -drift, "rollout_kl_k3": k3(drift),
            "rollout_abs_diff": abs(drift), "ratio_mean": self.ratio, "gradient_weight": policy.g, "weight_mean": w,
        }  # fmt: skip
        terms = {**parts, **{name: x * self.one / max(n, 1) for name, x in means.items()}}
        found: dict[str, Any] = {name: x.sum() for name, x in terms.items()}
        if not n:
            found |= {"ratio_mean": 1.0, "gradient_weight": 1.0, "weight_mean": 1.0}
        there = self.seqs.lengths > 0
        shares = [self.seqs.each(x * self.one)[there] / self.seqs.lengths[there] for x in (policy.low, policy.high)]
        squares = (w * w).sum()
        found |= {
            "tokens": n, "ratio_min": self.ratio.min() if n else 1.0, "ratio_max": self.ratio.max() if n else 1.0,
            "weight_min": w.min() if n else 1.0, "weight_max": w.max() if n else 1.0,
            "weight_ess": 1.0 if not n else 0.0 if squares == 0 else w.sum() ** 2 / (n * squares),
            "clip_low_min": shares[0].min() if n else 0.0, "clip_high_max": shares[1].max() if n else 0.0,
        }  # fmt: skip
        return found, terms


def policy_loss(config: Any, tokens: Tokens, logp: Array, entropy: Array | None, real: type = np.float64) -> Result:
    with np.errstate(all="ignore"):
        return Evaluation(config, tokens, logp, entropy, real).run()
