"""What a loss is: its form (which code runs) and its scalars (numbers that may change every step)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from .coefficients import ComparesTensorsById, check_coefficient
from .presets import PRESETS

# Every name that selects code; the positions are the enumerators of csrc/math/policy.h.
RATIO_LEVELS = ("token", "sequence", "sequence_token", "sequence_product")
KL_ESTIMATORS = ("none", "k1", "abs", "k2", "k3")
KL_GRADIENTS = ("pathwise", "straight_through", "importance_weighted", "score_function", "behaviour_weighted")
ADVANTAGES = ("given", "centred", "normalised")  # the last two: made of rewards in the loss's own launch
AGGREGATIONS = ("token_mean", "token_sum", "sequence_mean", "sequence_sum", "fixed_length")

# Sums of the token kernel, in the order of `Metric` in csrc/math/tokens.h; described in policy.LossOutput.
METRICS = (
    "policy_loss", "kl_loss", "entropy_loss", "tokens", "entropy", "kl", "approx_kl", "approx_kl_k3",
    "ratio_mean", "ratio_min", "ratio_max", "clip_low", "clip_high", "clip_region", "clip_cap", "clip_low_min",
    "clip_high_max", "gradient_weight", "rejected", "weight_mean", "weight_min", "weight_max", "weight_ess",
    "rollout_kl", "rollout_kl_k3", "rollout_abs_diff",
)  # fmt: skip

_BOUNDS = frozenset({"eps_low", "eps_high"})
_CAPS = frozenset({"delta", "dual_clip"})
VESPO_MIN_LAMBDA = 1e-4


class Objective(NamedTuple):
    """What the library must know of an objective in addition to its formula."""

    options: frozenset[str] = frozenset()  # those of LossConfig that it uses, in addition to log_ratio_clamp
    ratio_levels: tuple[str, ...] = ("token",)  # one alone: the objective defines its own ratio
    pooling: str = "none"  # of a sequence's log-ratios, "mean" or "sum": one weight per sequence, from all its tokens
    ratio_against: str = "old"  # or "rollout": the sampler's log-probs
    selects_tokens: bool = False  # by their covariance over the batch, before the loss


# In the order of the enumerators of csrc/math/policy.h.
OBJECTIVES: dict[str, Objective] = {
    "clip": Objective(_BOUNDS | _CAPS, RATIO_LEVELS),
    "cispo": Objective(frozenset({"cispo_low", "cispo_high"}), RATIO_LEVELS),
    "sapo": Objective(frozenset({"sapo_tau_pos", "sapo_tau_neg"}), RATIO_LEVELS),
    "gmpo": Objective(_BOUNDS, pooling="mean"),
    "vespo": Objective(
        frozenset({"vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"}), pooling="sum"
    ),
    "reinforce": Objective(),
    "dppo_tv": Objective(_BOUNDS | {"ratio_cap"}),
    "dppo_kl": Objective(_BOUNDS | {"ratio_cap"}),
    "tv_mask": Objective(frozenset({"tv_low", "tv_high", "ratio_sq_coef"}), ratio_against="rollout"),
    "ipo": Objective(frozenset({"tv_high", "ratio_sq_coef"}), ratio_against="rollout"),
    "dro": Objective(frozenset({"dro_beta"})),
    "clip_cov": Objective(_BOUNDS | _CAPS | {"cov_ratio", "cov_low", "cov_high"}, selects_tokens=True),
    "kl_cov": Objective(frozenset({"cov_ratio", "cov_kl"}), selects_tokens=True),
}
_OWN_OPTIONS: tuple[str, ...] = tuple(sorted(set().union(*(o.options for o in OBJECTIVES.values()))))


class Form(NamedTuple):
    """Choices that change the code of a kernel: a template argument, a Triton constexpr."""

    objective: str
    ratio_level: str
    kl_estimator: str
    kl_gradient: str
    advantages: str = "given"

    @property
    def token_local(self) -> bool:
        """Whether a token's derivative needs that token alone, so that one launch can write the logits' gradient."""
        return self.pooling == "none" and not OBJECTIVES[self.objective].selects_tokens

    @property
    def pooling(self) -> str:
        """How the log-ratios of a sequence are pooled, "none", "mean" or "sum": Form::pooling in csrc/math/policy.h."""
        if (own := OBJECTIVES[self.objective].pooling) != "none" or self.ratio_level == "token":
            return own
        return "sum" if self.ratio_level == "sequence_product" else "mean"

    @property
    def codes(self) -> list[int]:
        names = (tuple(OBJECTIVES), RATIO_LEVELS, KL_ESTIMATORS, KL_GRADIENTS, ADVANTAGES)
        return [names.index(chosen) for names, chosen in zip(names, self, strict=True)]


class Scalars(NamedTuple):
    """Numbers a kernel reads at run time; infinity where there is no bound."""

    eps_low: float
    eps_high: float
    ratio_low: float  # 1 - eps_low, as float64 rounds it
    ratio_high: float
    delta: float
    dual_clip: float
    cispo_low: float
    cispo_high: float
    sapo_tau_pos: float
    sapo_tau_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    ratio_cap: float
    tv_low: float
    tv_high: float
    ratio_sq_coef: float
    dro_beta: float
    cov_kl: float
    log_ratio_clamp: float
    sequence_log_ratio_max: float
    kl_coef: float  # NaN where a tensor holds it
    kl_input_clamp: float
    kl_output_clamp: float
    entropy_coef: float  # likewise


def _bound(value: float | torch.Tensor | None) -> float:
    if isinstance(value, torch.Tensor):
        return math.nan  # so that a kernel that ignores the tensor is noticed
    return math.inf if value is None else value


@dataclass(frozen=True, eq=False, repr=False)
class LossConfig(ComparesTensorsById):
    """A GRPO-family loss: objective, ratio level, aggregation, KL to the reference and entropy bonus.

    Per token, with ``x = logp - old``, ``r = exp(x)``, advantage ``A`` and ``sg`` for no gradient; docs/objectives.md
    has the derivatives, the sources and the trainers' names:

    ==============  ===================================================================================
    ``clip``        ``-min(min(r, delta) A, clip(r, 1 - eps_low, 1 + eps_high) A)``; ``A < 0`` and
                    ``dual_clip = c``: ``min(-c A, that)`` (PPO, GRPO, DAPO, GSPO)
    ``cispo``       ``-sg(clamp(r, cispo_low, cispo_high)) A logp``
    ``sapo``        ``-(4/tau) sigmoid(tau (r - 1)) A``, tau by the sign of ``A``
    ``gmpo``        a sequence's ``-exp(mean_t clipped x) mean_t A``, ``x`` clipped to the eps by the sign of ``A``
    ``vespo``       ``-sg(phi) A logp``, ``log phi = lambda + k log w - lambda w``, ``w`` the sequence's ratio
    ``reinforce``   ``-A logp`` (GPG; weighted by ``token_weights``: the truncated-IS policy gradient)
    ``dppo_tv``     ``-A sg(min(r, ratio_cap)) logp`` where ``p - p_old`` stays within the eps
    ``dppo_kl``     the same where the binary KL does
    ``tv_mask``     ``-A r`` where ``p - p_rollout`` is within tv_low, tv_high, plus ``ratio_sq_coef x^2``;
                    here ``x = logp - rollout`` (prime-rl)
    ``ipo``         the same where ``|p - p_rollout| <= tv_high``
    ``dro``         ``-(A logp - dro_beta x^2 / 2)``
    ``clip_cov``    ``clip`` without a random share of the tokens of high covariance
    ``kl_cov``      ``-A r``, plus ``cov_kl |x|`` on the tokens of highest covariance
    ==============  ===================================================================================

    Args:
        objective: a name of the table.
        eps_low, eps_high: clip range of the ratio (``gmpo``: of the log-ratio; ``dppo_*``: of the divergence);
            ``eps_high=None`` takes ``eps_low`` (DAPO's clip-higher sets it).
        delta: upper bound of the unclipped ratio (INTELLECT-2's two-sided clip), ``None`` for none.
        dual_clip: bound ``c > 1`` on ``-r A`` for negative advantages (arXiv:1912.09729), ``None`` for none.
        cispo_low, cispo_high: bounds of the ratio itself, not of its distance from 1; ``cispo_low=None`` for none.
        sapo_tau_pos, sapo_tau_neg: temperatures for ``A > 0`` and for the rest.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: gamma weighting for ``A >= 0`` and ``A < 0``.
        ratio_cap: upper bound of the ratio of ``dppo_*``, ``None`` for none.
        tv_low, tv_high, ratio_sq_coef: of ``tv_mask`` and ``ipo``.
        dro_beta: of ``dro``, which needs it.
        cov_ratio: share of the active tokens that the ``*_cov`` objectives pick, at least one. They pick within one
            call: micro-batches pick other tokens than the batch in one piece, whatever the ``denominator``.
        cov_low, cov_high: covariances that ``clip_cov`` picks from, at random (torch's generator).
        cov_kl: weight of ``|x|`` on the picked tokens of ``kl_cov``.
        ratio_level: ``"token"``; ``"sequence"`` (GSPO, arXiv:2507.18071: ``exp(mean_t x)``, gradient through the mean);
            ``"sequence_token"`` (that value, gradient by token); ``"sequence_product"`` (``exp(sum_t x)``, RLOO).
            Other than ``"token"`` for ``clip``, ``cispo`` and ``sapo`` only. A sequence's value stands at each of its
            tokens, so ``"token_sum"`` and ``"sequence_sum"`` count it n_i times (as LUSPO does); a mean counts it once.
        log_ratio_clamp: ``x`` is clamped to +- this before anything else, no gradient outside.
        sequence_log_ratio_max: upper bound on a sequence's log-ratio, no gradient above.
        kl_coef, kl_estimator, kl_gradient: penalty to the reference, ``u = ref - logp``: ``k1 = -u``, ``abs``,
            ``k2 = u^2/2``, ``k3 = e^u - u - 1``; differentiated ``"pathwise"``, ``"straight_through"`` (k2's gradient),
            ``"importance_weighted"`` (``r k``), ``"score_function"``, ``"behaviour_weighted"`` (``exp(lp - roll) k``).
        kl_input_clamp, kl_output_clamp: clamps on ``u`` and on the weighted estimate, no gradient outside, except
            that of ``"straight_through"``, which is k2's at the unclamped ``u``.
        entropy_coef: ``loss -= entropy_coef * aggregate(entropy)``.
            Either coefficient may be a 0-d tensor on the logits' device, which is read whenever the kernels run: a
            captured CUDA graph and a compiled loss follow what is written into it. Its term is then part of the loss
            even at 0, and that it is finite and not negative is the caller's promise. One on the CPU with logits on
            a GPU is read at each call; a replayed graph keeps what it read. Configs hold it, and are equal if
            it is the same tensor.
        entropy_aggregation: as ``aggregation``, for the entropy alone; ``None`` takes the policy's. If set (as in all
            ``trl_*`` presets), the loss's ``denominator`` does not apply to the entropy.
        entropy_mask_bonus: the ``entropy_mask`` given to the loss restricts the entropy term too.
        aggregation: ``"token_mean"`` (DAPO), ``"token_sum"``, ``"sequence_mean"`` (GRPO), ``"sequence_sum"`` (LUSPO),
            ``"fixed_length"`` (Dr.GRPO: sum / (sequences * max_length)).
        max_length: of ``"fixed_length"``, in tokens.
        count_empty_sequences: whether a sequence with no active token counts in the mean over sequences. It does by
            default, also in each micro-batch.

    Raises:
        ValueError: for unknown names, numbers out of range, options that the chosen form ignores, and tensors that
            are not one floating number without grad.
    """

    objective: str = "clip"
    eps_low: float = 0.2
    eps_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    cispo_low: float | None = None
    cispo_high: float = 5.0
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    ratio_cap: float | None = None
    tv_low: float = 0.2
    tv_high: float = 0.2
    ratio_sq_coef: float = 0.0
    dro_beta: float | None = None
    cov_ratio: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    cov_kl: float = 0.1
    ratio_level: str = "token"
    log_ratio_clamp: float | None = None
    sequence_log_ratio_max: float | None = None
    kl_coef: float | torch.Tensor = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str = "pathwise"
    kl_input_clamp: float | None = None
    kl_output_clamp: float | None = None
    entropy_coef: float | torch.Tensor = 0.0
    entropy_aggregation: str | None = None
    entropy_mask_bonus: bool = False
    aggregation: str = "token_mean"
    max_length: int | None = None
    count_empty_sequences: bool = True
    # What follows from the arguments, computed once, so that a compiled loss guards on these and not on a coefficient.
    # No fields: who rebuilds a dataclass from its fields, as FSDP does when it casts, passes arguments only.
    form: ClassVar[Form]
    scalars: ClassVar[torch.Tensor]  # float64 on the CPU, of Scalars
    has_entropy: ClassVar[bool]
    tensors: ClassVar[tuple[torch.Tensor | None, ...]]  # kl_coef and entropy_coef, where they are tensors

    def __post_init__(self) -> None:
        _check_names(self)
        _check_numbers(self)
        _check_unused(self)
        # A tensor, so that torch.compile sees an input and not constants: an annealed coefficient keeps its graph.
        object.__setattr__(self, "form", self._form())
        object.__setattr__(self, "scalars", torch.tensor(self.scalar_values(), dtype=torch.float64, device="cpu"))
        object.__setattr__(self, "has_entropy", _is_part(self.entropy_coef))
        given = (self.kl_coef, self.entropy_coef)
        object.__setattr__(self, "tensors", tuple(x if isinstance(x, torch.Tensor) else None for x in given))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LossConfig:
        """A trainer's own defaults, by name (``presets.PRESETS``), with ``changes`` to any field.

        Raises:
            ValueError: if there is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
        return cls(**{**PRESETS[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        """The arguments, by name: ``LossConfig(**config.to_dict())`` equals it, by way of JSON too, which holds all of
        them but a coefficient that is a tensor."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def has_kl(self) -> bool:
        return self.form.kl_estimator != "none"

    def _form(self) -> Form:
        kl = _is_part(self.kl_coef)
        return Form(
            self.objective,
            self.ratio_level,
            self.kl_estimator if kl else "none",
            self.kl_gradient if kl else "pathwise",
        )

    def scalar_values(self) -> Scalars:
        eps_high = self.eps_low if self.eps_high is None else self.eps_high
        low = -math.inf if self.cispo_low is None else self.cispo_low
        own = {
            "eps_high": eps_high, "ratio_low": 1 - self.eps_low, "ratio_high": 1 + eps_high, "cispo_low": low,
            "dro_beta": self.dro_beta or 0.0, "vespo_lambda_pos": max(self.vespo_lambda_pos, VESPO_MIN_LAMBDA),
            "vespo_lambda_neg": max(self.vespo_lambda_neg, VESPO_MIN_LAMBDA),
        }  # fmt: skip
        return Scalars(*(own[f] if f in own else _bound(getattr(self, f)) for f in Scalars._fields))


def _is_part(coefficient: float | torch.Tensor) -> bool:
    """Whether a term is part of the loss: a tensor's value may change under a launch, or a graph, that stays."""
    return isinstance(coefficient, torch.Tensor) or coefficient != 0


def _check_names(c: LossConfig) -> None:
    allowed = {
        "objective": tuple(OBJECTIVES),
        "ratio_level": RATIO_LEVELS,
        "kl_estimator": KL_ESTIMATORS[1:],
        "kl_gradient": KL_GRADIENTS,
        "aggregation": AGGREGATIONS,
        "entropy_aggregation": (None, *AGGREGATIONS),
    }
    for field, names in allowed.items():
        if getattr(c, field) not in names:
            raise ValueError(f"{field} must be one of {', '.join(map(repr, names))}; got {getattr(c, field)!r}")


def _check_numbers(c: LossConfig) -> None:
    def require(field: str, legal: bool, what: str) -> None:
        if not legal:
            raise ValueError(f"{field} must be {what}; got {getattr(c, field)!r}")

    for field in dataclasses.fields(c):
        value = getattr(c, field.name, None)
        if isinstance(value, torch.Tensor) and "Tensor" in field.type:
            check_coefficient(field.name, value)
        elif field.type.startswith("float") and value is not None:
            require(field.name, isinstance(value, (int, float)) and math.isfinite(value), "a finite number")
    at_least_0 = (
        "eps_low", "eps_high", "kl_coef", "entropy_coef", "cispo_low", "cispo_high", "tv_low", "tv_high",
        "ratio_sq_coef", "cov_kl",
    )  # fmt: skip
    above_0 = ("delta", "log_ratio_clamp", "kl_input_clamp", "kl_output_clamp", "ratio_cap", "dro_beta")
    for name in at_least_0:
        value = getattr(c, name)
        require(name, value is None or isinstance(value, torch.Tensor) or value >= 0, "at least 0")
    for name in above_0:
        require(name, getattr(c, name) is None or getattr(c, name) > 0, "above 0, or None")
    for name in ("sapo_tau_pos", "sapo_tau_neg"):
        require(name, getattr(c, name) > 0, "above 0")
    require("cov_ratio", 0 < c.cov_ratio <= 1, "above 0 and at most 1")
    require("cov_high", c.cov_high > c.cov_low, f"above cov_low ({c.cov_low!r})")
    require("cispo_high", c.cispo_low is None or c.cispo_high >= c.cispo_low, f"at least cispo_low ({c.cispo_low!r})")
    require("dual_clip", c.dual_clip is None or c.dual_clip > 1, "above 1, or None")
    require("max_length", c.max_length is None or c.max_length >= 1, "at least 1, or None")


def _check_unused(c: LossConfig) -> None:
    """An option that the chosen form ignores is a mistake of the caller's, not a detail to drop."""
    objective = OBJECTIVES[c.objective]
    for name in _OWN_OPTIONS:
        if name not in objective.options and getattr(c, name) != getattr(LossConfig, name):  # the default
            used = ", ".join(sorted(objective.options))
            allowed = f"uses {used}" if used else "has no options of its own"
            raise ValueError(f"{name}={getattr(c, name)!r} is not used by objective={c.objective!r}, which {allowed}")
    if c.objective == "dro" and c.dro_beta is None:
        raise ValueError("objective='dro' needs dro_beta, above 0; got None")
    if c.ratio_level not in objective.ratio_levels:
        others = ", ".join(name for name, other in OBJECTIVES.items() if c.ratio_level in other.ratio_levels)
        raise ValueError(
            f"objective={c.objective!r} has a ratio of its own and allows ratio_level='token' only "
            f"(others: {others}); got {c.ratio_level!r}"
        )
    weighted_kl = _is_part(c.kl_coef) and c.kl_gradient == "importance_weighted"
    if c.log_ratio_clamp is not None and c.objective == "reinforce" and not weighted_kl:
        raise ValueError("log_ratio_clamp is not used by objective='reinforce', which has no ratio; pass None")
    if c.sequence_log_ratio_max is not None and c.ratio_level == "token":
        raise ValueError(
            "sequence_log_ratio_max needs a ratio_level of 'sequence', 'sequence_token' or 'sequence_product'"
        )
    if c.max_length is not None and "fixed_length" not in (c.aggregation, c.entropy_aggregation):
        raise ValueError(f"max_length is used by aggregation='fixed_length' only; got aggregation={c.aggregation!r}")


DEFAULT = LossConfig()  # one for all calls that give none: to make one takes longer than to launch a kernel
