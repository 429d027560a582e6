"""What is planned: a language model's training or decoding step, or a custom step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layers.config import check
from layers.decoder import Decoder, DecoderConfig
from layers.pipeline import idle
from research.parallel import MeshConfig, abstract_batch, shardings, use_mesh, validate
from research.parallel.rules import with_shardings
from research.planning.topology import topology_mesh
from research.training import TrainingConfig
from research.training.check import check_run
from research.training.flops import (
    forward_flops_per_token,
    recomputed_flops_per_token,
    train_flops_per_token,
)
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state
from research.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted ``function`` and its ``arguments``, in their order, by name.

    The leaves of the arguments are `jax.ShapeDtypeStruct` with shardings on the mesh. ``flops``: of
    a step on all devices, by the equations; ``executed``: with what is computed again, None for the
    same. ``parts``: name → what of the arguments is reported by that name, None for the arguments
    themselves. ``written``: the parts that the step writes anew, e.g. a model and its moments.
    """

    function: Callable
    arguments: Mapping[str, Any]
    flops: float
    executed: float | None = None
    parts: Mapping[str, Any] | None = None
    written: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Setup:
    """A step of ``model`` on the ``mesh`` of ``topology``, by batches of this size.

    ``training`` None: decoding, one token after ``sequence_length`` cached ones. ``vocabulary``: of
    the data, 0 if unknown; the program is the same for any, so that it does not distinguish setups.
    """

    model: DecoderConfig
    topology: str
    mesh: MeshConfig
    batch_size: int
    sequence_length: int
    training: TrainingConfig | None = None
    vocabulary: int = dataclasses.field(default=0, compare=False)

    @property
    def rows(self) -> int:
        """Meshes are compared by the time of a row."""
        return self.batch_size


@dataclasses.dataclass(frozen=True, eq=False)
class CustomSetup:
    """The step that ``make(config, mesh)`` returns, on the ``mesh`` of ``topology``."""

    make: Callable[[Any, Mesh], Step]
    config: Any
    topology: str
    mesh: MeshConfig

    @property
    def rows(self) -> int:
        """Custom steps are compared by the time of a step."""
        return 1


def make(setup: Setup | CustomSetup, mesh: Mesh) -> Step:
    """The step of ``setup`` on ``mesh``.

    Raises:
      ConfigError: a custom step that is no `Step`, or whose arguments are not on the mesh.
    """
    if isinstance(setup, CustomSetup):
        return _custom(setup, mesh)
    return _training(setup, mesh) if setup.training else _decoding(setup, mesh)


def check_setup(setup: Setup | CustomSetup) -> None:
    """Raise `ConfigError` for a ``setup`` that cannot be on its slice, before anything compiles."""
    mesh = topology_mesh(setup.topology, setup.mesh)
    zero, offload = setup.mesh.zero, setup.mesh.offload
    if isinstance(setup, CustomSetup):
        alone = "changes nothing: plan_step is given the mesh alone"
        check(zero is None, "mesh.zero", zero, alone)
        check(not offload, "mesh.offload", offload, alone)
        make(setup, mesh)
        return
    model, training, size = setup.model, setup.training, setup.batch_size
    if training is not None:
        check_run(
            model,
            training,
            setup.mesh,
            mesh,
            batch_size=size,
            sequence_length=setup.sequence_length,
            vocabulary=setup.vocabulary,
        )
        return
    check(zero is None, "mesh.zero", zero, "changes nothing: decoding has no gradients")
    check(not offload, "mesh.offload", offload, "changes nothing: decoding has no moments")
    known = set(model.pattern) <= {"attention", "sliding"}
    check(known, "model.pattern", model.pattern, "only caches of attention are laid out on a mesh")
    for axis, why in (("sequence", "a token cannot be split"), ("stage", "a pipeline trains")):
        check(mesh.shape[axis] == 1, f"mesh.{axis}", mesh.shape[axis], f"must be 1: {why}")
    validate(model, mesh, batch_size=size, sequence_length=1)


def _training(setup: Setup, mesh: Mesh) -> Step:
    training, model, size = setup.training, setup.model, setup.batch_size
    assert training is not None
    stage, offload = setup.mesh.zero_stage, setup.mesh.offload
    optimizer = make_optimizer(training.optimizer, training.steps, offload=offload)
    state = abstract_state(model, optimizer, mesh, stage, offload=offload)
    batch = abstract_batch(mesh, size, setup.sequence_length)
    return Step(
        make_step(training, stage=stage, offload=offload),
        {"state": state, "batch": batch},
        *_flops(setup, mesh, state.model),
        parts={"parameters": state.model, "moments": state.optimizer, "batch": batch},
        written=("parameters", "moments"),
    )


def _decoding(setup: Setup, mesh: Mesh) -> Step:
    """One more token for each row of the batch."""
    config, size = setup.model, setup.batch_size
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    model = with_shardings(abstract, shardings(abstract, mesh))
    with use_mesh(mesh):
        empty = jax.eval_shape(lambda m: m.init_state(size, setup.sequence_length), model)
    # on one device there are no sharded types
    where = jax.tree.map(
        lambda a: NamedSharding(mesh, a.sharding.spec if a.sharding else PartitionSpec()), empty
    )
    cache, batch = with_shardings(empty, where), abstract_batch(mesh, size, 1)

    def step(model, cache, tokens_bt, positions_bt):
        output = model(tokens_bt, positions_bt, state=cache)
        return jnp.argmax(output.logits_btv, axis=-1), output.state

    token = {name: batch[name] for name in ("tokens", "positions")}
    return Step(
        jax.jit(step, donate_argnums=1),
        {"parameters": model, "cache": cache, **token},
        *_flops(setup, mesh, model),
        parts={"parameters": model, "cache": cache, "batch": token},
    )


def _custom(setup: CustomSetup, mesh: Mesh) -> Step:
    step = setup.make(setup.config, mesh)
    check(isinstance(step, Step), "plan_step", step, "must return a Step")
    for name, argument in step.arguments.items():
        beside = "temporaries, total and memory are reported beside the arguments"
        check(name not in ("temporaries", "total", "memory"), "plan_step: name", name, beside)
        for leaf in jax.tree.leaves(argument):
            there = getattr(getattr(leaf, "sharding", None), "mesh", None) == mesh
            check(there, f"plan_step: {name}", leaf, "must have a sharding on the mesh")
    return step


def _flops(setup: Setup, mesh: Mesh, model: Decoder) -> tuple[float, float]:
    """Of a step on all devices: the model's, and those that are executed."""
    length, rows = setup.sequence_length, setup.batch_size
    if setup.training is None:
        each = forward_flops_per_token(model, length, cached=True)
        return each * rows, each * rows
    each = train_flops_per_token(model, length)
    again = recomputed_flops_per_token(model, length)
    config = setup.model
    if config.microbatches is not None:  # stages compute in the ticks that are not theirs too
        share = idle(mesh.shape["stage"], config.microbatches, config.circuits)
        head = 6.0 * config.vocab_size * config.width
        again += (each + again - head) * share / (1 - share)
    return each * rows * length, (each + again) * rows * length
