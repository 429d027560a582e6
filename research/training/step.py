"""One training step: gradients over micro-batches, clipping, update."""

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
from research.training.optimizers import make_optimizer, make_schedule
from research.training.state import TrainState

_LEAST = 1e-6  # a batch of padding alone must not divide by 0
# (model, batch, key, frozen=None) → (gradients, denominator, sums to report)
Gradients = Callable[..., tuple[Any, jax.Array, dict[str, jax.Array]]]


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The ``metrics`` that are one number."""
    return {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}


def split_batch(batch: Batch, parts: int, rows_together: int = 1) -> Batch:
    """``[b, …]`` arrays as ``[parts, b / parts, …]``, every part spread over all devices.

    ``rows_together`` consecutive rows stay consecutive rows of one part.
    """

    def split(name, x):
        rows, *rest = batch_axes(name, x.ndim)
        if rows_together > 1:
            groups = (x.shape[0] // rows_together, rows_together, *x.shape[1:])
            x = jnp.reshape(x, groups, out_sharding=spec(rows, None, *rest))
            rest = (None, *rest)
        shape = (x.shape[0] // parts, parts, *x.shape[1:])
        x = jnp.reshape(x, shape, out_sharding=spec(rows, None, *rest))
        x = jnp.moveaxis(x, 1, 0)
        if rows_together > 1:
            shape = (parts, -1, *x.shape[3:])
            x = jnp.reshape(x, shape, out_sharding=spec(None, rows, *rest[1:]))
        return x

    return {name: split(name, x) for name, x in batch.items()}


def make_gradients(
    config: TrainingConfig,
    objective: Objective | None = None,
    stage: int = 3,
    patterns: Sequence[str] = trainable.ALL,
) -> Gradients:
    """``gradients(model, batch, key, frozen=None)`` of a whole batch: ``(gradients, denominator,
    sums to report)``.

    `finish` makes them the gradient of the objective's total over its denominator, both over all
    micro-batches of ``config``: divided once, whatever their number. Till then they are kept as
    ``stage`` of ZeRO says. They have None for what ``patterns`` do not train.
    """
    parts, objective = config.gradient_accumulation, objective or default_objective(config)

    def gradients(model, batch: Batch, key: jax.Array, frozen: Any = None):
        variables, join = zero.differentiated(model, stage, late=parts > 1)
        variables, fixed = trainable.split(variables, patterns)

        def of_part(batch, key):
            def sums(variables):
                found = objective(join(trainable.join(variables, fixed)), batch, key, frozen)
                return found.total, (found.denominator, dict(found.reported))

            total, pull, (denominator, reported) = jax.vjp(sums, variables, has_aux=True)
            del total
            return pull, denominator, reported

        if parts == 1:
            pull, denominator, reported = of_part(batch, key)
            denominator = jnp.maximum(denominator, _LEAST)
            return pull(1 / denominator)[0], denominator, reported

        def found(part):
            pull, denominator, reported = of_part(*part)
            return pull(jnp.ones_like(denominator))[0], denominator, reported

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, found(part)), None

        split = split_batch(batch, parts, objective.rows_together), jax.random.split(key, parts)
        first, rest = (jax.tree.map(lambda a, i=i: a[i], split) for i in (0, slice(1, None)))
        (total, denominator, reported), _ = jax.lax.scan(add, found(first), rest)
        return total, jnp.maximum(denominator, _LEAST), reported

    return gradients


def finish(gradients: Any, denominator: jax.Array, config: TrainingConfig) -> Any:
    """``gradients`` of `make_gradients`, reduced and in their stored sharding, and divided.

    One micro-batch's were divided in the backward pass already, where it costs nothing. Sums are
    divided after the reduction, which XLA would not recognise otherwise.
    """
    gradients = zero.to_stored_sharding(gradients)
    if config.gradient_accumulation == 1:
        return gradients
    return jax.tree.map(lambda g: g * (1 / denominator).astype(g.dtype), gradients)


def default_objective(config: TrainingConfig) -> Objective:
    """The objective of a run that names none: the next token."""
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

    The same arguments give the same function, so that a second run of the same shapes compiles
    nothing. ``stage`` is of ZeRO and of no consequence on one device. ``patterns``: what is
    trained. ``offload``: moments come from the host's memory and go there.
    """
    objective = objective or default_objective(config)
    optimizer = make_optimizer(config.optimizer, config.steps, offload=offload)
    schedule = make_schedule(config.optimizer, config.steps)
    of_batch = make_gradients(config, objective, stage, patterns)

    def step(state: TrainState, batch: Batch, frozen: Any = None):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        gradients, denominator, sums = of_batch(state.model, batch, key, frozen)
        gradients = finish(gradients, denominator, config)
        found = objective.metrics(sums, denominator)
        metrics = router_metrics.named_by_scope(found, config.gradient_accumulation)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["learning_rate"] = schedule(state.step)
        metrics["weight"] = denominator
        state = state.apply(gradients, optimizer, stage, patterns)
        if router_metrics.CHOICES in sums:
            state.model.rebalance(sums[router_metrics.CHOICES])
        return state, metrics

    return jax.jit(step, donate_argnums=0)


@functools.lru_cache(maxsize=8)
def make_eval_step(
    objective: Objective,
) -> Callable[[Any, Batch, Any], tuple[jax.Array, dict[str, jax.Array]]]:
    """A compiled ``eval_step(model, batch, frozen)``: the batch's denominator and sums."""

    def step(model, batch, frozen):
        found = objective(model, batch, None, frozen)
        return found.denominator, dict(found.reported)

    return jax.jit(step)
