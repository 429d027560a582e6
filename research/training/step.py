"""One training step: gradients summed over micro-batches, clipping, and the update."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layers.sharding import spec
from research.parallel import zero
from research.parallel.rules import batch_axes
from research.training import router_metrics, trainable
from research.training.config import TrainingConfig
from research.training.objectives import Batch, NextToken, Objective
from research.training.optimizers import make_optimizer, make_schedule, wide
from research.training.state import TrainState

_SMALLEST_DENOMINATOR = 1e-6  # avoids a division by 0 if a batch is all padding
# (model, batch, key, frozen=None) → (gradients, denominator, sums to report)
Gradients = Callable[..., tuple[Any, jax.Array, dict[str, jax.Array]]]


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The ``metrics`` that are scalars, as Python numbers."""
    return {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}


def split_batch(batch: Batch, parts: int, rows_together: int = 1) -> Batch:
    """Split a batch into micro-batches: ``[b, …]`` → ``[parts, b / parts, …]``.

    Each micro-batch is sharded over all devices. ``rows_together`` consecutive rows stay together.
    """

    def split(name, x):
        rows, *other_axes = batch_axes(name, x.ndim)
        if rows_together > 1:
            groups = (x.shape[0] // rows_together, rows_together, *x.shape[1:])
            x = jnp.reshape(x, groups, out_sharding=spec(rows, None, *other_axes))
            other_axes = (None, *other_axes)
        shape = (x.shape[0] // parts, parts, *x.shape[1:])
        x = jnp.reshape(x, shape, out_sharding=spec(rows, None, *other_axes))
        x = jnp.moveaxis(x, 1, 0)
        if rows_together > 1:
            shape = (parts, -1, *x.shape[3:])
            x = jnp.reshape(x, shape, out_sharding=spec(None, rows, *other_axes[1:]))
        return x

    return {name: split(name, x) for name, x in batch.items()}


def make_gradients(
    config: TrainingConfig,
    objective: Objective | None = None,
    stage: int = 3,
    patterns: Sequence[str] = trainable.ALL,
) -> Gradients:
    """``gradients(model, batch, key, frozen=None)`` → ``(gradients, denominator, sums to report)``.

    `finish` turns the first into the gradient of the objective's total over its denominator, both
    summed over all micro-batches of ``config``: one division, for any number of micro-batches.
    Before `finish` the gradients have the sharding of the ``stage`` of ZeRO. They are None for
    parameters that ``patterns`` do not match.
    """
    microbatches, objective = config.gradient_accumulation, objective or default_objective(config)

    def gradients(model, batch: Batch, key: jax.Array, frozen: Any = None):
        variables, join = zero.differentiated(model, stage, late=microbatches > 1)
        variables, fixed = trainable.split(variables, patterns)

        def of_microbatch(batch, key):
            def sums(variables):
                result = objective(join(trainable.join(variables, fixed)), batch, key, frozen)
                return result.total, (result.denominator, dict(result.reported))

            total, pull, (denominator, reported) = jax.vjp(sums, variables, has_aux=True)
            del total
            return pull, denominator, reported

        if microbatches == 1:
            pull, denominator, reported = of_microbatch(batch, key)
            denominator = jnp.maximum(denominator, _SMALLEST_DENOMINATOR)
            return pull(1 / denominator)[0], denominator, reported

        def gradient_sums(microbatch):
            pull, denominator, reported = of_microbatch(*microbatch)
            # of parameters in fewer bits, too, gradients are summed in float32
            return wide(pull(jnp.ones_like(denominator))[0]), denominator, reported

        def add(carry, microbatch):
            return jax.tree.map(jnp.add, carry, gradient_sums(microbatch)), None

        stacked = (
            split_batch(batch, microbatches, objective.rows_together),
            jax.random.split(key, microbatches),
        )
        first, remaining = (jax.tree.map(lambda a, i=i: a[i], stacked) for i in (0, slice(1, None)))
        (total, denominator, reported), _ = jax.lax.scan(add, gradient_sums(first), remaining)
        return total, jnp.maximum(denominator, _SMALLEST_DENOMINATOR), reported

    return gradients


def finish(gradients: Any, denominator: jax.Array, config: TrainingConfig) -> Any:
    """``gradients`` of `make_gradients`, reduced to their stored sharding and divided.

    With one micro-batch the division is part of the backward pass already, where it costs nothing.
    Sums over several are divided after the reduction: XLA does not recognise a reduce-scatter
    otherwise.
    """
    gradients = zero.to_stored_sharding(gradients)
    if config.gradient_accumulation == 1:
        return gradients
    return jax.tree.map(lambda g: g * (1 / denominator).astype(g.dtype), gradients)


def default_objective(config: TrainingConfig) -> Objective:
    """The default objective of a run: the next token."""
    return NextToken(config.z_loss)


@functools.lru_cache(maxsize=64)
def make_step(
    config: TrainingConfig,
    objective: Objective | None = None,
    stage: int = 3,
    *,
    patterns: tuple[str, ...] = trainable.ALL,
    offload: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A compiled ``step(state, batch, frozen=None) -> (state, metrics)``; ``state`` is donated.

    Equal arguments return the same function, so that a second run with the same shapes compiles
    nothing. ``stage``: of ZeRO; without effect on one device. ``patterns``: of the trained
    parameters. ``offload``: moments are stored in the host's memory.
    """
    objective = objective or default_objective(config)
    optimizer = make_optimizer(config.optimizer, config.steps, offload=offload)
    schedule = make_schedule(config.optimizer, config.steps)
    gradients_of_batch = make_gradients(config, objective, stage, patterns)

    def step(state: TrainState, batch: Batch, frozen: Any = None):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        gradients, denominator, sums = gradients_of_batch(state.model, batch, key, frozen)
        gradients = finish(gradients, denominator, config)
        reported = objective.metrics(sums, denominator)
        metrics = router_metrics.named_by_scope(reported, config.gradient_accumulation)
        metrics["gradient_norm"] = optax.tree.norm(wide(gradients))
        metrics["learning_rate"] = schedule(state.step)
        metrics["weight"] = denominator
        state = state.apply(gradients, optimizer, stage, patterns)
        if router_metrics.CHOICES in sums:
            state = state.rebalance(sums[router_metrics.CHOICES], patterns)
        return state, metrics

    return jax.jit(step, donate_argnums=0)


@functools.lru_cache(maxsize=8)
def make_eval_step(
    objective: Objective,
) -> Callable[[Any, Batch, Any], tuple[jax.Array, dict[str, jax.Array]]]:
    """A compiled ``eval_step(model, batch, frozen)``: the denominator and sums of a batch."""

    def step(model, batch, frozen):
        sums = objective(model, batch, None, frozen)
        return sums.denominator, dict(sums.reported)

    return jax.jit(step)
