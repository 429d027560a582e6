"""One training step: loss, gradients over micro-batches, clipping, update."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from layers.decoder import Decoder
from layers.sharding import spec
from research.training.config import TrainingConfig
from research.training.optimizers import make_optimizer, make_schedule
from research.training.state import TrainState

Batch = Mapping[str, jax.Array]
# (model, batch, z_loss) → (sum to minimise, sums of other things to report), over the batch
LossFn = Callable[[Decoder, Batch, float], tuple[jax.Array, dict[str, jax.Array]]]


def cross_entropy(logits_btv: jax.Array, targets_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(−log softmax(logits)[target], log Σ exp(logits))``, float32 ``[b, t]`` each."""
    logits_btv = logits_btv.astype(jnp.float32)
    norm_bt = jax.nn.logsumexp(logits_btv, axis=-1)
    # A sum against a mask rather than a gather: the vocabulary may be sharded.
    hit_btv = targets_bt[..., None] == jnp.arange(logits_btv.shape[-1])
    return norm_bt - jnp.sum(jnp.where(hit_btv, logits_btv, 0.0), axis=-1), norm_bt


def next_token_loss(
    model: Decoder, batch: Batch, z_loss: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sums over a batch: cross-entropy in nats, plus ``z_loss · log²Z`` (PaLM, §5).

    Returns the sum to minimise, and the sums ``loss`` (cross-entropy alone), ``accuracy`` and
    ``z_loss``.
    """
    output = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    weights_bt = batch["weights"]
    nats_bt, norm_bt = cross_entropy(output.logits_btv, batch["targets"])
    right_bt = jnp.argmax(output.logits_btv, axis=-1) == batch["targets"]
    sums = {
        "loss": jnp.sum(nats_bt * weights_bt),
        "accuracy": jnp.sum(right_bt * weights_bt),
        "z_loss": jnp.sum(jnp.square(norm_bt) * weights_bt),
    }
    return sums["loss"] + z_loss * sums["z_loss"], sums


def split_batch(batch: Batch, parts: int) -> Batch:
    """``[b, …]`` arrays as ``[parts, b / parts, …]``, every part spread over all devices."""

    def split(x):
        shape = (x.shape[0] // parts, parts, *x.shape[1:])
        rest = (None,) * (x.ndim - 2)
        x = jnp.reshape(x, shape, out_sharding=spec("batch", None, "time", *rest))
        return jnp.moveaxis(x, 1, 0)

    return {name: split(x) for name, x in batch.items()}


@functools.lru_cache(maxsize=64)
def make_step(
    config: TrainingConfig, loss_fn: LossFn = next_token_loss
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A compiled ``step(state, batch) -> (state, metrics)``; ``state`` is donated.

    The gradient is that of the loss per unit of label weight over the whole batch, whatever the
    number of micro-batches. The same ``config`` gives the same function, so that a second run of
    the same shapes compiles nothing.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    parts = config.gradient_accumulation

    def gradient(model, batch, total):
        def mean_loss(model):
            loss, sums = loss_fn(model, batch, config.z_loss)
            return loss / total, sums

        return jax.grad(mean_loss, has_aux=True)(model)

    def step(state: TrainState, batch: Batch):
        # a batch of padding alone must not divide by 0
        total = jnp.maximum(jnp.sum(batch["weights"]), 1e-6)
        if parts == 1:
            gradients, sums = gradient(state.model, batch, total)
        else:

            def add(carry, part):
                return jax.tree.map(jnp.add, carry, gradient(state.model, part, total)), None

            split = split_batch(batch, parts)
            first, rest = ({k: v[i] for k, v in split.items()} for i in (0, slice(1, None)))
            carry = gradient(state.model, first, total)
            (gradients, sums), _ = jax.lax.scan(add, carry, rest)
        metrics = {name: value / total for name, value in sums.items()}
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["learning_rate"] = schedule(state.step)
        metrics["weight"] = total
        return state.apply(gradients, optimizer), metrics

    return jax.jit(step, donate_argnums=0)


@functools.lru_cache(maxsize=8)
def make_eval_step(
    loss_fn: LossFn = next_token_loss,
) -> Callable[[Decoder, Batch], dict[str, jax.Array]]:
    """A compiled ``eval_step(model, batch)``: weighted sums over the batch and its ``weight``."""

    def step(model, batch):
        _, sums = loss_fn(model, batch, 0.0)
        return {**sums, "weight": jnp.sum(batch["weights"])}

    return jax.jit(step)
