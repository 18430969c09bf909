"""What hypothesis draws: a config, a shape, and how the numbers look. `build.py` makes tensors of it, for one seed."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.config import AGGREGATIONS, KL_ESTIMATORS, KL_GRADIENTS, OBJECTIVES
from grpo_kernels.presets import PRESETS

# ---- configs ----

VALUES: dict[str, list[Any]] = {
    "eps_low": [0.0, 1e-3, 0.1, 0.2, 0.9, 1.5],
    "eps_high": [None, 0.0, 0.05, 0.28, 3.0],
    "delta": [None, 0.5, 1.1, 2.0, 1e4],
    "dual_clip": [None, 1.05, 1.4, 3.0],
    "cispo_low": [None, 0.0, 0.9],
    "cispo_high": [0.95, 1.1, 5.0],
    "sapo_tau_pos": [0.1, 1.0, 10.0],
    "sapo_tau_neg": [0.1, 1.05, 10.0],
    "vespo_k_pos": [0.0, 1.5, 2.0],
    "vespo_k_neg": [0.0, 3.0],
    "vespo_lambda_pos": [0.0, 2.5, 3.0],
    "vespo_lambda_neg": [0.0, 2.0],
    "ratio_cap": [None, 0.5, 1.2, 3.0],
    "tv_low": [0.0, 0.002, 0.2, 1.0],
    "tv_high": [0.0, 0.002, 0.2, 1.0],
    "ratio_sq_coef": [0.0, 1e-3, 0.1],
    "dro_beta": [0.1, 1.0],
    "cov_ratio": [2e-4, 0.3, 1.0],
    "cov_low": [-0.3, 0.0],
    "cov_high": [0.2, 5.0],
    "cov_kl": [0.0, 0.1, 1.0],
}
CLAMPS = [None, None, 0.2, 20.0]
COEFFICIENTS = [0.0, 0.0, 0.1, "tensor"]


@st.composite
def configs(draw: Any, knows_sequences: bool) -> gk.LossConfig:
    """Anything that LossConfig accepts and that these tokens allow; one in eight is a preset."""
    pick = lambda values: draw(st.sampled_from(values))  # noqa: E731
    if pick(range(8)) == 0:
        name = pick(sorted(PRESETS))
        config = gk.LossConfig.preset(name, **({"dro_beta": 0.1} if PRESETS[name].get("objective") == "dro" else {}))
        flat = config.form.pooling == "none" and config.aggregation in ("token_mean", "token_sum")
        if knows_sequences or flat:
            return config
    names = [n for n, o in OBJECTIVES.items() if knows_sequences or o.pooling == "none"]
    objective = pick(names)
    options: dict[str, Any] = {"objective": objective}
    for name in sorted(OBJECTIVES[objective].options):
        if name == "dro_beta" or draw(st.booleans()):
            options[name] = pick(VALUES[name])
    if options.get("cispo_low") is not None:
        options["cispo_high"] = max(options.get("cispo_high", 5.0), options["cispo_low"])
    if "cov_low" in OBJECTIVES[objective].options:
        options["cov_low"], options["cov_high"] = options.get("cov_low", -0.1), options.get("cov_high", 0.3)
    allowed = OBJECTIVES[objective].ratio_levels if knows_sequences else ("token",)
    options["ratio_level"] = level = pick(allowed)
    options["kl_coef"], options["entropy_coef"] = pick(COEFFICIENTS), pick(COEFFICIENTS)
    for name in ("kl_coef", "entropy_coef"):
        if options[name] == "tensor":
            options[name] = torch.tensor(pick([0.0, 0.05]))
    if isinstance(options["kl_coef"], Tensor) or options["kl_coef"]:
        options |= {"kl_estimator": pick(KL_ESTIMATORS[1:]), "kl_gradient": pick(KL_GRADIENTS)}
        options |= {"kl_input_clamp": pick([None, 0.3, 20.0]), "kl_output_clamp": pick([None, 0.03, 10.0])}
    weighted = options.get("kl_gradient") == "importance_weighted"
    options["log_ratio_clamp"] = pick(CLAMPS) if objective != "reinforce" or weighted else None
    options["sequence_log_ratio_max"] = pick([None, 0.05, 10.0]) if level != "token" else None
    reductions = AGGREGATIONS if knows_sequences else ("token_mean", "token_sum")
    options["aggregation"], options["entropy_aggregation"] = pick(reductions), pick([None, None, *reductions])
    options["entropy_mask_bonus"], options["count_empty_sequences"] = draw(st.booleans()), draw(st.booleans())
    if "fixed_length" in (options["aggregation"], options["entropy_aggregation"]):
        options["max_length"] = 9
    return gk.LossConfig(**options)


# ---- calls ----

LOGITS = ("normal", "wide", "offset", "tiny", "peaked", "negative", "equal", "minus_inf", "lowest", "all_lowest")
MASKS = ("none", "ragged", "holes", "random", "empty", "one")
DISTANCES = (0.0, 0.01, 0.3, 3.0, 30.0)
# Targets of probability 0; old log-probs (and rollout's) of ratios that overflow, that are no number.
EXTREMES = ("none", "none", "none", "none", "zero_target", "far", "minus_inf", "nan")
ENTRIES = ("grpo", "grpo", "linear", "policy", "logps")
OPTIONAL = ("old", "ref", "rollout", "token_weights", "entropy_mask", "sequence_weights")


class Call(NamedTuple):
    """One call, without its numbers; its repr can be pasted."""

    entry: str  # grpo, linear, policy, logps
    form: str  # padded, extra (one position more), packed (cu_seqlens), flat
    batch: int
    tokens: int
    vocab: int
    dtype: str
    layout: str
    logits: tuple[str, ...]  # kinds, row after row
    targets: str
    mask: str
    mask_dtype: str
    given: frozenset[str]  # of OPTIONAL
    distance: float  # of old, ref and rollout log-probs
    extreme: str  # what some active tokens hold; see EXTREMES
    advantages: str
    config: dict[str, Any]
    transform: dict[str, Any]  # temperature, logit_scale, softcap
    denominator: float | None
    scale: float
    upstream: float
    inplace: bool
    single_pass: bool
    poison: bool
    seed: int


@st.composite
def calls(draw: Any, dtypes: tuple[str, ...], largest_vocab: int = 2053, entries: tuple[str, ...] = ENTRIES) -> Call:
    pick = lambda values: draw(st.sampled_from(values))  # noqa: E731
    entry = pick(entries)
    dtype = pick(dtypes if entry != "linear" else [d for d in dtypes if "16" not in d])  # a matmul's own rounding
    form = pick(("padded", "padded", "extra", "packed", "flat"))
    config = draw(configs(form != "flat"))
    given = {name for name in OPTIONAL if draw(st.booleans())}
    given |= {"ref"} if config.has_kl else set()
    if config.kl_gradient == "behaviour_weighted" or OBJECTIVES[config.objective].ratio_against == "rollout":
        given |= {"rollout"}
    if form == "flat":
        given -= {"sequence_weights"}
    temperature = pick((1.0, 1.0, 0.5, 0.7, 1.3, 0.05, "row", "token"))
    softcap = pick((None, None, None, 30.0, 2.0))
    return Call(
        entry, form, draw(st.integers(0, 4)), draw(st.integers(0, 6)),
        pick([v for v in (1, 2, 3, 5, 16, 33, 128, 133, 257, 600, 2053) if v <= largest_vocab]), dtype,
        pick(("dense", "dense", "padded_rows", "transposed", "expanded", "offset")),
        tuple(draw(st.lists(st.sampled_from(LOGITS), min_size=1, max_size=3))),
        pick(("random", "likeliest", "unlikeliest")), pick(MASKS), pick(("bool", "int64", "float32", "bfloat16")),
        frozenset(given), pick(DISTANCES), pick(EXTREMES), pick(("sequence", "token", "zeros", "rewards", "centred_rewards")),
        {f: getattr(config, f) for f in CONFIG_FIELDS if _differs(config, f)},
        {"temperature": temperature, "logit_scale": pick((1.0, 1.0, 0.3, 2.5)), "softcap": softcap},
        pick((None, None, 7.5)), pick((1.0, 1.0, 0.25)), pick((1.0, 1.0, -2.5)), draw(st.booleans()), draw(st.booleans()),
        draw(st.booleans()), draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


CONFIG_FIELDS = [f.name for f in dataclasses.fields(gk.LossConfig)]


def _differs(config: gk.LossConfig, name: str) -> bool:
    value = getattr(config, name)
    return isinstance(value, Tensor) or value != getattr(gk.LossConfig, name)
