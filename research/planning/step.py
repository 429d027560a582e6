"""The step that is planned: training or decoding of a language model, or a custom step."""

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
from layers.state import CONTIGUOUS, CacheConfig
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
    a step on all devices, by the equations; ``executed``: with recomputation, None if it is the
    same. ``parts``: name → the arrays that are reported under that name; None: the arguments
    themselves. ``written``: the parts that the step writes, e.g. a model and its moments.
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

    ``training`` None: decoding of one token after ``sequence_length`` cached ones, which ``cache``
    stores. ``vocabulary``: of the data, 0 if unknown. The program does not depend on it, so setups
    that differ only in it are equal.
    """

    model: DecoderConfig
    topology: str
    mesh: MeshConfig
    batch_size: int
    sequence_length: int
    training: TrainingConfig | None = None
    vocabulary: int = dataclasses.field(default=0, compare=False)
    cache: CacheConfig = CONTIGUOUS

    @property
    def rows(self) -> int:
        """The rows of a batch: meshes are compared by the time per row."""
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
        """1: custom steps are compared by the time per step."""
        return 1


def make(setup: Setup | CustomSetup, mesh: Mesh) -> Step:
    """The step of ``setup`` on ``mesh``.

    Raises:
      ConfigError: a custom step is not a `Step`, or its arguments are not sharded on the mesh.
    """
    if isinstance(setup, CustomSetup):
        return _custom(setup, mesh)
    if setup.training is not None:
        return _training(setup, mesh)
    return decoding(setup.model, mesh, setup.batch_size, setup.sequence_length, setup.cache)


def check_setup(setup: Setup | CustomSetup) -> None:
    """Raise `ConfigError` for a ``setup`` that its slice does not support, before compilation."""
    mesh = topology_mesh(setup.topology, setup.mesh)
    zero, offload = setup.mesh.zero, setup.mesh.offload
    if isinstance(setup, CustomSetup):
        ignored = "changes nothing: plan_step receives only the mesh"
        check(zero is None, "mesh.zero", zero, ignored)
        check(not offload, "mesh.offload", offload, ignored)
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
    supported = set(model.pattern) <= {"attention", "sliding"}
    check(
        supported,
        "model.pattern",
        model.pattern,
        "must be attention layers: only their caches can be sharded",
    )
    for axis, why in (
        ("sequence", "one token has no time to shard"),
        ("stage", "a pipeline only trains"),
    ):
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


def decoding(
    config: DecoderConfig, mesh: Mesh, rows: int, length: int, cache: CacheConfig = CONTIGUOUS
) -> Step:
    """Decoding of one token for each of ``rows`` after ``length`` cached ones, stored as ``cache``.

    Raises:
      ConfigError: the model does not support ``cache``.
    """
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    model = with_shardings(abstract, shardings(abstract, mesh))
    with use_mesh(mesh):
        empty = jax.eval_shape(lambda m: m.init_state(rows, length, cache), model)
    # on one device types have no sharding
    state_shardings = jax.tree.map(
        lambda a: NamedSharding(mesh, a.sharding.spec if a.sharding else PartitionSpec()), empty
    )
    state, batch = with_shardings(empty, state_shardings), abstract_batch(mesh, rows, 1)

    def step(model, state, tokens_bt, positions_bt):
        output = model(tokens_bt, positions_bt, state=state)
        return jnp.argmax(output.logits_btv, axis=-1), output.state

    token = {name: batch[name] for name in ("tokens", "positions")}
    flops = forward_flops_per_token(model, length, cached=True) * rows
    return Step(
        jax.jit(step, donate_argnums=1),
        {"parameters": model, "cache": state, **token},
        flops,
        parts={"parameters": model, "cache": state, "batch": token},
    )


def _custom(setup: CustomSetup, mesh: Mesh) -> Step:
    step = setup.make(setup.config, mesh)
    check(isinstance(step, Step), "plan_step", step, "must return a Step")
    for name, argument in step.arguments.items():
        reserved = "must not be temporaries, total or memory, which are reported as well"
        check(name not in ("temporaries", "total", "memory"), "plan_step: name", name, reserved)
        for leaf in jax.tree.leaves(argument):
            on_mesh = getattr(getattr(leaf, "sharding", None), "mesh", None) == mesh
            check(on_mesh, f"plan_step: {name}", leaf, "must have a sharding on the mesh")
    return step


def _flops(setup: Setup, mesh: Mesh, model: Decoder) -> tuple[float, float]:
    """FLOPs of a training step on all devices: by the equations of the model, and executed."""
    length, rows = setup.sequence_length, setup.batch_size
    per_token = train_flops_per_token(model, length)
    recomputed = recomputed_flops_per_token(model, length)
    config = setup.model
    if config.microbatches is not None:  # idle stages compute, too
        share = idle(mesh.shape["stage"], config.microbatches, config.circuits)
        head = 6.0 * config.vocab_size * config.width
        recomputed += (per_token + recomputed - head) * share / (1 - share)
    return per_token * rows * length, (per_token + recomputed) * rows * length
