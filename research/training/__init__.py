"""Training: objectives, the compiled step, the loop, its checkpoints and its metrics."""

from research.training.config import TrainingConfig
from research.training.disk import WriteError
from research.training.divergence import DivergenceError
from research.training.evaluate import evaluate
from research.training.loop import TrainResult, train
from research.training.models import ModelConfig
from research.training.objectives import NextToken, Objective, Sums
from research.training.optimizers import OptimizerConfig
from research.training.source import DataError, Source
from research.training.stopping import Preempted
from research.training.workdir import load_model, model_config, save_model

__all__ = [
    "DataError",
    "DivergenceError",
    "ModelConfig",
    "NextToken",
    "Objective",
    "OptimizerConfig",
    "Preempted",
    "Source",
    "Sums",
    "TrainResult",
    "TrainingConfig",
    "WriteError",
    "evaluate",
    "load_model",
    "model_config",
    "save_model",
    "train",
]
