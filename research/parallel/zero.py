"""ZeRO: which model states are sharded over ``fsdp`` (Rajbhandari 2020, arXiv:1910.02054).

The N devices along ``fsdp`` train on different rows. Of the parameters that the rules shard, Ψ in
all, each device stores (§5) and sends in a step (§7)

    stage   parameters   gradients   moments   sent
    1       all          all         1/N       2Ψ: gradients reduce-scattered, new parameters
                                                   all-gathered
    2       all          1/N         1/N       2Ψ: the same, the gradients of one layer at a time
    3       1/N          1/N         1/N       3Ψ: also parameters all-gathered in both passes

Over ``data`` everything is replicated, which is no stage of ZeRO. In the terms of explicit
sharding, a replicated gradient is *unreduced*: each device has the sum over its own rows. There is
no all-reduce of it: `to_stored_sharding` reduce-scatters it. Micro-batches are added up without a
collective over ``fsdp`` at stage 1, which stores replicated gradients, and over ``data`` at every
stage.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from layers.config import check
from layers.decoder import DecoderConfig
from layers.sharding import Scattered, named_axes, scatter, spec
from research.parallel.rules import RULES, specs

STAGES = (1, 2, 3)
ATTENDING = ("attention", "sliding", "latent")

# bytes per parameter in mixed precision: float16 parameters and gradients, and K = 12 for a float32
# copy, momentum and variance (§3.1)
MIXED = (2, 2, 12)


def bytes_per_parameter(
    stage: int, ways: int, parameters: float, gradients: float, moments: float
) -> float:
    """Bytes per device of the model states of one parameter (§5, Figure 1).

    ``parameters``, ``gradients``, ``moments``: the bytes without sharding. Stage 0: nothing is
    sharded.
    """
    first_stages = (3, 2, 1)  # the first stage at which each is sharded
    each = zip(first_stages, (parameters, gradients, moments), strict=True)
    return sum(size / ways if stage >= first else size for first, size in each)


def moved_per_parameter(stage: int, ways: int) -> float:
    """Numbers that a device sends per parameter in a step (§7): 2 or, at stage 3, 3 for large N."""
    return (3 if stage == 3 else 2) * (ways - 1) / ways


def differentiated(model: Any, stage: int, *, late: bool) -> tuple[Any, Callable[[Any], Any]]:
    """``(variables, join)``: differentiate ``f(join(variables))`` with respect to ``variables``.

    The gradient then has the sharding of the ``stage`` of ZeRO. ``late``: the sum over all other
    axes that shard rows or time is left to `to_stored_sharding`, so that the gradient stays
    unreduced over them.
    """
    if spec() is None:
        return model, lambda variables: variables
    mesh = jax.sharding.get_abstract_mesh()
    rows = frozenset(a for name in ("batch", "time") for a in _axes(name) if mesh.shape[a] > 1)
    late = late and can_wait(getattr(model, "config", None), dict(mesh.shape))

    def marked(a: jax.Array, axes: PartitionSpec, unreduced: bool) -> jax.Array:
        reduced = rows - named_axes(axes) if unreduced else frozenset()
        return jax.sharding.reshard(a, PartitionSpec(*axes, reduced=reduced))

    split = specs(model, mesh)
    if stage == 3:
        return jax.tree.map(lambda a, s: marked(a, s, late), model, split), lambda v: v
    replicated = specs(model, mesh, split=False)
    if stage == 1:
        return jax.tree.map(lambda a, w: marked(a, w, True), model, replicated), lambda v: v
    variables = jax.tree.map(lambda a, s: marked(a, s, late), model, split)

    def join(variables: Any) -> Any:
        def pair(share, a, s, w):
            return share if s == w else Scattered(marked(a, w, True), share)

        return jax.tree.map(pair, variables, model, split, replicated)

    return variables, join


def to_stored_sharding(tree: Any, *, split: bool = True) -> Any:
    """Reshard every leaf to its stored sharding, summed over all devices; see `specs`.

    Leaves in the host's memory have their stored sharding already.
    """
    if spec() is None:
        return tree
    mesh = jax.sharding.get_abstract_mesh()

    def reshard_leaf(a, target):
        on_host = jax.typeof(a).memory_space == jax.memory.Space.Host
        return a if on_host else scatter(a, target)

    return jax.tree.map(reshard_leaf, tree, specs(tree, mesh, split=split))


def can_wait(config: Any, sizes: dict[str, int]) -> bool:
    """Whether gradients can stay unreduced until the end of the step.

    They cannot if recurrent layers all-gather a sharded ``time``, in a pipeline, whose gradients
    are computed per device, or for models other than decoders, for which it is not known.
    """
    if sizes["stage"] > 1 or not isinstance(config, DecoderConfig):
        return False
    shifted = {"rwkv4", "rwkv7"} & set(config.feed_forward)
    recurrent = shifted or set(config.pattern) - set(ATTENDING)
    return not (recurrent and sizes["sequence"] > 1)


def check_stage(stage: int | None, config: Any, sizes: dict[str, int]) -> None:
    """Raise `ConfigError` for a ``stage`` that changes nothing or that the mesh does not support.

    ``sizes``: of the mesh axes. None is always allowed: it is stage 3 of whatever ``fsdp`` shards.
    """
    if stage is None:
        return
    fsdp = sizes["fsdp"]
    check(fsdp > 1, "mesh.zero", stage, f"changes nothing: mesh.fsdp={fsdp}")
    check(
        stage == 3 or can_wait(config, sizes),
        "mesh.zero",
        stage,
        f"must be 3: gradients cannot stay unreduced in recurrent layers over "
        f"mesh.sequence={sizes['sequence']}, in a pipeline over mesh.stage={sizes['stage']}, or in "
        f"a model that is not a decoder",
    )


def _axes(name: str) -> tuple[str, ...]:
    axes = RULES[name][1]
    return (axes,) if isinstance(axes, str) else axes
