"""What tests share: a way to run a script as a user's process would, and to forget programs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Tests run on the CPU, also where libtpu is installed so as to compile for TPUs that are not there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # one for each of pytest's workers

import jax  # noqa: E402  after what it reads
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from jaxlib.xla_client import CompileOptions  # noqa: E402

ROOT = Path(__file__).parent.parent

# Compiling is most of the time, and how good the code is that XLA makes for the CPU is not tested.
# One part a program: with several workers there is no core that could compile another part.
HASTE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"


def compile_in_haste() -> None:
    """Set XLA's flags for this process, before anything asks for a device.

    It reads them once, and libtpu must not find them: at one of the CPU's it ends the process.
    """
    before = os.environ.get("XLA_FLAGS", "")
    emitters = "" if jax.__version_info__ >= (0, 11) else "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{before} {HASTE} {emitters}"
    _ = CompileOptions().executable_build_options.debug_options
    os.environ["XLA_FLAGS"] = before


if os.environ["JAX_PLATFORMS"] == "cpu":
    compile_in_haste()


@pytest.fixture(autouse=True, scope="session")
def key_of_tests(tmp_path_factory):
    """Compiled programs are signed by a key of these tests, not by the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Unload what a file of tests compiled, and the cache that its commands may have named.

    A program on the CPU takes several memory maps, and Linux kills a process at its 65,530th.
    """
    yield
    jax.clear_caches()
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture
def run_script(tmp_path):
    """``run_script(source, *arguments, devices=8)``: run Python ``source`` on virtual CPU devices.

    Returns its standard output; the test fails with its standard error if it exits non-zero.
    """

    def run(source: str, *arguments, devices: int = 8, timeout: float = 600) -> str:
        script = tmp_path / "script.py"
        script.write_text(f"import tests.conftest  # compiles in haste\n{source}")
        done = subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            env=environment(devices),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


def environment(devices: int) -> dict[str, str]:
    """The environment of a process with ``devices`` virtual CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {HASTE}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def start_together(command: list, processes: int = 2, **variables: str) -> list[subprocess.Popen]:
    """Start ``command`` as ``processes`` processes of one run, with 8 virtual CPU devices in all.

    Where there are several they find each other at a free port; a lost one is noticed within 10 s.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    several |= {"ABLATE_HEARTBEAT_SECONDS": "10"}
    return [
        subprocess.Popen(
            list(map(str, command)),
            env={
                **environment(8 // processes),
                **({**several, "JAX_PROCESS_ID": str(index)} if processes > 1 else {}),
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish_together(started: list[subprocess.Popen], timeout: float = 300) -> list[tuple]:
    """Wait for all of ``started``; ``(exit code, standard output, standard error)`` of each."""
    try:
        told = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, told, strict=True)]
