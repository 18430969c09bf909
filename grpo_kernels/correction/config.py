"""What a rollout correction is: importance weights, filters that reject tokens and rows, and the trainers' presets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..inputs.check import check_choice, check_number

WEIGHTS = ("none", "ratio", "truncate", "clip", "mask")
LEVELS = ("token", "sequence_sum", "sequence_mean")
STATISTICS = ("ratio", "k1", "k2", "k3", "mult_prob_error", "tv", "binary_kl")
REDUCTIONS = ("token", "sum", "mean", "min", "max")
NANS = ("ignore", "reject")
BEHAVIOURS = ("rollout", "old")


def _require(legal: bool, what: str, *got: object) -> None:
    if not legal:
        raise ValueError(f"{what}; got {', '.join(map(repr, got))}")


@dataclass(frozen=True)
class RejectionFilter:
    """Keeps a token, or a row, iff ``low <= reduction(statistic) <= high``; None is no bound.

    Args:
        statistic: of a token, with ``d = old - rollout``: ``"ratio"`` ``e^d``; ``"k1"`` ``-d``, ``"k2"`` ``d^2/2``,
            ``"k3"`` ``e^d - 1 - d``, estimates of KL(rollout || old); ``"mult_prob_error"`` ``e^|d|``; ``"tv"``
            ``|e^old - e^rollout|``; ``"binary_kl"`` ``p log(p/q) + (1 - p) log((1 - p)/(1 - q))`` with
            ``p = e^rollout`` and ``q = e^old``, each within ``[1e-6, 1 - 1e-6]`` (OpenRLHF): KL(rollout || old) of
            "this token or another".
        reduction: ``"token"`` filters each token by itself; ``"sum"``, ``"mean"``, ``"min"`` and ``"max"`` over a row's
            tokens filter rows. Of the ratio, sum and mean are taken in logarithms: their product and geometric mean.
        low, high: bounds on the statistic itself. verl's bounds of ``k1`` are exponentials: its ``seq_mean_k1`` with
            ``"0.5_2"`` is ``RejectionFilter("k1", "mean", low=math.log(0.5), high=math.log(2))``.

    Raises:
        ValueError: for unknown names, the sum of mult_prob_error, no bound at all, and bounds out of order or that the
            statistic cannot reach.
    """

    statistic: str
    reduction: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        check_choice("statistic", self.statistic, STATISTICS)
        check_choice("reduction", self.reduction, REDUCTIONS)
        counts_tokens = (self.statistic, self.reduction) == (
            "mult_prob_error",
            "sum",
        )  # each is 1 where nothing differs
        _require(not counts_tokens, "mult_prob_error has no 'sum', it grows with the row; take 'mean'", self.reduction)
        _check_bounds(self.low, self.high, signed=self.statistic == "k1")
        _require(self.low is not None or self.high is not None, "a filter needs low or high", self.low, self.high)

    @property
    def bounds(self) -> tuple[float, float]:
        """In the unit that is compared: a ratio's are logarithms."""
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        return (_log(low), _log(high)) if self.statistic == "ratio" else (low, high)


def _log(x: float) -> float:
    return x if x == math.inf else math.log(x) if x > 0 else -math.inf


def _check_bounds(low: float | None, high: float | None, signed: bool = False) -> None:
    number = "a finite number"
    if low is not None:
        check_number("low", low, lambda x: signed or x >= 0, number if signed else f"{number}, at least 0")
    if high is not None:
        check_number("high", high, lambda x: signed or x > 0, number if signed else f"{number} above 0")
    if low is not None and high is not None:
        _require(low <= high, "low must be at most high", low, high)


@dataclass(frozen=True)
class CorrectionConfig:
    """How the mismatch between the sampler and the training engine is corrected, ``d = old - rollout``, ``rho = e^d``.

    Args:
        weight: of a token: ``"none"`` 1; ``"ratio"`` rho; ``"truncate"`` ``min(rho, high)`` (TIS); ``"clip"``
            ``clamp(rho, low, high)``; ``"mask"`` rho within ``[low, high]``, else 0 (IcePop).
        level: whose rho: the ``"token"``'s, or one per row: ``"sequence_sum"`` ``exp(sum_t d)``, ``"sequence_mean"``
            ``exp(mean_t d)`` (geometric mean). For long rollouts take ``"sequence_mean"``: a sum grows with the length,
            so that a drift of 3.5e-4 a token gives a sequence of 8192 tokens the weight 1/17.
        low, high: bounds of the weight. A weight outside is not a rejection: the mask never changes for it.
        filters: every ``RejectionFilter`` must keep a token for it to be kept; each may be a dict of its arguments, as
            ``dataclasses.asdict`` and JSON give it.
        veto: drops each row in which any token's rho lies below this.
        opsm_delta: off-policy sequence mask (DeepSeek-V3.2, arXiv:2512.02556): drops tokens with ``A < 0`` of rows
            whose mean ``behaviour - logps`` exceeds it.
        opsm_behaviour: ``"rollout"`` (TRL, the paper) or ``"old"`` (slime).
        log_clamp: d, or its sum or mean over the row, is clamped to +- this before it is exponentiated; the statistics
            k1, k2, k3 and mult_prob_error see the token's clamped d.
        nan: a token whose old or rollout log-prob is NaN (the sampler gave none): ``"ignore"`` takes d = 0 there (TRL);
            ``"reject"`` gives weight 0 to it, or to its row where the level is one, as to an infinite rho (NeMo-RL),
            and every filter over it rejects.
        batch_normalise: divides the weights by their mean over active tokens, or over rows for a row's weights (verl).
        renormalise: False: rejected tokens get weight 0 and stay in the mask, so the loss's denominator stays; True:
            they leave the mask too (verl, slime's MIS).

    Raises:
        ValueError: for unknown names, numbers out of range, bounds that the weight needs or ignores, and options
            that nothing reads.
    """

    weight: str = "none"
    level: str = "token"
    low: float | None = None
    high: float | None = None
    filters: tuple[RejectionFilter, ...] = ()
    veto: float | None = None
    opsm_delta: float | None = None
    opsm_behaviour: str = "rollout"
    log_clamp: float | None = 20.0
    nan: str = "ignore"
    batch_normalise: bool = False
    renormalise: bool = False

    def __post_init__(self) -> None:
        check_choice("weight", self.weight, WEIGHTS)
        check_choice("level", self.level, LEVELS)
        check_choice("nan", self.nan, NANS)
        check_choice("opsm_behaviour", self.opsm_behaviour, BEHAVIOURS)
        filters = (RejectionFilter(**f) if isinstance(f, dict) else f for f in self.filters)
        object.__setattr__(self, "filters", tuple(filters))
        if not all(isinstance(f, RejectionFilter) for f in self.filters):
            raise TypeError(f"filters must be RejectionFilter objects; got {self.filters!r}")
        _check_bounds(self.low, self.high)
        if self.veto is not None:
            check_number("veto", self.veto, lambda x: 0 < x < 1, "between 0 and 1, or None")
        if self.opsm_delta is not None:
            check_number("opsm_delta", self.opsm_delta, lambda x: x >= 0, "at least 0, or None")
        if self.log_clamp is not None:
            check_number("log_clamp", self.log_clamp, lambda x: x > 0, "above 0, or None")
        _check_weight(self)
        _check_unread(self)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CorrectionConfig:
        """A trainer's own correction, by name (see ``CORRECTION_PRESETS``), with ``changes`` to any field.

        Raises:
            ValueError: if there is no preset of that name.
        """
        if name not in CORRECTION_PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(sorted(CORRECTION_PRESETS))}")
        return cls(**{**CORRECTION_PRESETS[name], **changes})

    @classmethod
    def from_verl(
        cls,
        rollout_is: str | None = None,
        rollout_is_threshold: float | str = 2.0,
        rollout_is_batch_normalize: bool = False,
        rollout_rs: str | None = None,
        rollout_rs_threshold: float | str | None = None,
    ) -> CorrectionConfig:
        """verl's RolloutCorrectionConfig, in its own words and strings: ``("token", "0.5_5.0")`` is IcePop.

        verl's bounds of k1 are ratios, whose logarithms bound ``-d``: ``"0.5_1.5"`` keeps ``log 0.5 <= -d <= log 1.5``,
        that is ``1 / 1.5 <= rho <= 2``. Bounds that are not each other's reciprocals are therefore mirrored on rho; for
        bounds of rho itself use ``RejectionFilter("ratio", ...)``.

        Raises:
            ValueError: for names and thresholds that verl does not know either.
        """
        options: dict[str, Any] = {}
        if rollout_is is not None:
            check_choice("rollout_is", rollout_is, ("token", "sequence"))
            low, high = _interval(rollout_is_threshold)
            options = {"weight": "truncate" if low is None else "mask", "low": low, "high": high}
            options |= {"level": "token" if rollout_is == "token" else "sequence_sum"}
            options |= {"batch_normalise": rollout_is_batch_normalize}
        if rollout_rs is not None:
            names = [name.strip() for name in rollout_rs.split(",")]
            specs = str(rollout_rs_threshold).split(",")
            _require(len(specs) in (1, len(names)), f"rollout_rs_threshold must be 1 or {len(names)} values", specs)
            specs = specs * len(names) if len(specs) == 1 else specs
            options["filters"] = [_verl_filter(*option) for option in zip(names, specs, strict=True)]
            options["renormalise"] = True
        return cls(**options)


_VERL_FILTERS = {
    f"{prefix}_{k}": (k, reduction)
    for prefix, reduction in (("token", "token"), ("seq_sum", "sum"), ("seq_mean", "mean"), ("seq_max", "max"))
    for k in ("k1", "k2", "k3")
    if (prefix, k) != ("seq_max", "k1")
}


def _verl_filter(name: str, spec: str) -> RejectionFilter:
    check_choice("rollout_rs", name, tuple(_VERL_FILTERS))
    (statistic, reduction), (low, high) = _VERL_FILTERS[name], _interval(spec)
    if statistic == "k1":
        return RejectionFilter(statistic, reduction, math.log(1 / high if low is None else low), math.log(high))
    _require(low is None, f"the threshold of {name} must be one number", spec)
    return RejectionFilter(statistic, reduction, high=high)


def _interval(spec: float | str) -> tuple[float | None, float]:
    """ "low_high", or the upper bound alone."""
    try:
        bounds = [float(part) for part in str(spec).split("_")]
    except ValueError:
        bounds = []
    _require(len(bounds) in (1, 2) and min(bounds, default=0) > 0, "a threshold must be 'low_high' or one number", spec)
    return (None if len(bounds) == 1 else bounds[0]), bounds[-1]


def _check_weight(c: CorrectionConfig) -> None:
    bounds = c.low, c.high
    if c.weight in ("none", "ratio"):
        _require(bounds == (None, None), f"weight={c.weight!r} reads no low and no high", *bounds)
    elif c.weight == "truncate":
        legal = c.low is None and c.high is not None
        _require(legal, "weight='truncate' needs high and no low (that of 'clip' and 'mask')", *bounds)
    else:
        _require(bounds != (None, None), f"weight={c.weight!r} needs low, high or both", *bounds)


def _check_unread(c: CorrectionConfig) -> None:
    """An option that nothing reads is a mistake of the caller's, not a detail to drop."""
    if c.weight == "none":
        _require(c.level == "token", "level is used by a weight only, not by weight='none'", c.level)
        _require(not c.batch_normalise, "batch_normalise needs a weight other than 'none'", c.batch_normalise)
    if c.opsm_delta is None:
        _require(c.opsm_behaviour == "rollout", "opsm_behaviour is read with opsm_delta only", c.opsm_behaviour)
    rejects = c.filters or c.veto is not None or c.opsm_delta is not None
    _require(bool(rejects) or not c.renormalise, "renormalise needs filters, a veto or opsm_delta", c.renormalise)


_TRL: dict[str, Any] = {"high": 3.0, "log_clamp": None}  # vllm_importance_sampling_clip_max
_OPENRLHF: dict[str, Any] = {"low": 0.5, "high": 5.0}  # is_correction_threshold
_VERL_GEO: dict[str, Any] = {
    "filters": (RejectionFilter("k1", "mean", math.log(0.999), math.log(1.001)),), "renormalise": True,
}  # fmt: skip
_VERL_K3: dict[str, Any] = {"filters": (RejectionFilter("k3", "mean", high=0.01),), "renormalise": True}
_TOKEN_TIS: dict[str, Any] = {"weight": "truncate", "high": 2.0}
_SEQUENCE_TIS: dict[str, Any] = {**_TOKEN_TIS, "level": "sequence_sum"}
_MIS: dict[str, Any] = {"veto": 1e-4, "renormalise": True}
_NEMO: dict[str, Any] = {"log_clamp": None, "nan": "reject"}

# Each equals the trainer's own defaults; where it has none, its recipes'.
CORRECTION_PRESETS: dict[str, dict[str, Any]] = {
    # TRL vllm_importance_sampling_mode; sequence_mask is its default. Add opsm_delta for off_policy_mask_threshold.
    "trl_token_truncate": {**_TRL, "weight": "truncate"},
    "trl_token_mask": {**_TRL, "weight": "mask"},
    "trl_sequence_truncate": {**_TRL, "weight": "truncate", "level": "sequence_sum"},
    "trl_sequence_mask": {**_TRL, "weight": "mask", "level": "sequence_sum"},
    # verl RolloutCorrectionConfig's decoupled_* recipes; its strings go through CorrectionConfig.from_verl.
    "verl_token_is": _TOKEN_TIS,
    "verl_seq_is": _SEQUENCE_TIS,
    "verl_token_icepop": {"weight": "mask", "low": 0.5, "high": 5.0},
    "verl_seq_is_rs": {
        **_SEQUENCE_TIS, "filters": (RejectionFilter("k1", "sum", math.log(0.5), math.log(2.0)),), "renormalise": True,
    },
    "verl_geo_rs": _VERL_GEO,
    "verl_geo_rs_token_tis": {**_VERL_GEO, **_TOKEN_TIS},
    "verl_geo_rs_seq_tis": {**_VERL_GEO, **_SEQUENCE_TIS},
    "verl_k3_rs": _VERL_K3,
    "verl_k3_rs_token_tis": {**_VERL_K3, **_TOKEN_TIS},
    "verl_k3_rs_seq_tis": {**_VERL_K3, **_SEQUENCE_TIS},
    # OpenRLHF is_correction_type.
    "openrlhf_tis": {**_OPENRLHF, "weight": "clip"},
    "openrlhf_icepop": {**_OPENRLHF, "weight": "mask"},
    "openrlhf_seq_mask_tis": {
        "weight": "ratio", "filters": (RejectionFilter("ratio", "mean", **_OPENRLHF),), "log_clamp": None,
    },
    # slime use_tis, its IcePop function and use_opsm; then its mismatch helper (mis_mode at mis_level "token").
    "slime_tis": {**_TOKEN_TIS, "log_clamp": None},
    "slime_icepop": {"weight": "mask", "high": 2.0, "log_clamp": None},
    "slime_opsm": {"opsm_delta": 1e-4, "opsm_behaviour": "old"},
    "slime_mis_truncate": {**_MIS, **_TOKEN_TIS},
    "slime_mis_clip": {**_MIS, "weight": "clip", "low": 0.5, "high": 2.0},
    "slime_mis_mask": {**_MIS, "weight": "ratio", "filters": (RejectionFilter("ratio", "token", 0.5, 2.0),)},
    # NeMo-RL truncated_importance_sampling_type and seq_logprob_error_threshold.
    "nemo_tis": {**_NEMO, "weight": "truncate", "high": 5.0},
    "nemo_icepop": {**_NEMO, "weight": "mask", "low": 0.5, "high": 5.0},
    "nemo_seq_mask_tis": {**_NEMO, "weight": "ratio", "filters": (RejectionFilter("ratio", "mean", 0.999, 1.002),)},
    "nemo_logprob_error": {
        **_NEMO, "filters": (RejectionFilter("mult_prob_error", "mean", high=2.0),), "renormalise": True,
    },
    # prime-rl's masks of late 2025, its ratio weight included; its later ones are objectives of the loss.
    "prime_masks": {
        "weight": "ratio", "log_clamp": None,
        "filters": (
            RejectionFilter("ratio", "token", 0.125, 8.0),
            RejectionFilter("ratio", "mean", 0.1, 10.0),
            RejectionFilter("ratio", "max", high=100.0),
        ),
    },
}  # fmt: skip
