"""Log-probs, entropy and their gradient in the logits, in numpy, written from docs/objectives.md."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .terms import Array, without


class Rows(NamedTuple):
    """Per row: log-prob of the target, entropy, sum p^2; and what the gradient in the logits is made of."""

    logp: Array
    entropy: Array
    sum_p2: Array
    log_p: Array  # [N, V]
    slope: Array  # [N, V]: d z / d logit
    slope_size: Array  # 1 - tanh^2, added up
    size: Array  # [N]: numbers whose rounding errors are in z, beside z - max itself


def rows(
    logits: Array,
    logits_size: Array | float,
    targets: Array,
    active: Array,
    temperature: Array,
    scale: float,
    softcap: float | None,
    real: type,
) -> Rows:
    """z = softcap(scale * logit) / temperature, and its log-softmax. Rows that are not active are all 0. `logits_size`:
    what rounding errors of the logits themselves are relative to."""
    with np.errstate(all="ignore"):
        raw = np.where(active[:, None], logits, 0).astype(real)
        t = np.where(active, temperature, 1).astype(real)[:, None]
        bent, size = np.ones_like(raw), np.zeros_like(raw) + logits_size * real(scale) / t
        if softcap is None:  # a softmax does not see a constant; what scales it may overflow
            raw = (raw - raw.max(-1, keepdims=True)) * real(scale)
        else:
            squashed = np.tanh(raw * real(scale) / real(softcap))
            raw, bent = real(softcap) * squashed, 1 - squashed * squashed
            size = size + abs(raw) / t
        z = (raw - raw.max(-1, keepdims=True)) / t
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        p = np.exp(log_p)
        logp = log_p[np.arange(len(targets)), np.where(active, targets, 0)]
        entropy = -np.where(p == 0, 0, p * log_p).sum(-1)
        stats = (np.where(active, x, 0) for x in (logp, entropy, (p * p).sum(-1)))
        slopes = bent * real(scale) / t, (2 - bent) * real(scale) / t
        return Rows(*stats, log_p, *slopes, np.where(active, size.max(-1), 0).astype(np.float64))


def logits_gradient(
    r: Rows, targets: Array, d_logp: Array, d_entropy: Array, d_logp_size: Array
) -> tuple[Array, Array]:
    """slope * (g (1[j = y] - p_j) - h p_j (log p_j + H)), [N, V], and what its summands add up to without signs."""
    with np.errstate(all="ignore"):
        p = np.exp(r.log_p)
        at = (np.arange(len(targets)), np.clip(targets, 0, p.shape[1] - 1))  # an illegal target is a masked one
        of_logp = -p
        of_logp[at] = -np.expm1(r.log_p[at])
        of_entropy = -np.where(p == 0, 0, p * (r.log_p + r.entropy[:, None]))
        rounding = np.where(p == 0, 0, p * (1 + abs(r.log_p) + r.size[:, None]))  # p as the exponential of a number
        size_of_logp, size_of_entropy = (
            abs(of_logp) + rounding,
            np.where(p == 0, 0, rounding * (1 + abs(r.log_p) + r.entropy[:, None])),
        )
        gradient = r.slope * (without(d_logp[:, None], of_logp) + without(d_entropy[:, None], of_entropy))
        sizes = without(abs(d_logp_size)[:, None], size_of_logp), without(abs(d_entropy)[:, None], size_of_entropy)
        return gradient, r.slope_size * (sizes[0] + sizes[1])
