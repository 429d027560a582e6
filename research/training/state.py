"""Everything a run must remember, as one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from layers.decoder import Decoder, DecoderConfig
from research.parallel import shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimiser moments, step and random key; the data iterator is saved beside it."""

    model: Decoder
    optimizer: Any
    step: jax.Array  # int32, steps done
    key: jax.Array  # uint32, a key's data

    @classmethod
    def begin(
        cls, model: Decoder, optimizer: optax.GradientTransformation, seed: int
    ) -> "TrainState":
        """Step 0 of training ``model``."""
        params: Any = model  # optax's types know only containers of the language
        key = jax.random.key_data(jax.random.key(seed))
        return cls(model, optimizer.init(params), jnp.zeros((), jnp.int32), key)

    def apply(self, gradients: Decoder, optimizer: optax.GradientTransformation) -> "TrainState":
        """The state after one update by ``optimizer``."""
        params: Any = self.model
        updates, moments = optimizer.update(gradients, self.optimizer, params)  # type: ignore[arg-type]
        model: Any = optax.apply_updates(params, updates)
        return TrainState(model, moments, self.step + 1, self.key)


def abstract_state(
    model: DecoderConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state of training ``model`` as `jax.ShapeDtypeStruct` with resting places on ``mesh``.

    Nothing is allocated, and ``mesh`` may be of devices that are not here.
    """
    state = jax.eval_shape(lambda: TrainState.begin(Decoder(model, rngs=nnx.Rngs(0)), optimizer, 0))
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        state,
        shardings(state, mesh),
    )
