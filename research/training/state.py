"""Everything a run must remember, as one pytree."""

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
    step: jax.Array  # int32, steps done
    key: jax.Array  # uint32, a key's data

    @classmethod
    def begin(
        cls,
        model: Any,
        optimizer: optax.GradientTransformation,
        seed: int | jax.Array,
        patterns: Sequence[str] = trainable.ALL,
    ) -> "TrainState":
        """Step 0 of training what ``patterns`` name of ``model``: moments are of nothing else."""
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
        """The state after one update by ``optimizer``, where the ``stage`` of ZeRO has it rest.

        Each device updates the share whose moments it has.
        """
        params, fixed = trainable.split(self.model, patterns)
        params: Any = to_stored_sharding(params)
        updates, moments = optimizer.update(gradients, self.optimizer, params)
        params = to_stored_sharding(optax.apply_updates(params, updates), split=stage == 3)
        model = trainable.join(params, fixed)
        return TrainState(model, to_stored_sharding(moments), self.step + 1, self.key)


def abstract_state(
    model: DecoderConfig | ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    stage: int = 3,
    *,
    patterns: Sequence[str] = trainable.ALL,
    offload: bool = False,
) -> TrainState:
    """The state of training ``model`` as `jax.ShapeDtypeStruct` with resting places on ``mesh``.

    Nothing is allocated, and ``mesh`` may be of devices that are not here. ``stage`` is of ZeRO,
    ``offload`` that of ``optimizer``.

    Raises:
      ConfigError: stage 1 of an optimiser none of whose moments ``fsdp`` splits, or 8-bit moments
        whose blocks ``mesh`` would split.
    """
    state = jax.eval_shape(
        lambda: TrainState.begin(build(model, nnx.Rngs(0)), optimizer, 0, patterns)
    )
    moments = shardings(state.optimizer, mesh)
    _check_blocks(state.optimizer, moments)
    something = any("fsdp" in named_axes(s.spec) for s in jax.tree.leaves(moments))
    check(
        stage > 1 or something,
        "mesh.zero",
        stage,
        "changes nothing: fsdp splits none of the optimiser's moments",
    )
    model_rests = shardings(state.model, mesh, split=stage == 3)
    if offload:
        moments = to_host(moments, state.optimizer)
    rests = dataclasses.replace(shardings(state, mesh), model=model_rests, optimizer=moments)
    return with_shardings(state, rests)


def _check_blocks(moments: Any, rests: Any) -> None:
    """Raise `ConfigError` for scales of 8-bit moments that cannot be split as the codes are."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(moments)
    for (path, leaf), rest in zip(leaves, jax.tree.leaves(rests), strict=True):
        for size, axis in zip(leaf.shape, rest.spec, strict=False):
            ways = rest.mesh.shape[axis] if axis else 1
            check(
                size % ways == 0,
                "optimizer.moments",
                "8bit",
                f"mesh {axis}={ways} would split the {size} blocks of "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')}",
            )
