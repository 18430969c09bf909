"""Trainers' losses by name: what a user of that trainer gets without changing anything, the surprising parts included.

Where a trainer's normaliser spans more than one call (accumulation, data parallelism), pass it as `denominator` or
`scale`. docs/migrating.md maps the trainers' arguments to ours.
"""

from __future__ import annotations

from typing import Any

# TRL weighs its k3 by the ratio (use_bias_correction_kl) once beta is set; its entropy bonus is always a token mean.
_TRL: dict[str, Any] = {
    "entropy_aggregation": "token_mean",
    "entropy_mask_bonus": True,
    "kl_gradient": "importance_weighted",
}
# verl's low_var_kl, its default once use_kl_loss is on, has two clamps.
_VERL: dict[str, Any] = {
    "aggregation": "token_mean", "count_empty_sequences": False, "kl_input_clamp": 20.0, "kl_output_clamp": 10.0,
}  # fmt: skip
# NeMo-RL's KL penalty 0.01 by the score-function form of k3 with its clamps.
_NEMO: dict[str, Any] = {
    "kl_coef": 0.01, "kl_estimator": "k3", "kl_gradient": "score_function", "kl_input_clamp": 20.0,
    "kl_output_clamp": 10.0,
}  # fmt: skip
_EPS_BOUNDS = {"cispo_low": 0.8, "cispo_high": 1.2}  # CISPO where a trainer reads its clip range as 1 -+ eps

PRESETS: dict[str, dict[str, Any]] = {
    # TRL GRPOConfig, loss_type=...; beta 0, epsilon 0.2.
    "trl_dapo": {**_TRL, "aggregation": "token_mean"},  # TRL recommends epsilon_high=0.28
    "trl_bnpo": {**_TRL, "aggregation": "token_mean"},
    "trl_grpo": {**_TRL, "aggregation": "sequence_mean"},
    "trl_dr_grpo": {**_TRL, "aggregation": "fixed_length", "max_length": 512},  # max_completion_length
    # importance_sampling_level="sequence" with loss_type="grpo"; the GSPO paper uses eps 3e-4 / 4e-4.
    "trl_gspo": {**_TRL, "ratio_level": "sequence", "aggregation": "sequence_mean"},
    "trl_luspo": {**_TRL, "ratio_level": "sequence", "aggregation": "sequence_sum"},  # its recommended level
    # The cap is TRL's epsilon_high, so 0.2 unless it is set; MiniMax's paper and TRL's documentation use 5.0.
    "trl_cispo": {**_TRL, "objective": "cispo", "cispo_high": 0.2, "aggregation": "token_mean"},
    "trl_sapo": {**_TRL, "objective": "sapo", "aggregation": "sequence_mean"},
    "trl_vespo": {**_TRL, "objective": "vespo", "aggregation": "token_mean"},
    # experimental.gmpo: eps 0.4 in log space.
    "trl_gmpo": {
        **_TRL, "objective": "gmpo", "eps_low": 0.4, "kl_gradient": "pathwise", "aggregation": "sequence_mean",
    },
    # RLOOTrainer: the product of the token ratios; its KL (beta 0.05, k1) is taken off the reward.
    "trl_rloo": {"ratio_level": "sequence_product", "aggregation": "sequence_mean"},
    # verl ActorConfig, policy_loss.loss_mode=...; clip_ratio 0.2, clip_ratio_c 3.0, loss_agg_mode token-mean.
    "verl_vanilla": {**_VERL, "dual_clip": 3.0, "log_ratio_clamp": 20.0},
    # verl recommends aggregation="sequence_mean" and clip ratios 3e-4 / 4e-4 for it.
    "verl_gspo": {**_VERL, "ratio_level": "sequence_token", "sequence_log_ratio_max": 10.0},
    "verl_cispo": {**_VERL, "objective": "cispo", **_EPS_BOUNDS, "log_ratio_clamp": 20.0},
    # sapo and geo_mean ignore loss_agg_mode; geo_mean is a plain mean over rows, whatever the global batch.
    "verl_sapo": {**_VERL, "objective": "sapo", "log_ratio_clamp": 20.0, "aggregation": "sequence_mean"},
    "verl_geo_mean": {
        **_VERL, "objective": "gmpo", "aggregation": "sequence_mean", "count_empty_sequences": True,
    },
    "verl_gpg": {**_VERL, "objective": "reinforce"},
    # The cap is clip_ratio_c; clip_ratio_low and _high bound the divergence.
    "verl_dppo_tv": {**_VERL, "objective": "dppo_tv", "ratio_cap": 3.0, "log_ratio_clamp": 20.0},
    "verl_dppo_kl": {**_VERL, "objective": "dppo_kl", "ratio_cap": 3.0, "log_ratio_clamp": 20.0},
    "verl_dro": {**_VERL, "objective": "dro"},  # dro_beta has to be given, as in verl
    "verl_clip_cov": {**_VERL, "objective": "clip_cov"},
    "verl_kl_cov": {**_VERL, "objective": "kl_cov"},
    # bypass_mode with loss_type reinforce, the weights as token_weights; with ppo_clip it is verl_vanilla and
    # old_logps = rollout_logps.
    "verl_bypass_reinforce": {**_VERL, "objective": "reinforce"},
    # OpenRLHF --actor.policy_loss_type: eps_clip 0.2, no dual clip, KL in the reward.
    "openrlhf_ppo": {"log_ratio_clamp": 20.0, "aggregation": "token_mean", "count_empty_sequences": False},
    "openrlhf_gspo": {
        "ratio_level": "sequence", "aggregation": "sequence_mean", "count_empty_sequences": False,
        "entropy_aggregation": "token_mean",
    },
    # slime --advantage-estimator: mean over sequences of the token mean; pass sequence_weights for sibling means.
    "slime_grpo": {"aggregation": "sequence_mean"},
    "slime_gspo": {"ratio_level": "sequence", "aggregation": "sequence_mean"},
    "slime_cispo": {"objective": "cispo", **_EPS_BOUNDS, "aggregation": "sequence_mean"},
    # NeMo-RL ClippedPGLossConfig: token-level loss; GSPO needs token_level_loss=False there.
    "nemo_grpo": {**_NEMO, "aggregation": "token_mean"},
    "nemo_gspo": {**_NEMO, "ratio_level": "sequence", "aggregation": "sequence_mean", "count_empty_sequences": False},
    "nemo_cispo": {**_NEMO, "objective": "cispo", **_EPS_BOUNDS, "aggregation": "token_mean"},
    # prime-rl trainer.loss: ratios against the sampler, a squared log-ratio; its adv_tau scales the advantages.
    "prime_default": {"objective": "tv_mask", "ratio_sq_coef": 1e-3, "aggregation": "token_mean"},
    "prime_ipo": {"objective": "ipo", "tv_high": 0.1, "ratio_sq_coef": 1e-3, "aggregation": "token_mean"},
    # Liger's LigerFusedLinearGRPOLoss: loss_type dapo, beta 0.04 without bias correction.
    "liger_dapo": {"aggregation": "token_mean", "kl_coef": 0.04},
    # DeepSeekMath (arXiv:2402.03300): sequence mean, KL 0.04.
    "deepseekmath_grpo": {"aggregation": "sequence_mean", "kl_coef": 0.04},
    # DeepSeek-V3.2 (arXiv:2512.02556): KL weighted by the ratio, its strength chosen by domain (pass kl_coef); its
    # off-policy sequence mask is rollout_correction's.
    "deepseek_v32": {"aggregation": "sequence_mean", "kl_gradient": "importance_weighted"},
}  # fmt: skip
