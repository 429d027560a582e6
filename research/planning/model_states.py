"""Bytes of model states per device and numbers sent per step, from a compiled program.

Model states are ZeRO's term for parameters, gradients and moments (Rajbhandari 2020,
arXiv:1910.02054, Figure 1 and §7).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh

from layers.decoder import DecoderConfig
from research.parallel import abstract_batch, use_mesh, validate
from research.planning.program import collectives
from research.planning.topology import compile_with_text
from research.training import TrainingConfig
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state
from research.training.step import finish, make_gradients


@dataclasses.dataclass(frozen=True)
class ModelStates:
    """``parameters``: Ψ, of the whole model. ``held``: bytes per device.

    ``sent``: numbers, of any dtype, that a device sends in a step, around rings. It is None except
    on TPUs: XLA for the CPU replaces reduce-scatters by all-reduces.
    """

    parameters: int
    held: int
    sent: float | None


@functools.lru_cache(maxsize=64)
def model_states(
    model: DecoderConfig,
    training: TrainingConfig,
    mesh: Mesh,
    stage: int,
    *,
    batch_size: int,
    sequence_length: int,
) -> ModelStates:
    """Compile a step on ``mesh`` at ``stage`` of ZeRO, and read what it stores and sends.

    Nothing is allocated, and the devices may be those of a TPU slice that does not exist. The step
    also returns its gradients before their final reduction, so that they are stored at the end of
    the step. Its arguments and results are the state, the gradients and the batch; the batch is not
    counted.

    Raises:
      ConfigError: ``mesh`` does not divide the model or the batch.
    """
    validate(model, mesh, batch_size=batch_size, sequence_length=sequence_length)
    optimizer = make_optimizer(training.optimizer, training.steps)
    state = abstract_state(model, optimizer, mesh, stage)
    batch = abstract_batch(mesh, batch_size, sequence_length)
    gradients_of_batch = make_gradients(training, stage=stage)

    def step(state, batch):
        gradients, denominator, _ = gradients_of_batch(state.model, batch, jax.random.key(0))
        finished = finish(gradients, denominator, training)
        return state.apply(finished, optimizer, stage), gradients

    jitted = jax.jit(step, donate_argnums=0)
    with use_mesh(mesh):
        if mesh.devices.flat[0].platform == "tpu":
            compiled, text = compile_with_text(jitted, state, batch)
        else:
            compiled, text = jitted.lower(state, batch).compile(), None
    analysis: Any = compiled.memory_analysis()
    # the state is donated: its old and new memory are the same, the other results are gradients
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    held -= analysis.alias_size_in_bytes
    held -= sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in batch.values()
    )
    return ModelStates(
        parameters=sum(a.size for a in jax.tree.leaves(state.model)),
        held=int(held),
        sent=None if text is None else sum(c.numbers for c in collectives(text, mesh.size)),
    )
