"""Training: a step, a loop that can be killed at any moment, and what it leaves behind."""

from research.training.config import TrainingConfig
from research.training.disk import WriteError
from research.training.divergence import DivergenceError
from research.training.evaluate import evaluate
from research.training.feed import DataError
from research.training.loop import Preempted, TrainResult, train
from research.training.optimizers import OptimizerConfig
from research.training.workdir import load_model, save_model

__all__ = [
    "DataError",
    "DivergenceError",
    "OptimizerConfig",
    "Preempted",
    "TrainResult",
    "TrainingConfig",
    "WriteError",
    "evaluate",
    "load_model",
    "save_model",
    "train",
]
