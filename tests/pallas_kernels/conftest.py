"""What the kernels' tests share: the ways to run or compile a kernel whose chip is not here."""

import contextlib
import re

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import params as gpu_interpreter
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

# The oldest and the newest; the others are among the slow tests.
GENERATIONS = ["v5e", "tpu7x", *(pytest.param(t, marks=pytest.mark.slow) for t in ("v5p", "v6e"))]
TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@contextlib.contextmanager
def interpreted(implementation: str, *, races: bool = False):
    """Within it, ``implementation`` ("tpu" or "gpu") runs on the CPU by interpretation.

    ``races``: the TPU interpreter simulates the memories and looks for races between the kernel and
    its copies; a race that is found fails the test. A Triton kernel has no copies of its own.
    """
    if implementation not in ("tpu", "gpu"):
        yield
        return
    # its name says TPU; it holds for both
    with pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True) if races else True
    ):
        yield
    if races:
        found = getattr(tpu_callbacks, "races", None)
        assert found is not None and not found.races_found, "a race was found"


def mosaic_gpu_interpreted():
    """Within it, Mosaic GPU kernels are traced for the interpreter, which looks for races."""
    return pltpu.force_tpu_interpret_mode(gpu_interpreter.InterpretGPUParams(detect_races=True))


def mosaic_gpu_races() -> bool | None:
    """Whether the last kernel that ran so had a race."""
    found = gpu_callbacks.get_races()
    return None if found is None else found.races_found


def topology_mesh(generation: str, shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    """A mesh over (the first of) a described host's chips; nothing is attached."""
    found = topologies.get_topology_desc(topology_name=TPUS[generation], platform="tpu")
    devices = np.array(found.devices[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, names)


def compile_for_tpu(function, mesh: Mesh, *arguments, specs=None):
    """Compile ``function`` of arrays or ShapeDtypeStructs by the real compiler for ``mesh``."""
    leaves, structure = jax.tree.flatten(arguments)
    specs = [PartitionSpec()] * len(leaves) if specs is None else specs
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip(leaves, specs, strict=True)
    ]
    traced = jax.jit(function).trace(*jax.tree.unflatten(structure, placed))
    return traced.lower(lowering_platforms=("tpu",)).compile()


def lower_for_gpu(function, *arguments) -> str:
    """The program ``function`` becomes on an NVIDIA H100, as text; none is attached."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    with h100():
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


# An H100 (SXM) as XLA's GpuTargetConfigProto describes one.
H100 = """
platform_name: "CUDA"
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_memory_size: 85899345920 memory_bandwidth: 3352320000000 clock_rate_ghz: 1.98
}
"""


def compile_for_gpu(function, *arguments):
    """Compile ``function`` by the real compiler for an H100; none is attached.

    It goes as far as machine code: Triton, LLVM and the shared memory that a kernel may use. The
    test is skipped where the CUDA plugin is not installed (``pip install -e ".[gpu-compile]"``).
    """
    pytest.importorskip("jax_plugins.xla_cuda13")
    found = topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=H100, topology="1x1x1"
    )
    sharding = NamedSharding(Mesh(np.array(found.devices), ("data",)), PartitionSpec())
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    with h100():
        lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",))
    return lowered.compile()


def triton_kernels(text: str) -> list[str]:
    """Names of the kernels in a lowered program that Triton will compile, in order."""
    return re.findall(r'@__gpu\$xla\.gpu\.triton.*? name = "(\w+)"', text)


@pytest.fixture
def gpu():
    """An NVIDIA GPU; the test is skipped where there is none."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip("no NVIDIA GPU")
    with jax.default_device(device):
        yield device


def h100():
    """The abstract device that newer versions of jax want where no GPU is attached."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
