"""Rollout (off-policy) correction: weights and rejection for tokens that another engine or an older policy sampled."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs.check import check_tensor
from ..inputs.data_parallel import reduced
from ..inputs.layout import Layout, acc_dtype, active_tokens, layout_of
from ..reference import loss as reference
from .config import CorrectionConfig, RejectionFilter

BINARY_EPS = 1e-6  # binary_kl keeps its probabilities this far from 0 and 1, as OpenRLHF does
HUGE = 1e30  # stands for infinity where values are added up, so that opposite ones leave a number


class RolloutCorrection(NamedTuple):
    """What the losses take as `token_weights` and `mask`, and what to log; everything detached.

    `token_weights` has the shape of the tokens and is 0 at masked and rejected ones. `mask` is bool: the tokens that
    count in the loss's denominators. `metrics` are 0-d tensors on the device: no host sync until you read
    them, and finite when nothing is active. Over active tokens, or over rows that have any, with d as clamped by
    `log_clamp`, weights as bounded but not yet normalised, NaN left out of d:

    ========================  ===============================================================================
    weight_mean/min/max/std   of the tokens' weights, before any rejection (mean, min and max 1 when there are none)
    effective_sample_size     (sum w)^2 / (N sum w^2), between 0 and 1
    ratio_low, ratio_high     share of tokens (of rows, where the level is one) with rho below low, above high
    rejected_tokens           share of tokens that a filter, the veto or OPSM rejects
    rejected_rows             share of rows that lose a token to them
    missing_tokens            share of tokens whose d is NaN
    k1, k3                    mean of -d and of e^d - 1 - d: KL(rollout || old)
    ppl_ratio                 mean over rows of exp(mean -d): perplexity of old over that of the sampler
    chi2_token                mean of rho^2, less 1
    chi2_sequence             the same of the row's product
    logp_difference_mean/max  of |d|
    mult_prob_error           mean of e^|d|
    ========================  ===============================================================================
    """

    token_weights: Tensor
    mask: Tensor
    metrics: dict[str, Tensor]


class Tokens(NamedTuple):
    """The active tokens and their rows; [B, T] in, [R] out."""

    layout: Layout
    active: Tensor  # [B, T] bool
    lengths: Tensor  # [R]

    def sums(self, x: Tensor) -> Tensor:
        return reference.sequence_sums(torch.where(self.active, x, 0.0), self.layout)

    def means(self, x: Tensor) -> Tensor:
        return self.sums(x) / self.lengths.clamp(min=1)

    def extremes(self, x: Tensor, which: str) -> Tensor:
        """Each row's "min" or "max"; an infinity where it has no token."""
        outside = float("inf") if which == "min" else float("-inf")
        x = torch.where(self.active, x, outside)
        if self.layout.padded:
            x = torch.nn.functional.pad(x, (0, 1), value=outside)  # a row may have no token at all
            return x.amin(-1) if which == "min" else x.amax(-1)
        index = self.layout.sequence_index(x.device)
        rows = x.new_full((self.layout.sequences + 1,), outside)
        return rows.scatter_reduce(0, index, x[0], f"a{which}")[:-1]

    def reduced(self, x: Tensor, reduction: str) -> Tensor:
        if reduction in ("min", "max"):
            return self.extremes(x, reduction)
        return self.sums(x) if reduction == "sum" else self.means(x)

    def mean(self, x: Tensor) -> Tensor:
        """Over all active tokens of [B, T], or over the rows that have any of [R]; 0 without."""
        return _mean(x, self.units(x))

    def units(self, x: Tensor) -> Tensor:
        return self.active if x.dim() == 2 else self.lengths > 0


def _mean(x: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, x, 0.0).sum() / where.sum().clamp(min=1)


def rollout_correction(
    old_logps: Tensor,
    rollout_logps: Tensor,
    mask: Tensor | None = None,
    *,
    logps: Tensor | None = None,
    advantages: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: CorrectionConfig | None = None,
    dp_group: Any = None,
    **changes: Any,
) -> RolloutCorrection:
    """Importance weights ``bounded(exp(old - rollout))`` and rejection of what lies too far off the policy.

    The sampler's log-probs differ from the trainer's own (other kernels, other precision, older weights); this is what
    TRL's ``vllm_importance_sampling_*``, verl's ``rollout_correction``, OpenRLHF's and NeMo-RL's TIS, IcePop and
    seq-mask-TIS, slime's MIS and OPSM compute. Truncated importance sampling: Yao et al., "Your efficient RL framework
    secretly brings you off-policy RL training" (2025). Computed in float64 (float32 where a device has none), waiting
    for no device::

        c = rollout_correction(old_logps, rollout_logps, mask, config=CorrectionConfig.preset("verl_token_is"))
        policy_loss(logps, advantages, c.mask, old_logps=old_logps, token_weights=c.token_weights)

    Args:
        old_logps: ``[B, T]``, or ``[N]`` packed; the training engine's log-probs of the sampled tokens, nats.
        rollout_logps: per token, the sampler's.
        mask: per token, any dtype, 0 masks: nothing of a masked token is read, NaN included.
        logps: per token, of the current policy; read by OPSM.
        advantages: per token or sequence (where N = R, per token); read by OPSM.
        cu_seqlens: ``[R + 1]`` int, the boundaries of packed sequences; needed with ``[N]``.
        config: ``CorrectionConfig()`` when None: weights of 1, metrics only.
        dp_group: process group over which ``batch_normalise`` takes its mean; metrics stay this rank's.
        changes: fields of ``CorrectionConfig`` that replace the config's: ``weight="truncate", high=2.0``.

    Returns:
        RolloutCorrection(token_weights, mask, metrics); float32, float64 for float64 log-probs.

    Raises:
        ValueError: for shapes that do not fit, tensors that OPSM lacks, and configs that make no sense.
        TypeError: for unknown ``changes``.
    """
    config = config or CorrectionConfig()
    if changes:
        config = dataclasses.replace(config, **changes)
    check_tensor("old_logps", old_logps, kind="float")
    layout = layout_of(old_logps.shape, cu_seqlens, old_logps.device)
    if not layout.knows_sequences:
        raise ValueError(f"flat tokens need cu_seqlens, their sequences' boundaries; got shape {tuple(layout.shape)}")
    wide = torch.float32 if old_logps.device.type == "mps" else torch.float64
    old, rollout = _read(layout, old_logps, "old_logps", wide), _read(layout, rollout_logps, "rollout_logps", wide)
    active = active_tokens(mask, layout, old.device)
    tokens = Tokens(layout, active, layout.sequence_sums(active))

    d, missing = difference(old, rollout, tokens, config), active & (old - rollout).isnan()
    ratio, weights = importance_weights(d, tokens, config)
    keep = torch.ones_like(active)
    for f in _filters(config):
        keep = keep & kept(f, d, old, rollout, tokens, config)
    if config.opsm_delta is not None:
        keep = keep & kept_by_opsm(old, rollout, logps, advantages, tokens, config)
    metrics = correction_metrics(d, missing, ratio, weights, keep, tokens, config)
    if config.batch_normalise:
        weights = normalised(weights, tokens, dp_group)
    dtype, counted = acc_dtype(old_logps.dtype), active & keep
    given = mask is not None and mask.dtype == torch.bool and layout.padded  # `active` is the caller's own memory
    return RolloutCorrection(
        torch.where(counted, _spread(weights, layout), 0.0).to(dtype).reshape(layout.shape),
        (counted if config.renormalise else active.clone() if given else active).reshape(layout.shape),
        {name: value.to(dtype) for name, value in metrics.items()},
    )


def _read(layout: Layout, x: Tensor | None, name: str, dtype: torch.dtype) -> Tensor:
    check_tensor(name, x)
    values = layout.tokens(x, name, dtype, "float")
    assert values is not None
    return values


def _spread(x: Tensor, layout: Layout) -> Tensor:
    return x if x.dim() == 2 else layout.of_sequences(x)


def difference(a: Tensor, b: Tensor, tokens: Tokens, c: CorrectionConfig) -> Tensor:
    """a - b, 0 at masked tokens; a NaN is 0 too, or stays, to reject whatever it meets."""
    d = torch.where(tokens.active, a - b, 0.0)
    return d if c.nan == "reject" else torch.where(d.isnan(), 0.0, d).clamp(-HUGE, HUGE)


def clamped(d: Tensor, c: CorrectionConfig) -> Tensor:
    return d if c.log_clamp is None else d.clamp(-c.log_clamp, c.log_clamp)


def importance_weights(d: Tensor, tokens: Tokens, c: CorrectionConfig) -> tuple[Tensor, Tensor]:
    """rho at its level and the weight made of it, [B, T] or [R]."""
    x = d if c.level == "token" else tokens.reduced(d, c.level.removeprefix("sequence_"))
    ratio = clamped(x, c).exp()
    if c.weight == "none":
        weights = torch.ones_like(ratio)
    elif c.weight == "ratio":
        weights = ratio
    elif c.weight == "mask":
        weights = torch.where(_within(ratio, *weight_bounds(c)), ratio, 0.0)
    else:
        weights = ratio.clamp(*weight_bounds(c))
    if c.nan == "reject":
        weights = torch.where(ratio.isfinite(), weights, 0.0)
    return ratio, weights


def weight_bounds(c: CorrectionConfig) -> tuple[float, float]:
    return float("-inf") if c.low is None else c.low, float("inf") if c.high is None else c.high


def _within(x: Tensor, low: float, high: float) -> Tensor:
    return (x >= low) & (x <= high)


def normalised(weights: Tensor, tokens: Tokens, dp_group: Any) -> Tensor:
    """Divided by their mean over active tokens (or rows), of all ranks; all 0 stay 0."""
    units = tokens.units(weights)
    totals = torch.stack([torch.where(units, weights, 0.0).sum(), units.sum().to(weights.dtype)])
    total, count = reduced(totals, dp_group).unbind()
    mean = total / count.clamp(min=1)
    return weights / torch.where(mean > 0, mean, 1.0)


# ---- rejection ----


def _filters(c: CorrectionConfig) -> tuple[RejectionFilter, ...]:
    return c.filters if c.veto is None else (*c.filters, RejectionFilter("ratio", "min", low=c.veto))


def kept(f: RejectionFilter, d: Tensor, old: Tensor, rollout: Tensor, tokens: Tokens, c: CorrectionConfig) -> Tensor:
    """[B, T] bool. Comparisons with NaN are false, so it rejects."""
    if f.statistic == "ratio":
        x = d  # against the bounds' logarithms, where nothing overflows and no clamp is needed
    elif f.statistic == "mult_prob_error":
        x = clamped(d, c).abs().exp()
    elif f.statistic == "tv":
        x = difference(old.exp(), rollout.exp(), tokens, c).abs()
    elif f.statistic == "binary_kl":
        x = binary_kl(old, rollout, tokens, c)
    else:
        x = reference.kl_estimate(f.statistic, clamped(d, c))  # of KL(rollout || old): u = old - rollout
    if f.reduction == "token":
        return _within(x, *f.bounds)
    return tokens.layout.of_sequences(_within(tokens.reduced(x, f.reduction), *f.bounds))


def binary_kl(old: Tensor, rollout: Tensor, tokens: Tokens, c: CorrectionConfig) -> Tensor:
    """KL(rollout || old) of the two outcomes "this token" and "any other"; a NaN is as `difference` treats it."""
    p, q = (x.exp().clamp(BINARY_EPS, 1 - BINARY_EPS) for x in (rollout, old))
    return difference(p * (p / q).log(), (1 - p) * ((1 - q) / (1 - p)).log(), tokens, c)


def kept_by_opsm(
    old: Tensor, rollout: Tensor, logps: Tensor | None, advantages: Tensor | None, tokens: Tokens, c: CorrectionConfig
) -> Tensor:
    """A >= 0, or the row's mean of behaviour - current is at most delta."""
    if logps is None or advantages is None:
        missing = " and ".join(name for name, x in (("logps", logps), ("advantages", advantages)) if x is None)
        raise ValueError(f"opsm_delta needs logps and advantages; {missing} is None")
    layout, behaviour = tokens.layout, rollout if c.opsm_behaviour == "rollout" else old
    gap = difference(behaviour, _read(layout, logps, "logps", old.dtype), tokens, c)
    a = layout.tokens_or_sequences(advantages, "advantages", old.dtype)
    return (a >= 0) | layout.of_sequences(tokens.means(gap) <= c.opsm_delta)  # type: ignore[operator]


# ---- metrics ----


def correction_metrics(
    d: Tensor, missing: Tensor, ratio: Tensor, weights: Tensor, keep: Tensor, tokens: Tokens, c: CorrectionConfig
) -> dict[str, Tensor]:
    scored = tokens.active & ~missing
    d = torch.where(scored, d, 0.0)
    totals, x, low, high = tokens.sums(d), clamped(d, c), *weight_bounds(c)
    lost = tokens.active & ~keep
    rejected_rows = tokens.sums(lost.to(d.dtype)) > 0
    return {
        **_weight_metrics(_spread(weights, tokens.layout), tokens.active),
        "ratio_low": tokens.mean((ratio < low).to(d.dtype)),
        "ratio_high": tokens.mean((ratio > high).to(d.dtype)),
        "rejected_tokens": tokens.mean(lost.to(d.dtype)),
        "rejected_rows": tokens.mean(rejected_rows.to(d.dtype)),
        "missing_tokens": tokens.mean(missing.to(d.dtype)),
        "k1": _mean(reference.kl_estimate("k1", x), scored),
        "k3": _mean(reference.kl_estimate("k3", x), scored),
        "ppl_ratio": _one_if(~tokens.active.any(), tokens.mean(clamped(-tokens.means(d), c).exp())),
        "chi2_token": _mean(torch.expm1(2 * x), scored),
        "chi2_sequence": tokens.mean(torch.expm1(2 * clamped(totals, c))),
        "logp_difference_mean": _mean(x.abs(), scored),
        "logp_difference_max": torch.cat([x.abs().flatten(), x.new_zeros(1)]).amax(),
        "mult_prob_error": _one_if(~scored.any(), _mean(x.abs().exp(), scored)),
    }


def _one_if(condition: Tensor, x: Tensor) -> Tensor:
    return torch.where(condition, 1.0, x)


def _weight_metrics(w: Tensor, active: Tensor) -> dict[str, Tensor]:
    none, infinity = ~active.any(), w.new_full((1,), float("inf"))
    mean, square = _mean(w, active), _mean(w.square(), active)
    share = torch.where(square > 0, mean.square() / square, 0.0)
    return {
        "weight_mean": _one_if(none, mean),
        "weight_min": _one_if(none, torch.cat([torch.where(active, w, infinity).flatten(), infinity]).amin()),
        "weight_max": _one_if(none, torch.cat([torch.where(active, w, -infinity).flatten(), -infinity]).amax()),
        "weight_std": _mean((w - mean).square(), active).sqrt(),
        "effective_sample_size": _one_if(none, share),
    }
