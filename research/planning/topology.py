"""Programs for TPUs that are not here: a slice described by name, and its real compiler.

libtpu compiles without a chip, so that a program's memory, collectives and kernels on a slice are
known on any Linux machine (`pip install -e ".[tpu]"`).
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

# Without these libtpu asks Google's metadata servers which chips there are and says at length that
# it found none, and refuses a second process.
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
      ConfigError: no such slice, the compiler is not installed, or ``config`` does not fit.
    """
    if not has_compiler():
        raise ConfigError(f"topology={name!r}: needs the TPU compiler: pip install -e '.[tpu]'")
    try:
        found = _topology(name)
    except Exception as error:
        raise ConfigError(f"topology={name!r}: {str(error).splitlines()[0]}") from None
    try:
        return make_mesh(config, found.devices)
    except AssertionError as error:  # two devices a chip, as of a v4 that is not one
        raise ConfigError(f"topology={name!r}: {str(error).splitlines()[0]}") from None


@functools.lru_cache(maxsize=16)
def _topology(name: str) -> topologies.TopologyDescription:
    # kept, so that two meshes of one slice are equal
    with _environment(_NO_CHIP):
        return topologies.get_topology_desc(topology_name=name, platform="tpu")


def compile_for_tpu(
    function: Callable, *arguments: Any, options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
    """``function`` (jitted, or it will be) compiled for the slice its ``arguments`` rest on.

    They are `jax.ShapeDtypeStruct` with shardings on a `topology_mesh`; call it inside `use_mesh`
    where the function wants one. ``options``: the compiler's, by XLA's names.
    """
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    lowered = jitted.trace(*arguments).lower(lowering_platforms=("tpu",))
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    # a program that was kept could not be read again without a chip to load it on
    jax.config.update(name, math.inf)
    try:
        return lowered.compile(None if options is None else dict(options))
    finally:
        jax.config.update(name, before)


def compile_with_text(function: Callable, *arguments: Any) -> tuple[jax.stages.Compiled, str]:
    """`compile_for_tpu`, and the program in HLO as the compiler writes it.

    `jax.stages.Compiled.as_text` cannot read back every instruction: a large lookup that is handed
    to a SparseCore is one that it cannot.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = compile_for_tpu(function, *arguments, options=options)
        (path,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, path.read_text()


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """The process's environment with ``defaults`` where it says nothing."""
    added = [name for name in defaults if name not in os.environ]
    os.environ.update({name: defaults[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
