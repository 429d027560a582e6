"""One training step: loss, gradients over micro-batches, clipping, update."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layers.decoder import Decoder
from layers.moe import RouterStats, load_entropy
from layers.sharding import spec
from research.parallel import zero
from research.training.config import TrainingConfig
from research.training.optimizers import make_optimizer, make_schedule
from research.training.state import TrainState

Batch = Mapping[str, jax.Array]
# (model, batch, z_loss, key of what is random in training or None)
# → (sum to minimise, sums of other things to report), over the batch
LossFn = Callable[[Decoder, Batch, float, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


# sums of `router_sums` that are not reported per unit of label weight
_ROUTED = ("router_choices", "router_asked", "router_dropped")


def cross_entropy(logits_btv: jax.Array, targets_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(−log softmax(logits)[target], log Σ exp(logits))``, float32 ``[b, t]`` each."""
    logits_btv = logits_btv.astype(jnp.float32)
    norm_bt = jax.nn.logsumexp(logits_btv, axis=-1)
    # A sum against a mask rather than a gather: the vocabulary may be sharded.
    hit_btv = targets_bt[..., None] == jnp.arange(logits_btv.shape[-1])
    return norm_bt - jnp.sum(jnp.where(hit_btv, logits_btv, 0.0), axis=-1), norm_bt


def next_token_loss(
    model: Decoder, batch: Batch, z_loss: float = 0.0, key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sums over a batch: cross-entropy in nats, plus ``z_loss · log²Z`` (PaLM, §5).

    Returns the sum to minimise, and the sums ``loss`` (cross-entropy alone), ``accuracy`` and
    ``z_loss``. Of a model with mixtures of experts, what to minimise holds their own losses too,
    and the sums those of `router_sums`.
    """
    output = model(batch["tokens"], batch["positions"], batch["segment_ids"], key=key)
    weights_bt = batch["weights"]
    nats_bt, norm_bt = cross_entropy(output.logits_btv, batch["targets"])
    right_bt = jnp.argmax(output.logits_btv, axis=-1) == batch["targets"]
    sums = {
        "loss": jnp.sum(nats_bt * weights_bt),
        "accuracy": jnp.sum(right_bt * weights_bt),
        "z_loss": jnp.sum(jnp.square(norm_bt) * weights_bt),
    }
    total = sums["loss"] + z_loss * sums["z_loss"]
    if output.aux is None:
        return total, sums
    weight = jnp.sum(weights_bt)
    return total + weight * jnp.sum(output.aux.loss), sums | router_sums(output.aux, weight)


def router_sums(stats: RouterStats, weight: jax.Array) -> dict[str, jax.Array]:
    """What `report` makes router metrics of: losses times ``weight``, choices ``[layers, e]``."""
    return {
        "router_balance": weight * jnp.mean(stats.balance),
        "router_z": weight * jnp.mean(stats.z),
        "router_choices": stats.counts_e,
        "router_asked": jnp.sum(stats.asked),
        "router_dropped": jnp.sum(stats.dropped),
    }


def report(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of ``sums`` over any number of batches: each over their ``weight``, its own sum.

    Of mixtures of experts: ``router_balance`` and ``router_z`` (their losses, mean over layers),
    ``router_choices`` (tokens that chose each expert, ``[layers, e]``), ``router_entropy`` of them
    (1 is even), and ``router_drop_rate``, the share of choices that no expert took.
    """
    sums = dict(sums)
    weight = sums.pop("weight")
    routed = {name: sums.pop(name) for name in _ROUTED if name in sums}
    metrics = {name: value / weight for name, value in sums.items()}
    if routed:
        choices, asked, dropped = (routed[name] for name in _ROUTED)
        metrics["router_choices"] = choices
        metrics["router_entropy"] = load_entropy(choices)
        metrics["router_drop_rate"] = dropped / jnp.maximum(asked, 1)
    return metrics


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The ``metrics`` that are one number."""
    return {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}


def split_batch(batch: Batch, parts: int) -> Batch:
    """``[b, …]`` arrays as ``[parts, b / parts, …]``, every part spread over all devices."""

    def split(x):
        shape = (x.shape[0] // parts, parts, *x.shape[1:])
        rest = (None,) * (x.ndim - 2)
        x = jnp.reshape(x, shape, out_sharding=spec("batch", None, "time", *rest))
        return jnp.moveaxis(x, 1, 0)

    return {name: split(x) for name, x in batch.items()}


def make_gradients(
    config: TrainingConfig, loss_fn: LossFn = next_token_loss, stage: int = 3
) -> Callable[[Decoder, Batch, jax.Array], tuple[Decoder, dict[str, jax.Array]]]:
    """``gradients(model, batch, key) -> (gradients, sums)`` over all micro-batches of ``config``.

    The gradient is that of the loss per unit of label weight over the whole batch, whatever the
    number of micro-batches, and is kept as ``stage`` of ZeRO says; `zero.settle` it.
    """
    parts = config.gradient_accumulation

    def gradients(model: Decoder, batch: Batch, key: jax.Array):
        # a batch of padding alone must not divide by 0
        total = jnp.maximum(jnp.sum(batch["weights"]), 1e-6)
        variables, join = zero.differentiated(model, stage, late=parts > 1)

        def one(batch, key):
            def mean_loss(variables):
                loss, sums = loss_fn(join(variables), batch, config.z_loss, key)
                return loss / total, sums

            return jax.grad(mean_loss, has_aux=True)(variables)

        if parts == 1:
            found, sums = one(batch, key)
        else:

            def add(carry, part):
                return jax.tree.map(jnp.add, carry, one(*part)), None

            split = split_batch(batch, parts), jax.random.split(key, parts)
            first, rest = (jax.tree.map(lambda a, i=i: a[i], split) for i in (0, slice(1, None)))
            (found, sums), _ = jax.lax.scan(add, one(*first), rest)
        return found, {**sums, "weight": total}

    return gradients


@functools.lru_cache(maxsize=64)
def make_step(
    config: TrainingConfig,
    loss_fn: LossFn = next_token_loss,
    stage: int = 3,
    *,
    offload: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A compiled ``step(state, batch) -> (state, metrics)``; ``state`` is donated.

    The same ``config`` gives the same function, so that a second run of the same shapes compiles
    nothing. ``stage`` is of ZeRO and of no consequence on one device. ``offload``: moments come
    from the host's memory and go there.
    """
    optimizer = make_optimizer(config.optimizer, config.steps, offload=offload)
    schedule = make_schedule(config.optimizer, config.steps)
    of_batch = make_gradients(config, loss_fn, stage)

    def step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        gradients, sums = of_batch(state.model, batch, key)
        gradients = zero.settle(gradients)
        metrics = report(sums)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["learning_rate"] = schedule(state.step)
        metrics["weight"] = sums["weight"]
        state = state.apply(gradients, optimizer, stage)
        if "router_choices" in metrics:
            state.model.rebalance(metrics["router_choices"])
        return state, metrics

    return jax.jit(step, donate_argnums=0)


@functools.lru_cache(maxsize=8)
def make_eval_step(
    loss_fn: LossFn = next_token_loss,
) -> Callable[[Decoder, Batch], dict[str, jax.Array]]:
    """A compiled ``eval_step(model, batch)``: weighted sums over the batch and its ``weight``."""

    def step(model, batch):
        _, sums = loss_fn(model, batch, 0.0, None)
        return {**sums, "weight": jnp.sum(batch["weights"])}

    return jax.jit(step)
