"""Several processes as one run: they connect at the start, and all end when one of them is lost.

Every step requires all processes. When one is lost, the run must end; it is started again and
resumes from its last checkpoint. The other processes must not wait for hours before they end:

- a process that is killed closes its connections, and most often the others end at once;
- if they do not notice it (XLA's CPU devices can wait for one another after a collective has
  failed), or if a machine is gone or hangs, the process counts as lost after
  ``ABLATE_HEARTBEAT_SECONDS`` (30);
- a process that fails by itself ends at once. It does not enter JAX's barrier at exit: the other
  processes are in the middle of a step and would not reach that barrier.

A process that ends because another one was lost has exit code `LOST`.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from layers.config import ConfigError, check
from research.lock import locked

LOST = 3
PATIENCE = 10  # seconds that a process that fails waits for the others to fail as well
_LONGEST = 300  # seconds that one process may take to write what the others read afterwards
_MESSAGE = 1024  # bytes of an error message that are sent to the other processes

# parts of the error messages of collectives and of the coordination service when a peer is lost
_SIGNS = ("Gloo", "NCCL", "CoordinationService", "heartbeat", "UNAVAILABLE")

_name = ""  # "process 0 of 2", once there are several
_ending = threading.Lock()
_on_abort = None  # keeps the handler alive: C has only its address


def initialize() -> None:
    """Connect to the other processes of this run, if the environment variables say that it has any.

    With ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` (set by hand or
    by a JobSet), the processes are those that the variables describe. With
    ``ABLATE_DISTRIBUTED=1``, under Slurm or on TPU pods, `jax.distributed` finds them. Call it
    before JAX uses a device. Processes on CPUs communicate through gloo. A process without a sign
    of life for ``ABLATE_HEARTBEAT_SECONDS`` (30) counts as lost.

    Afterwards this process ends with exit code `LOST` and one line on standard error when another
    process is lost, and with 1 on an unhandled exception.

    Raises:
      ConfigError: a variable that must be a number is not one.
    """
    global _name
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address and os.environ.get("ABLATE_DISTRIBUTED") != "1":
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # it would take SIGTERM from the handlers of this process (`research.training.stopping`)
    jax.config.update("jax_enable_preemption_service", False)
    heartbeat = _number("ABLATE_HEARTBEAT_SECONDS", "30")
    if address:
        # "deactivate": else JAX under Slurm hides all devices but one, see below
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=heartbeat,
        )
    else:
        # Under Slurm JAX gives each process one device of its node. A process that is the only
        # one on its node takes all devices (an empty list is no limit): `tensor` and `sequence`
        # are sharded only over the devices of one process.
        tasks, nodes = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_NUM_NODES"))
        one_per_node = tasks is not None and tasks == nodes
        jax.distributed.initialize(
            local_device_ids=[] if one_per_node else None, heartbeat_timeout_seconds=heartbeat
        )
    if jax.process_count() > 1:
        _name = f"process {jax.process_index()} of {jax.process_count()}"
        _end_on_abort()
        sys.excepthook = _end_on_exception


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    check(text.isdecimal(), name, text, "must be a non-negative integer")
    return int(text)


def is_lead() -> bool:
    """Whether this process is the first one: it writes the files that only one process may write.

    In a run of one process this does not initialise JAX's devices: an experiment may still choose
    their number.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def fate_shared() -> Iterator[None]:
    """Inside, a collective that fails because another process is lost ends this one with `LOST`.

    It does not raise an exception: the code that handles exceptions, such as Orbax's, would wait
    for the lost process.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if is_loss(error):
            _end_as_lost(f"another process was lost ({_first_line(error)})")
        raise


def is_loss(error: BaseException) -> bool:
    """Whether ``error`` says that another process of this run is lost."""
    from_runtime = isinstance(error, jax.errors.JaxRuntimeError)
    return bool(_name) and from_runtime and any(sign in str(error) for sign in _SIGNS)


def same_everywhere(values: np.ndarray) -> bool:
    """Whether ``values`` (of one shape) are equal in all processes. All processes must call it."""
    gathered = multihost_utils.process_allgather(values) if _name else values[None]
    return bool((gathered == gathered[0]).all())


def first_failure(message: str) -> str:
    """The first error message of any process, returned in all processes; empty if nothing failed.

    All processes call it after the same work, each with its own error message or an empty text. If
    the others have not finished that work, because they wait for this process in a collective, they
    cannot receive the message: this process then ends with exit code 1, and the others end because
    it is lost.
    """
    if not _name:
        return message
    if not message:
        barrier()
    else:
        try:
            _barrier("work", PATIENCE)
        except Exception:
            _end(1, f"{message}; the other processes wait for this one, so they end too")
    encoded = message.encode()[:_MESSAGE]
    padded = np.frombuffer(encoded.ljust(_MESSAGE, b"\0"), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    texts = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in gathered)
    return next(filter(None, texts), "")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder`` (`research.lock`). All processes of this run call it.

    Raises:
      ConfigError: in all processes: another run is in ``folder``.
    """
    with contextlib.ExitStack() as stack:
        message = ""
        try:
            if is_lead():
                stack.enter_context(locked(folder))
        except ConfigError as error:
            message = str(error)
        if message := first_failure(message):
            raise ConfigError(message)
        yield


def barrier() -> None:
    """Wait until all processes have called it."""
    if not _name:
        return
    try:
        _barrier("work", _LONGEST)
    except Exception as error:
        _end_as_lost(f"another process was lost ({_first_line(error)})")


def leave(code: int) -> None:
    """End this process with exit code ``code`` if the run has several; otherwise do nothing.

    Processes that fail at about the same time let each other finish. A process that is the only one
    to fail ends after `PATIENCE` seconds.
    """
    if not _name:
        return
    try:
        _barrier("leave", PATIENCE)
        jax.distributed.shutdown()
    except Exception:  # the others do not reach the barrier
        pass
    _end(code)


def _barrier(name: str, seconds: int) -> None:
    """Wait until all processes have called it; raises after ``seconds``.

    It is a barrier of JAX's runtime, not a collective: other processes may be inside a collective.
    """
    from orbax.checkpoint import multihost  # makes the barrier's name unique

    multihost.get_barrier_sync_fn()(key=f"ablate {name}", timeout_ms=1000 * seconds)


def _end_on_exception(kind, error, trace) -> None:
    """A `sys.excepthook` that ends this process without waiting for the others at exit."""
    if is_loss(error):
        _end_as_lost(f"another process was lost ({_first_line(error)})")
    traceback.print_exception(kind, error, trace)
    leave(130 if issubclass(kind, KeyboardInterrupt) else 1)


def _end_on_abort() -> None:
    """Print the reason and end with `LOST` when JAX aborts this process.

    JAX's coordination service calls abort() from a C++ thread, in which no exception can be raised.
    A handler of `signal.signal` would not help: Python runs it later, in the main thread.
    """
    global _on_abort

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(number):
        _end_as_lost("JAX aborted this process (see above); most likely another process was lost")

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))
    _on_abort = on_abort


def _end_as_lost(reason: str) -> NoReturn:
    _end(LOST, f"{reason}; start all processes again to resume from the last checkpoint")


def _end(code: int, message: str = "") -> NoReturn:
    """Exit without Python's exit handlers; of two threads that call it, only the first prints."""
    if not _ending.acquire(blocking=False):
        while True:
            signal.pause()
    if message:
        os.write(2, f"\n{_name}: {message}\n".encode())
    if threading.current_thread() is threading.main_thread():
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(code)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
