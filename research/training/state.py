"""The state of a training run, as one pytree."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from layers.config import check
from layers.decoder import DecoderConfig
from layers.sharding import named_axes
from research.parallel import shardings
from research.parallel.rules import with_shardings
from research.parallel.zero import to_stored_sharding
from research.training import trainable
from research.training.models import ModelConfig, build
from research.training.offload import to_host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimiser moments, step and random key; the data iterator is saved beside it."""

    model: Any
    optimizer: Any
    step: jax.Array  # int32, completed steps
    key: jax.Array  # uint32, a key's data

    @classmethod
    def begin(
        cls,
        model: Any,
        optimizer: optax.GradientTransformation,
        seed: int | jax.Array,
        patterns: Sequence[str] = trainable.ALL,
    ) -> "TrainState":
        """The state of step 0; moments exist only for the parameters that ``patterns`` match."""
        params, _ = trainable.split(model, patterns)
        key = jax.random.key_data(jax.random.key(seed))
        return cls(model, optimizer.init(params), jnp.zeros((), jnp.int32), key)

    def apply(
        self,
        gradients: Any,
        optimizer: optax.GradientTransformation,
        stage: int = 3,
        patterns: Sequence[str] = trainable.ALL,
    ) -> "TrainState":
        """The state after one update by ``optimizer``, in the stored sharding of ZeRO's ``stage``.

        Each device updates the shard of the parameters whose moments it stores.
        """
        params, fixed = trainable.split(self.model, patterns)
        params: Any = to_stored_sharding(params)
        updates, moments = optimizer.update(gradients, self.optimizer, params)
        params = to_stored_sharding(optax.apply_updates(params, updates), split=stage == 3)
        model = trainable.join(params, fixed)
        return TrainState(model, to_stored_sharding(moments), self.step + 1, self.key)

    def rebalance(
        self, counts_le: jax.Array, patterns: Sequence[str] = trainable.ALL
    ) -> "TrainState":
        """The state after `Decoder.rebalance`; only biases that ``patterns`` match change."""
        _, fixed = trainable.split(self.model, patterns)
        self.model.rebalance(counts_le)
        params, _ = trainable.split(self.model, patterns)
        return dataclasses.replace(self, model=trainable.join(params, fixed))


def abstract_state(
    model: DecoderConfig | ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    stage: int = 3,
    *,
    patterns: Sequence[str] = trainable.ALL,
    offload: bool = False,
) -> TrainState:
    """The state of training ``model`` as `jax.ShapeDtypeStruct` with stored shardings on ``mesh``.

    Nothing is allocated, and the devices of ``mesh`` need not exist. ``stage`` is that of ZeRO,
    ``offload`` that of ``optimizer``.

    Raises:
      ConfigError: stage 1 of an optimiser none of whose moments ``fsdp`` shards, or 8-bit moments
        whose blocks would cross shards.
    """
    state = jax.eval_shape(
        lambda: TrainState.begin(build(model, nnx.Rngs(0)), optimizer, 0, patterns)
    )
    moments = shardings(state.optimizer, mesh)
    _check_blocks(state.optimizer, moments)
    any_sharded = any("fsdp" in named_axes(s.spec) for s in jax.tree.leaves(moments))
    check(
        stage > 1 or any_sharded,
        "mesh.zero",
        stage,
        "changes nothing: fsdp shards no moment of the optimiser",
    )
    model_shardings = shardings(state.model, mesh, split=stage == 3)
    if offload:
        moments = to_host(moments, state.optimizer)
    state_shardings = dataclasses.replace(
        shardings(state, mesh), model=model_shardings, optimizer=moments
    )
    return with_shardings(state, state_shardings)


def _check_blocks(moments: Any, stored: Any) -> None:
    """Raise `ConfigError` for 8-bit moments whose scales cannot be sharded like their codes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(moments)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(stored), strict=True):
        for size, axis in zip(leaf.shape, sharding.spec, strict=False):
            ways = sharding.mesh.shape[axis] if axis else 1
            check(
                size % ways == 0,
                "optimizer.moments",
                "8bit",
                f"mesh.{axis}={ways} must divide the {size} blocks of "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')}",
            )
