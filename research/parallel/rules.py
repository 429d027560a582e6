"""The one table from logical axes to mesh axes, and the shardings that follow from it.

A logical axis has two shardings: the *stored sharding*, of parameters, gradients and optimiser
moments between steps, and the *computed sharding*, which an array has when it is multiplied.
``fsdp`` shards parameters in their stored sharding only. Layers all-gather them just before use
(`layers.sharding.gather`), and the transpose of the all-gather reduce-scatters the gradients.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax.core.spmd import logical_axis_rules
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from layers.architecture import FEED_FORWARDS, MIXERS
from layers.config import check
from layers.context_parallel import zigzag_order
from layers.decoder import DecoderConfig
from layers.weights import map_named

Tree = TypeVar("Tree")

# logical axis: (mesh axes of the stored sharding, of the computed sharding)
RULES: Mapping[str, tuple[Any, Any]] = {
    "batch": (("stage", "data", "fsdp", "expert"), ("stage", "data", "fsdp", "expert")),
    "layers": ("stage", "stage"),
    "time": ("sequence", "sequence"),
    "vocab": ("tensor", "tensor"),
    "heads": ("tensor", "tensor"),
    "kv_heads": ("tensor", "tensor"),
    "channels": ("tensor", "tensor"),
    "mlp": ("tensor", "tensor"),
    "experts": ("expert", "expert"),
    "embed": ("fsdp", None),
    "head_dim": (None, None),
    "norm": (None, None),
}


# arrays of a batch and their dtypes; each is [batch, time]
BATCH = {
    "tokens": np.int32,
    "targets": np.int32,
    "positions": np.int32,
    "segment_ids": np.int32,
    "weights": np.float32,
}


def _on_mesh(axes: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The mesh axes of one rule, without those of size 1."""
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    names = tuple(name for name in names if mesh.shape[name] > 1)
    return names[0] if len(names) == 1 else names or None


def _table(mesh: Mesh | AbstractMesh, column: int) -> dict[str, Any]:
    return {name: _on_mesh(columns[column], mesh) for name, columns in RULES.items()}


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Trace and run inside ``mesh``: `jax.set_mesh`, with the rules of the computed sharding.

    A mesh of one device changes nothing.
    """
    if mesh.size == 1:
        yield
        return
    with jax.set_mesh(mesh), logical_axis_rules(tuple(_table(mesh, 1).items())):
        yield


def shardings(tree: Tree, mesh: Mesh, *, split: bool = True) -> Tree:
    """The stored `NamedSharding` of every leaf of ``tree``, in the same structure; see `specs`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh, split=split))


def specs(tree: Tree, mesh: Mesh | AbstractMesh, *, split: bool = True) -> Tree:
    """The stored `PartitionSpec` of every leaf of ``tree``, in the same structure.

    ``tree`` has arrays or `jax.ShapeDtypeStruct` as leaves. An `nnx.Variable` with ``axes``
    metadata is sharded by the table. The names are those of its last dimensions: stacked parameters
    have a further leading dimension, ``layers``. A dimension of size 1 is not sharded. All other
    leaves are replicated. Optimiser moments have the metadata and the number of dimensions of their
    parameters, so they are sharded like them. ``split=False``: replicated over ``fsdp``, as
    parameters are at stages 1 and 2 of ZeRO (`research.parallel.zero`).
    """
    table = _table(mesh, 0)
    if not split:
        table = {name: None if axis == "fsdp" else axis for name, axis in table.items()}
    replicated = PartitionSpec()

    def of_array(array, axes):
        if not axes:
            return replicated
        stacked = array.ndim - len(axes)
        leading = ("layers",)[:stacked] + (None,) * (stacked - 1)
        named = zip((*leading, *axes), array.shape, strict=True)
        # a factored moment has size 1 in the dimensions that it is a mean over
        return PartitionSpec(*(table.get(a) if size > 1 else None for a, size in named))

    return map_named(of_array, tree)


def with_shardings(abstract: Tree, where: Tree) -> Tree:
    """``abstract`` as `jax.ShapeDtypeStruct` with the shardings of the tree ``where``."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, where
    )


def batch_ways(mesh: Mesh) -> int:
    """The number of shards that ``mesh`` makes of the rows of a batch."""
    axes, _ = RULES["batch"]
    return math.prod(mesh.shape[axis] for axis in axes)


def batch_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """The logical axes of the array ``name`` of a batch: rows, and time for arrays of `BATCH`."""
    return ("batch", "time" if name in BATCH and ndim > 1 else None)[:ndim] + (None,) * (ndim - 2)


def shard_batch(batch: Mapping[str, Any], mesh: Mesh, config: Any = None) -> dict[str, jax.Array]:
    """The rows of this process as sharded global arrays on ``mesh``.

    ``config``: the model's. If its attention requires another order of tokens (`time_order`), they
    are reordered.
    """
    order = None
    if isinstance(config, DecoderConfig) and "tokens" in batch:
        order = time_order(config, mesh, batch["tokens"].shape[1])
    if order is not None:
        batch = {name: a[:, order] if name in BATCH else a for name, a in batch.items()}
    if mesh.size == 1:
        return {name: jax.device_put(value) for name, value in batch.items()}
    table = _table(mesh, 1)

    def sharded(name, value):
        axes = (None if axis is None else table[axis] for axis in batch_axes(name, value.ndim))
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return jax.device_put(value, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(value))

    return {name: sharded(name, value) for name, value in batch.items()}


def time_order(config: DecoderConfig, mesh: Mesh, length: int) -> np.ndarray | None:
    """The index of the token at each position of a row of ``length`` tokens; None: in order."""
    ways = mesh.shape["sequence"]
    zigzag = config.attention is not None and config.attention.context == "zigzag"
    return zigzag_order(length, ways) if zigzag and ways > 1 else None


def abstract_batch(mesh: Mesh, batch_size: int, sequence_length: int) -> dict[str, Any]:
    """The batch of a training step as `jax.ShapeDtypeStruct` with its sharding on ``mesh``."""
    table = _table(mesh, 1)
    sharding = NamedSharding(mesh, PartitionSpec(table["batch"], table["time"]))
    shape = (batch_size, sequence_length)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in BATCH.items()
    }


def validate(config: DecoderConfig, mesh: Mesh, *, batch_size: int, sequence_length: int) -> None:
    """Check that the mesh axes divide the model and the batch.

    Raises:
      ConfigError: names the field, its size and the mesh axis that does not divide it.
    """
    validate_model(config, mesh)
    _validate_stages(config, mesh, batch_size)
    for field, size, axis, ways in (
        ("batch_size", batch_size, "stage×data×fsdp×expert", batch_ways(mesh)),
        ("sequence_length", sequence_length, "sequence", mesh.shape["sequence"]),
    ):
        check(size % ways == 0, field, size, f"must be a multiple of mesh.{axis}={ways}")
    if (attention := config.attention) is not None and attention.context != "gather":
        _validate_context(config, attention, mesh, sequence_length)


def validate_model(config: DecoderConfig, mesh: Mesh) -> None:
    """Check that the mesh axes divide the sizes of the model.

    Raises:
      ConfigError: names the field, its size and the mesh axis that does not divide it.
    """
    tensor, expert, stages = (mesh.shape[axis] for axis in ("tensor", "expert", "stage"))
    repeats = config.repeats // config.circuits
    scan = config.scan or stages == 1
    check(scan, "scan", False, f"must be True: mesh.stage={stages} requires it")
    check(
        repeats % stages == 0,
        "num_layers",
        config.num_layers,
        f"its {repeats} repeats of the pattern per circuit must be a multiple of "
        f"mesh.stage={stages}",
    )
    parts: list[tuple[str, int]] = []
    # a configuration may describe parts that none of its layers uses
    used = {MIXERS[kind] for kind in config.pattern}
    used |= {FEED_FORWARDS[kind] for kind in config.feed_forward}
    if (attention := config.attention) is not None and "attention" in used:
        parts += [("attention.num_heads", attention.num_heads)]
        parts += [("attention.num_kv_heads", attention.kv_heads)]
    if config.mlp is not None and "mlp" in used:
        parts += [("mlp.width", config.mlp.width)]
    if (moe := config.moe) is not None and "moe" in used:
        parts += [("moe.width", moe.width)]
        experts = moe.num_experts
        check(
            experts % expert == 0,
            "moe.num_experts",
            experts,
            f"must be a multiple of mesh.expert={expert}",
        )
    if (latent := config.latent) is not None and "latent" in used:
        parts += [("latent.num_heads", latent.num_heads)]
    if "mamba" in config.pattern:
        parts += [("mamba.expand × width", config.part("mamba").expand * config.width)]
    if "mamba2" in config.pattern:
        mamba = config.part("mamba")
        parts += [("mamba.expand × width / head_dim", mamba.heads(config.width))]
        # one group is replicated; several are sharded like their heads
        parts += [("mamba.groups", mamba.groups)] if mamba.groups > 1 else []
    if "rwkv4" in config.pattern:
        parts += [("rwkv.channels", config.part("rwkv").channels or config.width)]
    if "rwkv7" in config.pattern:
        parts += [("width / rwkv.head_dim", config.width // config.part("rwkv").head_dim)]
    for field, size, axis, ways in (
        ("width", config.width, "fsdp", mesh.shape["fsdp"]),
        *((field, size, "tensor", tensor) for field, size in parts),
        ("vocab_size", config.vocab_size, "tensor", tensor),
    ):
        check(size % ways == 0, field, size, f"must be a multiple of mesh.{axis}={ways}")
    check(
        expert == 1 or "moe" in used,
        "mesh.expert",
        expert,
        "must be 1: the model has no experts",
    )


def _validate_stages(config: DecoderConfig, mesh: Mesh, batch_size: int) -> None:
    stages, parts = mesh.shape["stage"], config.microbatches
    if stages == 1:
        check(parts is None, "microbatches", parts, "changes nothing: mesh.stage=1")
        return
    divides = f"must be a multiple of mesh.stage={stages}"
    check(parts is not None and parts % stages == 0, "microbatches", parts, divides)
    ways = (parts or 1) * batch_ways(mesh) // stages
    check(
        batch_size % ways == 0,
        "batch_size",
        batch_size,
        f"must be a multiple of microbatches × mesh.data×fsdp×expert={ways}",
    )


def _validate_context(config, attention, mesh, length) -> None:
    ways, field, context = mesh.shape["sequence"], "attention.context", attention.context
    check(ways > 1, field, context, f"changes nothing: mesh.sequence={ways}")
    attending = {"attention", "sliding"} & set(config.pattern)
    check(bool(attending), field, context, "changes nothing: the pattern has no attention")
    if context == "ulysses":
        heads, shards = attention.kv_heads, ways * mesh.shape["tensor"]
        check(
            heads % shards == 0,
            "attention.num_kv_heads",
            heads,
            f"must be a multiple of mesh.sequence×tensor={shards} for context=ulysses",
        )
    if context == "zigzag":
        check(
            length % (2 * ways) == 0,
            "sequence_length",
            length,
            f"must be a multiple of 2 × mesh.sequence={2 * ways} for context=zigzag",
        )
        # these layers depend on the order of the tokens in the array
        others = set(config.pattern) - {"attention", "sliding"}
        check(not others, "pattern", config.pattern, "must be attention only for context=zigzag")
        capacity = None if config.moe is None else config.moe.capacity_factor
        field = "moe.capacity_factor"
        check(capacity is None, field, capacity, "must be None for context=zigzag")
