"""What a GRPO step costs in bytes: measured by `profile_memory()`, predicted by `predict()` where it does not fit."""

from .formulas import FORMULAS
from .predict import Prediction, largest_batch, predict
from .profile import CudaCounters, Holding, MemoryProfile, Phase, profile_memory
from .shape import LossShape, Moment
from .snapshot import load_snapshot, snapshot_profile
from .training import PRECISIONS, TrainingMemory, training_memory

__all__ = [
    "profile_memory",
    "MemoryProfile",
    "Holding",
    "Phase",
    "CudaCounters",
    "load_snapshot",
    "snapshot_profile",
    "LossShape",
    "predict",
    "Prediction",
    "Moment",
    "FORMULAS",
    "largest_batch",
    "training_memory",
    "TrainingMemory",
    "PRECISIONS",
]
