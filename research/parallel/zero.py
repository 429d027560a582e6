"""ZeRO: who keeps what of a parameter (Rajbhandari 2020, arXiv:1910.02054).

The N devices along ``fsdp`` train on rows of their own. Of every parameter that the rules split,
with Ψ parameters in all, each device keeps (§5) and moves in a step (§7)

    stage   parameters   gradients   moments   moved
    1       all          all         1/N       2Ψ: gradients scattered, new parameters gathered
    2       all          1/N         1/N       2Ψ: the same, a layer's gradients at a time
    3       1/N          1/N         1/N       3Ψ: parameters gathered for either pass, as well

``data`` replicates everything, which is no stage. In the terms of explicit sharding, a gradient
that is replicated is *unreduced*: each device has the sum over its own rows. It is never reduced
where it is: `to_stored_sharding` reduce-scatters it. Micro-batches are added up without any
collective, where stage 1 keeps the gradient replicated, and over ``data`` at every stage.
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

# bytes a parameter of mixed precision: float16 parameters and gradients, and K = 12 of a float32
# copy, momentum and variance (§3.1)
MIXED = (2, 2, 12)


def bytes_per_parameter(
    stage: int, ways: int, parameters: float, gradients: float, moments: float
) -> float:
    """What a device keeps of each parameter (§5, Figure 1); arguments are what one device would.

    Stage 0: everything.
    """
    kept = (3, 2, 1)  # the stage from which each is split
    each = zip(kept, (parameters, gradients, moments), strict=True)
    return sum(size / ways if stage >= first else size for first, size in each)


def moved_per_parameter(stage: int, ways: int) -> float:
    """Parameters a device sends for each parameter in a step (§7): 2, 2, 2 and 3, as N grows."""
    return (3 if stage == 3 else 2) * (ways - 1) / ways


def differentiated(model: Any, stage: int, *, late: bool) -> tuple[Any, Callable[[Any], Any]]:
    """``(variables, join)``: differentiate ``f(join(variables))`` by ``variables``.

    The gradient then comes as the ``stage`` keeps it. ``late``: whatever else it is to be summed
    over waits for `to_stored_sharding`.
    """
    if spec() is None:
        return model, lambda variables: variables
    mesh = jax.sharding.get_abstract_mesh()
    rows = frozenset(a for name in ("batch", "time") for a in _axes(name) if mesh.shape[a] > 1)
    late = late and can_wait(getattr(model, "config", None), dict(mesh.shape))

    def marked(a: jax.Array, axes: PartitionSpec, wait: bool) -> jax.Array:
        reduced = rows - named_axes(axes) if wait else frozenset()
        return jax.sharding.reshard(a, PartitionSpec(*axes, reduced=reduced))

    split = specs(model, mesh)
    if stage == 3:
        return jax.tree.map(lambda a, s: marked(a, s, late), model, split), lambda v: v
    whole = specs(model, mesh, split=False)
    if stage == 1:
        return jax.tree.map(lambda a, w: marked(a, w, True), model, whole), lambda v: v
    variables = jax.tree.map(lambda a, s: marked(a, s, late), model, split)

    def join(variables: Any) -> Any:
        def pair(share, a, s, w):
            return share if s == w else Scattered(marked(a, w, True), share)

        return jax.tree.map(pair, variables, model, split, whole)

    return variables, join


def to_stored_sharding(tree: Any, *, split: bool = True) -> Any:
    """Every leaf where the rules say that it rests, summed over all devices; see `specs`.

    What lies in the host's memory rests already.
    """
    if spec() is None:
        return tree
    mesh = jax.sharding.get_abstract_mesh()

    def one(a, target):
        on_host = jax.typeof(a).memory_space == jax.memory.Space.Host
        return a if on_host else scatter(a, target)

    return jax.tree.map(one, tree, specs(tree, mesh, split=split))


def can_wait(config: Any, sizes: dict[str, int]) -> bool:
    """Whether gradients can be left unreduced: recurrent layers on a sharded ``time`` gather it, a
    pipeline's are those of per-device code, and of models other than decoders it is not known."""
    if sizes["stage"] > 1 or not isinstance(config, DecoderConfig):
        return False
    shifted = {"rwkv4", "rwkv7"} & set(config.feed_forward)
    recurrent = shifted or set(config.pattern) - set(ATTENDING)
    return not (recurrent and sizes["sequence"] > 1)


def check_stage(stage: int | None, config: Any, sizes: dict[str, int]) -> None:
    """Raise `ConfigError` for a ``stage`` that changes nothing or cannot be, on axes of ``sizes``.

    None is what happens anyway: stage 3 of whatever ``fsdp`` splits.
    """
    if stage is None:
        return
    fsdp = sizes["fsdp"]
    check(fsdp > 1, "mesh.zero", stage, f"changes nothing: mesh.fsdp={fsdp} splits nothing")
    check(
        stage == 3 or can_wait(config, sizes),
        "mesh.zero",
        stage,
        f"must be 3: gradients cannot be left unreduced by recurrent layers over "
        f"mesh.sequence={sizes['sequence']}, by a pipeline over mesh.stage={sizes['stage']}, or by "
        f"a model that is no decoder",
    )


def _axes(name: str) -> tuple[str, ...]:
    axes = RULES[name][1]
    return (axes,) if isinstance(axes, str) else axes
