"""Several processes as one run: they find each other, and end together when one is lost.

Every step needs all of them, so a run that has lost one can only end and be started again, which
takes it on from its last checkpoint. What must not happen is that the others wait for hours:

- a process that was killed closes its connections, and the others mostly end at once;
- where they do not see that (XLA's CPU devices can wait for one another after a collective has
  failed), or a machine is gone or hangs, it is given up after ``ABLATE_HEARTBEAT_SECONDS`` (30);
- a process that fails by itself tells nobody, so it ends at once, instead of waiting in JAX's
  barrier at exit for others that wait for it in the middle of a step.

The exit code of a process that ended because another was lost is `LOST`.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from layers.config import check

LOST = 3
PATIENCE = 10  # seconds that a process that fails gives others to fail with it
_LONGEST = 300  # seconds that a process may take to write what the others then read
_MESSAGE = 1024  # bytes of a failure that are told to the others

# How a collective or the coordination service says that its peer is not there.
_SIGNS = ("Gloo", "NCCL", "CoordinationService", "heartbeat", "UNAVAILABLE")

_name = ""  # "process 0 of 2", once there are several
_ending = threading.Lock()
_on_abort = None  # C keeps its address


def initialize() -> None:
    """Join the other processes of this run, where the environment says that there are any.

    ``JAX_COORDINATOR_ADDRESS`` with ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` names them by
    hand (or a JobSet does); under Slurm and on TPU pods `jax.distributed` finds them by itself when
    ``ABLATE_DISTRIBUTED=1``. Call it before anything touches a device. CPU processes use gloo.
    ``ABLATE_HEARTBEAT_SECONDS`` (30) without a sign of life, and a process is lost.

    From then on this process ends with exit code `LOST` and one line on standard error when
    another one is lost, and with 1 on an exception that nothing handles.

    Raises:
      ConfigError: a variable that is to be a number and is not.
    """
    global _name
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address and os.environ.get("ABLATE_DISTRIBUTED") != "1":
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    heartbeat = _number("ABLATE_HEARTBEAT_SECONDS", "30")
    if address:
        # "deactivate": under Slurm JAX would hide all devices but one, as below
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=heartbeat,
        )
    else:
        # Under Slurm JAX gives a process one device of its node. One that is alone there, as a
        # process must be for `tensor` and `sequence` to have several, takes all: no list, no limit.
        tasks, nodes = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_NUM_NODES"))
        alone = tasks is not None and tasks == nodes
        jax.distributed.initialize(
            local_device_ids=[] if alone else None, heartbeat_timeout_seconds=heartbeat
        )
    if jax.process_count() > 1:
        _name = f"process {jax.process_index()} of {jax.process_count()}"
        _end_on_abort()
        sys.excepthook = _end_on_exception


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    check(text.isdecimal(), name, text, "must be a number")
    return int(text)


def is_lead() -> bool:
    """Whether this is the process that writes what one of them has to: the first.

    A process that is alone asks no device for it: an experiment may still choose how many.
    """
    return not _name or jax.process_index() == 0


@contextlib.contextmanager
def fate_shared() -> Iterator[None]:
    """Inside, a collective that fails because its peer is lost ends this process (`LOST`).

    Not as an exception: what handles it, Orbax first, would wait for the lost process as well.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if is_loss(error):
            _lose(f"another process was lost ({_line(error)})")
        raise


def is_loss(error: BaseException) -> bool:
    """Whether ``error`` says that another process of this run is not there any more."""
    told = isinstance(error, jax.errors.JaxRuntimeError)
    return bool(_name) and told and any(sign in str(error) for sign in _SIGNS)


def same_everywhere(values: np.ndarray) -> bool:
    """Whether all processes hold the same ``values`` (of one shape). All must call it."""
    every = multihost_utils.process_allgather(values) if _name else values[None]
    return bool((every == every[0]).all())


def first_failure(message: str) -> str:
    """What failed in any of the processes, in all of them; empty if nothing did.

    All call it after the same piece of work, with what failed in it or the empty text. Where the
    others are still in the middle of that work, they wait for this one and cannot be told: then
    this process ends with exit code 1, which tells them.
    """
    if not _name:
        return message
    if not message:
        barrier()
    else:
        try:
            _barrier("work", PATIENCE)
        except Exception:
            _end(1, f"{message}; the other processes wait for this one and must end too")
    told = message.encode()[:_MESSAGE]
    padded = np.frombuffer(told.ljust(_MESSAGE, b"\0"), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(padded))
    texts = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in every)
    return next(filter(None, texts), "")


def barrier() -> None:
    """Wait until all processes are here."""
    if not _name:
        return
    try:
        _barrier("work", _LONGEST)
    except Exception as error:
        _lose(f"another process was lost ({_line(error)})")


def leave(code: int) -> None:
    """End this process, with ``code``, if it is one of several; if it is alone, do nothing.

    Those that all fail alike, a moment apart, let each other finish; one that fails alone leaves
    after `PATIENCE` seconds.
    """
    if not _name:
        return
    try:
        _barrier("leave", PATIENCE)
        jax.distributed.shutdown()
    except Exception:  # the others will not come; nothing is left to do for this one
        pass
    _end(code)


def _barrier(name: str, seconds: int) -> None:
    """Wait until all processes are here, and raise after ``seconds``: the runtime's barrier, not a
    collective, in which others may be."""
    from orbax.checkpoint import multihost  # which makes the name unique

    multihost.get_barrier_sync_fn()(key=f"ablate {name}", timeout_ms=1000 * seconds)


def _end_on_exception(kind, error, trace) -> None:
    """As `sys.excepthook`: in place of Python's way out, which waits for the other processes."""
    if is_loss(error):
        _lose(f"another process was lost ({_line(error)})")
    traceback.print_exception(kind, error, trace)
    leave(130 if issubclass(kind, KeyboardInterrupt) else 1)


def _end_on_abort() -> None:
    """Have the last word when JAX ends this process.

    Its coordination service calls abort() from a thread of its own in C++, where no exception can
    be raised, and `signal.signal` has no say there: Python would run its handler later, in the
    main thread.
    """
    global _on_abort

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(number):
        _lose("JAX gave this run up (see above); most likely another process was lost")

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))
    _on_abort = on_abort


def _lose(reason: str) -> NoReturn:
    _end(LOST, f"{reason}; start all of them again to go on from the last checkpoint")


def _end(code: int, message: str = "") -> NoReturn:
    """Exit without anything that Python does at exit; the first of two threads has the word."""
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


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
