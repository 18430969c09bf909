"""What a loss is: its form (which code runs), its scalars (numbers that may change every step), and the presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# Every name that selects code; the positions are the enumerators of csrc/math/policy.h.
OBJECTIVES = ("clip",)
RATIO_LEVELS = ("token", "sequence", "sequence_token", "sequence_product")
KL_ESTIMATORS = ("none", "k1", "abs", "k2", "k3")
KL_GRADIENTS = ("pathwise", "straight_through", "importance_weighted", "score_function", "behaviour_weighted")
AGGREGATIONS = ("token_mean", "token_sum", "sequence_mean", "sequence_sum", "fixed_length")

# Sums of the token kernel, in the order of `Metric` in csrc/kernels.h; described in losses.LossOutput.
METRICS = (
    "policy_loss", "kl_loss", "entropy_loss", "tokens", "entropy", "kl", "approx_kl", "approx_kl_k3",
    "ratio_mean", "ratio_min", "ratio_max", "clip_low", "clip_high", "clip_region", "clip_cap",
)  # fmt: skip


class Form(NamedTuple):
    """Choices that change the code of a kernel: a template argument, a Triton constexpr."""

    objective: str
    ratio_level: str
    kl_estimator: str
    kl_gradient: str

    @property
    def codes(self) -> list[int]:
        names = (OBJECTIVES, RATIO_LEVELS, KL_ESTIMATORS, KL_GRADIENTS)
        return [names.index(chosen) for names, chosen in zip(names, self, strict=True)]


class Scalars(NamedTuple):
    """Numbers a kernel reads at run time; infinity where there is no bound."""

    ratio_low: float
    ratio_high: float
    delta: float
    dual_clip: float
    log_ratio_clamp: float
    sequence_log_ratio_max: float
    kl_coef: float
    kl_input_clamp: float
    kl_output_clamp: float
    entropy_coef: float


def _bound(value: float | None) -> float:
    return math.inf if value is None else value


@dataclass(frozen=True)
class LossConfig:
    """A GRPO-family loss: objective, ratio level, aggregation, KL to the reference and entropy bonus.

    Per token, with ``r = exp(logp - old)`` and advantage ``A`` (``objective="clip"``, PPO, arXiv:1707.06347)::

        -min(min(r, delta) A, clip(r, 1 - eps_low, 1 + eps_high) A);   A < 0 and dual_clip = c:  min(-c A, that)

    Args:
        objective: ``"clip"``.
        eps_low, eps_high: clip range of the ratio; ``eps_high=None`` takes ``eps_low`` (DAPO's clip-higher sets it).
        delta: upper bound of the unclipped ratio (INTELLECT-2's two-sided clip), ``None`` for none.
        dual_clip: bound ``c > 1`` on ``-r A`` for negative advantages (arXiv:1912.09729), ``None`` for none.
        ratio_level: ``"token"``; ``"sequence"`` (GSPO, arXiv:2507.18071: ``exp(mean_t x)``, gradient through the mean);
            ``"sequence_token"`` (that value, gradient by token); ``"sequence_product"`` (``exp(sum_t x)``, RLOO).
        log_ratio_clamp: ``x = logp - old`` is clamped to +- this before anything else, no gradient outside.
        sequence_log_ratio_max: upper bound on a sequence's log-ratio, no gradient above.
        kl_coef, kl_estimator, kl_gradient: penalty to the reference, ``u = ref - logp``: ``k1 = -u``, ``abs``,
            ``k2 = u^2/2``, ``k3 = e^u - u - 1``; differentiated ``"pathwise"``, ``"straight_through"`` (k2's gradient),
            ``"importance_weighted"`` (``r k``), ``"score_function"``, ``"behaviour_weighted"`` (``exp(lp - roll) k``).
        kl_input_clamp, kl_output_clamp: clamps on ``u`` and on the weighted estimate, no gradient outside.
        entropy_coef: ``loss -= entropy_coef * aggregate(entropy)``.
        entropy_aggregation: as ``aggregation``, for the entropy alone; ``None`` takes the policy's.
        entropy_mask_bonus: the ``entropy_mask`` given to the loss restricts the entropy term too.
        aggregation: ``"token_mean"`` (DAPO), ``"token_sum"``, ``"sequence_mean"`` (GRPO), ``"sequence_sum"`` (LUSPO),
            ``"fixed_length"`` (Dr.GRPO: sum / (sequences * max_length)).
        max_length: of ``"fixed_length"``, in tokens.
        count_empty_sequences: whether a sequence with no active token counts in the mean over sequences.

    Raises:
        ValueError: for unknown names, numbers out of range, and options that the chosen form never reads.
    """

    objective: str = "clip"
    eps_low: float = 0.2
    eps_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    ratio_level: str = "token"
    log_ratio_clamp: float | None = None
    sequence_log_ratio_max: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str = "pathwise"
    kl_input_clamp: float | None = None
    kl_output_clamp: float | None = None
    entropy_coef: float = 0.0
    entropy_aggregation: str | None = None
    entropy_mask_bonus: bool = False
    aggregation: str = "token_mean"
    max_length: int | None = None
    count_empty_sequences: bool = True
    form: Form = dataclasses.field(init=False, repr=False, compare=False)
    scalars: torch.Tensor = dataclasses.field(init=False, repr=False, compare=False)  # float64 on the CPU, of Scalars

    def __post_init__(self) -> None:
        _check_names(self)
        _check_numbers(self)
        _check_unread(self)
        # A tensor, so that torch.compile sees an input and not constants: an annealed coefficient keeps its graph.
        object.__setattr__(self, "form", self._form())
        object.__setattr__(self, "scalars", torch.tensor(self._scalars(), dtype=torch.float64, device="cpu"))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LossConfig:
        """A trainer's own defaults, by name (see ``PRESETS``), with ``changes`` to any field.

        Raises:
            ValueError: if there is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def has_kl(self) -> bool:
        return self.form.kl_estimator != "none"

    @property
    def has_entropy(self) -> bool:
        return self.entropy_coef != 0

    def _form(self) -> Form:
        kl = self.kl_coef != 0
        return Form(
            self.objective,
            self.ratio_level,
            self.kl_estimator if kl else "none",
            self.kl_gradient if kl else "pathwise",
        )

    def _scalars(self) -> Scalars:
        eps_high = self.eps_low if self.eps_high is None else self.eps_high
        return Scalars(
            1 - self.eps_low, 1 + eps_high, _bound(self.delta), _bound(self.dual_clip), _bound(self.log_ratio_clamp),
            _bound(self.sequence_log_ratio_max), self.kl_coef, _bound(self.kl_input_clamp),
            _bound(self.kl_output_clamp),
            self.entropy_coef,
        )  # fmt: skip


def _check_names(c: LossConfig) -> None:
    allowed = {
        "objective": OBJECTIVES,
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
        if field.type.startswith("float") and value is not None:
            require(field.name, isinstance(value, (int, float)) and math.isfinite(value), "a finite number")
    for name in ("eps_low", "eps_high", "kl_coef", "entropy_coef"):
        require(name, getattr(c, name) is None or getattr(c, name) >= 0, "at least 0")
    for name in ("delta", "log_ratio_clamp", "kl_input_clamp", "kl_output_clamp"):
        require(name, getattr(c, name) is None or getattr(c, name) > 0, "above 0, or None")
    require("dual_clip", c.dual_clip is None or c.dual_clip > 1, "above 1, or None")
    require("max_length", c.max_length is None or c.max_length >= 1, "at least 1, or None")


def _check_unread(c: LossConfig) -> None:
    """An option that the chosen form never reads is a mistake of the caller's, not a detail to drop."""
    if c.sequence_log_ratio_max is not None and c.ratio_level == "token":
        raise ValueError(
            "sequence_log_ratio_max needs a ratio_level of 'sequence', 'sequence_token' or 'sequence_product'"
        )
    if c.max_length is not None and "fixed_length" not in (c.aggregation, c.entropy_aggregation):
        raise ValueError(f"max_length is read by aggregation='fixed_length' only; got aggregation={c.aggregation!r}")


# TRL weighs its k3 by the ratio (use_bias_correction_kl) once beta is set; its entropy bonus is always a token mean.
_TRL: dict[str, Any] = {
    "entropy_aggregation": "token_mean",
    "entropy_mask_bonus": True,
    "kl_gradient": "importance_weighted",
}
# verl's low_var_kl, its default once use_kl_loss is on, has two clamps.
_VERL: dict[str, Any] = {"count_empty_sequences": False, "kl_input_clamp": 20.0, "kl_output_clamp": 10.0}

# Each equals the trainer's own defaults, the surprising ones included. Where a trainer's normaliser spans more than
# one call (accumulation, data parallelism), pass it as `denominator` or `scale`.
PRESETS: dict[str, dict[str, Any]] = {
    # TRL GRPOConfig, loss_type=...; beta 0, epsilon 0.2.
    "trl_dapo": {**_TRL, "aggregation": "token_mean"},  # TRL recommends epsilon_high=0.28
    "trl_bnpo": {**_TRL, "aggregation": "token_mean"},
    "trl_grpo": {**_TRL, "aggregation": "sequence_mean"},
    "trl_dr_grpo": {**_TRL, "aggregation": "fixed_length", "max_length": 512},  # max_completion_length
    # importance_sampling_level="sequence" with loss_type="grpo"; the GSPO paper uses eps 3e-4 / 4e-4.
    "trl_gspo": {**_TRL, "ratio_level": "sequence", "aggregation": "sequence_mean"},
    "trl_luspo": {**_TRL, "ratio_level": "sequence", "aggregation": "sequence_sum"},  # its recommended level
    # verl ActorConfig, policy_loss.loss_mode=...; clip_ratio 0.2, clip_ratio_c 3.0, loss_agg_mode token-mean.
    "verl_vanilla": {**_VERL, "dual_clip": 3.0, "log_ratio_clamp": 20.0, "aggregation": "token_mean"},
    # verl recommends aggregation="sequence_mean" and clip ratios 3e-4 / 4e-4 for it.
    "verl_gspo": {
        **_VERL, "ratio_level": "sequence_token", "sequence_log_ratio_max": 10.0, "aggregation": "token_mean",
    },
    # OpenRLHF --actor.policy_loss_type ppo: eps_clip 0.2, no dual clip, KL in the reward.
    "openrlhf_ppo": {"log_ratio_clamp": 20.0, "aggregation": "token_mean", "count_empty_sequences": False},
    # slime --advantage-estimator grpo: mean over sequences of the token mean; pass sequence_weights for sibling means.
    "slime_grpo": {"aggregation": "sequence_mean"},
    # NeMo-RL ClippedPGLossConfig: token-level loss, KL 0.01 by the score-function form of k3 with its clamps.
    "nemo_grpo": {
        "aggregation": "token_mean", "kl_coef": 0.01, "kl_estimator": "k3", "kl_gradient": "score_function",
        "kl_input_clamp": 20.0, "kl_output_clamp": 10.0,
    },
    # DeepSeekMath (arXiv:2402.03300): sequence mean, KL 0.04.
    "deepseekmath_grpo": {"aggregation": "sequence_mean", "kl_coef": 0.04},
}  # fmt: skip
