"""Compile programs for TPU slices, given by name, without a TPU.

libtpu compiles without a chip, so that the memory, collectives and kernels of a program on a slice
can be read on any Linux machine (`pip install -e ".[tpu]"`).
"""

import contextlib
import functools
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from layers.config import ConfigError
from research.parallel import MeshConfig, make_mesh

# Without these, libtpu asks Google's metadata servers for chips, prints long messages that there
# are none, and does not support a second process.
_NO_CHIP = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def has_compiler() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def topology_mesh(name: str, config: MeshConfig = MeshConfig()) -> jax.sharding.Mesh:
    """A mesh over the chips of the slice ``name``, e.g. ``v5e:2x2``, ``v5p:4x4x4``, ``v6e:4x4``.

    Raises:
      ConfigError: an unknown slice, the compiler is not installed, or ``config`` does not fit.
    """
    if not has_compiler():
        raise ConfigError(f"topology={name!r}: requires the TPU compiler: pip install -e '.[tpu]'")
    try:
        topology = _topology(name)
    except Exception as error:
        raise ConfigError(f"topology={name!r}: {str(error).splitlines()[0]}") from None
    try:
        return make_mesh(config, topology.devices)
    except AssertionError as error:  # e.g. a v4 slice with two devices per chip
        raise ConfigError(f"topology={name!r}: {str(error).splitlines()[0]}") from None


@functools.lru_cache(maxsize=16)
def _topology(name: str) -> topologies.TopologyDescription:
    # cached, so that two meshes of the same slice are equal
    with _environment(_NO_CHIP):
        return topologies.get_topology_desc(topology_name=name, platform="tpu")


def compile_for_tpu(
    function: Callable, *arguments: Any, options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compile ``function``, jitted or not, for the slice on which its ``arguments`` are sharded.

    They are `jax.ShapeDtypeStruct` with shardings on a `topology_mesh`. Call it inside `use_mesh`
    if the function requires a mesh. ``options``: of the compiler, by XLA's names.
    """
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    lowered = jitted.trace(*arguments).lower(lowering_platforms=("tpu",))
    name = "jax_persistent_cache_min_compile_time_secs"
    previous = getattr(jax.config, name)
    # no cache on disk: without a chip, a cached program cannot be loaded
    jax.config.update(name, math.inf)
    try:
        return lowered.compile(None if options is None else dict(options))
    finally:
        jax.config.update(name, previous)


def compile_with_text(function: Callable, *arguments: Any) -> tuple[jax.stages.Compiled, str]:
    """`compile_for_tpu`, and the optimised HLO that the compiler writes.

    `jax.stages.Compiled.as_text` does not support every instruction, e.g. a large lookup that is
    computed by a SparseCore.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = compile_for_tpu(function, *arguments, options=options)
        (path,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, path.read_text()


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """The process's environment, with ``defaults`` for the variables that are not set."""
    added = [name for name in defaults if name not in os.environ]
    os.environ.update({name: defaults[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
