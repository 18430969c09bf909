"""GRPO losses for language models in one pass over the logits: fused kernels behind thin autograd functions."""

from .advantages import GroupAdvantages, group_advantages
from .backends import available_backends
from .config import LossConfig
from .controllers import AdaptiveEntropyController, AdaptiveKLController
from .correction import RolloutCorrection, rollout_correction
from .correction_config import CorrectionConfig, RejectionFilter
from .diversity import GroupDiversity, group_diversity
from .kl import kl_divergence
from .linear import LinearGRPOLoss, linear_grpo_loss, linear_token_logps
from .logps import TokenLogps, token_logps
from .losses import GRPOLoss, grpo_loss
from .policy import LossOutput, policy_loss

__version__ = "0.1.0"

__all__ = [
    "LossConfig",
    "token_logps",
    "linear_token_logps",
    "TokenLogps",
    "policy_loss",
    "grpo_loss",
    "linear_grpo_loss",
    "LossOutput",
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
    "available_backends",
]
