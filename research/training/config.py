"""The configuration of a training run."""

import dataclasses

from layers.config import ConfigError, check, check_types
from research.training.optimizers import OptimizerConfig, make_schedule


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Number of steps, optimiser, and how often to evaluate, save and log.

    ``gradient_accumulation``: micro-batches per step; must divide the batch. ``z_loss``:
    coefficient of ``log²Z``. ``eval_every``, ``eval_batches``: held-out evaluation, also after the
    last step; 0 batches for none. ``checkpoint_every``: also saved after the last step. ``keep``:
    newest checkpoints that are kept, besides the one with the lowest held-out loss. ``log_every``:
    steps between two lines of the metrics.
    """

    steps: int
    optimizer: OptimizerConfig = OptimizerConfig()
    gradient_accumulation: int = 1
    z_loss: float = 0.0
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 10

    def __post_init__(self):
        check_types(self)
        for name in (
            "steps",
            "gradient_accumulation",
            "eval_every",
            "checkpoint_every",
            "keep",
            "log_every",
        ):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        check(self.steps < 2**31, "steps", self.steps, "must be < 2**31")
        check(self.z_loss >= 0, "z_loss", self.z_loss, "must be ≥ 0")
        check(self.eval_batches >= 0, "eval_batches", self.eval_batches, "must be ≥ 0")
        try:
            make_schedule(self.optimizer, self.steps)
        except ConfigError as error:
            raise ConfigError(f"optimizer.{str(error).removeprefix('optimizer.')}") from None
