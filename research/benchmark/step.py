"""A training step of a whole model, ours and PyTorch's, prepared to be timed in turn.

Both are forward, backward and AdamW on one batch of random tokens, float32. Each returns its loss.
The first loss, and its decrease after the first update, must agree before anything is timed.
"""

import importlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.config import check, check_choice
from layers.decoder import Decoder
from research.benchmark import measure
from research.benchmark.run import compare
from research.training import OptimizerConfig, TrainingConfig
from research.training.optimizers import make_optimizer
from research.training.state import TrainState
from research.training.step import make_step

OURS = "ours/xla"
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", clip_norm=None)


def choose(names: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    """``names``, each of which must be one of those ``known``; None: all of them.

    Raises:
      ConfigError: an unknown name, no name, or a platform other than a CPU.
    """
    for name in names or ():
        check_choice("cases", name, known)
    check(names is None or len(names) > 0, "cases", names, "must name at least one")
    platform = jax.default_backend()
    check(
        platform == "cpu", "platform", platform, "must be cpu: whole models are measured on a CPU"
    )
    return list(known) if names is None else list(names)


def check_quiet() -> None:
    """Raise `ConfigError` if others use this machine: such measurements must not be recorded.

    PyTorch's threads wait for one another at every operation. A core that others use costs theirs
    several times what it costs ours, and ratios of rounds do not correct for that.
    """
    load, most = os.getloadavg()[0], 0.5 * (os.cpu_count() or 1)
    check(load <= most, "load", round(load, 2), f"must be at most {most:g} before --record")


def batch(rows: int, tokens: int, vocab: int) -> dict[str, np.ndarray]:
    """Random tokens in the form of a batch of `research.training`."""
    ids = np.random.default_rng(0).integers(0, vocab, (rows, tokens + 1)).astype(np.int32)
    shape = (rows, tokens)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": np.broadcast_to(np.arange(tokens, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }


def _prepared(step: Callable[[], float], **about: Any) -> measure.Prepared:
    def values(first: float) -> list[np.ndarray]:
        return [np.array(first), np.array(first - step())]

    return measure.Prepared(step, values, **about)


def prepare_ours(
    model: Decoder, arrays: Mapping[str, np.ndarray], optimizer: OptimizerConfig
) -> measure.Prepared:
    """The step of `research.training`, compiled; each step donates the state to the next one."""
    training = TrainingConfig(steps=1, optimizer=optimizer)
    state = TrainState.begin(model, make_optimizer(optimizer, 1), 0)
    on_device = jax.tree.map(jnp.asarray, dict(arrays))
    started = time.perf_counter()
    compiled = make_step(training).lower(state, on_device).compile()
    seconds = time.perf_counter() - started
    analysis = compiled.memory_analysis()
    current = [state]

    def step() -> float:
        current[0], metrics = compiled(current[0], on_device)
        return float(metrics["loss"])

    temp = None if analysis is None else int(analysis.temp_size_in_bytes)
    return _prepared(step, compile_seconds=seconds, temp_bytes=temp)


def prepare_torch(
    loss_of: Callable[[Any, Any], Any],
    parameters: Iterable[Any],
    arrays: Mapping[str, np.ndarray],
    optimizer: OptimizerConfig,
) -> measure.Prepared:
    """``loss_of(tokens, targets)``, its backward pass, and PyTorch's fused AdamW."""
    torch = importlib.import_module("torch")
    parameters = list(parameters)
    # as in ours: no weight decay of biases and norms
    groups = [
        {
            "params": [p for p in parameters if (p.ndim > 1) == decays],
            "weight_decay": optimizer.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    betas = optimizer.b1, optimizer.b2
    adamw = torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=betas, fused=True)
    tokens, targets = (
        torch.tensor(arrays[name], dtype=torch.long) for name in ("tokens", "targets")
    )

    def step() -> float:
        loss = loss_of(tokens, targets)
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        adamw.step()
        return loss.item()

    return _prepared(step)


def rows(
    prepared: Mapping[str, measure.Prepared],
    flops: float,
    rounds: int,
    seconds: float,
    deadline: float,
    clock: measure.Clock,
) -> dict[str, dict[str, Any]]:
    """A row of the record for each of ``prepared``: its times, or the reason why it has none.

    ``flops``: of a step, by the equations of the model. A step is timed right after another step of
    the same contestant, as in training. After a step of another contestant it can take 1.5 times as
    long.
    """
    absent = measure.warm(prepared, measure.Agreement(), deadline, clock)
    runs = {who: one.run for who, one in prepared.items() if who not in absent}
    times, failed = measure.interleave(runs, rounds, seconds, deadline, clock, ahead=1)
    absent |= failed
    result: dict[str, dict[str, Any]] = {}
    for who, one in prepared.items():
        if who in absent:
            result[who] = {"absent": absent[who]}
            continue
        result[who] = measure.describe(times[who]) | {
            "compile_seconds": one.compile_seconds,
            "temp_bytes": one.temp_bytes,
        }
        result[who]["flops_per_second"] = flops / result[who]["median"]
    compare(result)
    return result
