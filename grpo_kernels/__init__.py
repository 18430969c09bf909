"""GRPO losses for language models in one pass over the logits: fused kernels behind thin autograd functions."""

from .advantages.critic import ValueLoss, value_loss, whiten
from .advantages.diversity import GroupDiversity, group_diversity
from .advantages.estimators import gdpo_advantages, gpg_advantages, pass_at_k_advantages, process_advantages
from .advantages.group import GroupAdvantages, group_advantages
from .advantages.returns import TokenAdvantages, gae, reinforce_plus_plus, reinforce_plus_plus_baseline, remax
from .advantages.token_baselines import optimal_token_baseline
from .backends import available_backends
from .config import LossConfig
from .correction.config import CorrectionConfig, RejectionFilter
from .correction.controllers import AdaptiveEntropyController, AdaptiveKLController
from .correction.kl import kl_divergence
from .correction.rollout import RolloutCorrection, rollout_correction
from .loss.details import TokenDetails, token_details
from .loss.grpo import GRPOLoss, grpo_loss
from .loss.linear import LinearGRPOLoss, LinearTokenLogps, linear_grpo_loss, linear_token_logps
from .loss.logps import TokenLogps, token_logps
from .loss.metrics import Metrics, combine_metrics
from .loss.policy import LossOutput, policy_loss

__version__ = "0.1.0"

__all__ = [
    "LossConfig",
    "token_logps",
    "linear_token_logps",
    "TokenLogps",
    "LinearTokenLogps",
    "policy_loss",
    "grpo_loss",
    "linear_grpo_loss",
    "LossOutput",
    "Metrics",
    "combine_metrics",
    "token_details",
    "TokenDetails",
    "GRPOLoss",
    "LinearGRPOLoss",
    "group_advantages",
    "GroupAdvantages",
    "rollout_correction",
    "RolloutCorrection",
    "CorrectionConfig",
    "RejectionFilter",
    "kl_divergence",
    "AdaptiveKLController",
    "AdaptiveEntropyController",
    "group_diversity",
    "GroupDiversity",
    "pass_at_k_advantages",
    "gdpo_advantages",
    "gpg_advantages",
    "process_advantages",
    "gae",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "optimal_token_baseline",
    "TokenAdvantages",
    "value_loss",
    "ValueLoss",
    "whiten",
    "available_backends",
]
