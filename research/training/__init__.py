"""Training: a step, a loop that can be killed at any moment, and what it leaves behind."""

from research.training.config import TrainingConfig
from research.training.divergence import DivergenceError
from research.training.evaluate import evaluate
from research.training.loop import Preempted, TrainResult, load_model, train
from research.training.optimizers import OptimizerConfig

__all__ = [
    "DivergenceError",
    "OptimizerConfig",
    "Preempted",
    "TrainResult",
    "TrainingConfig",
    "evaluate",
    "load_model",
    "train",
]
