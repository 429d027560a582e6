"""Mutate files that users have, and see that each is read, or refused with one line, in time.

    python tests/fuzz.py                          # 100,000 mutations of each kind of file
    python tests/fuzz.py config.json --count=2000 --seed=7
    python tests/fuzz.py --replay runs/fuzz-failures/config.json.0.1234     # with the traceback

A mutation depends on the kind, the seed and its number alone. Allowed are success and a
`ConfigError` of one line. Anything else is a failure: another exception, more than `SECONDS`,
more than `MEMORY`, or the end of the process. Its content is stored and can be replayed. The
mutations run in a process of their own, which is started again after the last failure. Exit status
0: no failures. pytest does not collect this file; tests/test_fuzz.py runs a few mutations.
"""

import argparse
import collections
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from layers.config import ConfigError  # noqa: E402
from tests.fuzzing.kinds import KINDS, Kind  # noqa: E402
from tests.fuzzing.mutate import mutated  # noqa: E402

COUNT = 100_000
SECONDS = 5
MEMORY = 2 << 30  # bytes beyond those of the process before it reads anything
STUCK = 30  # seconds after which a process that does not react to its clock is killed
FAILURES = Path("runs/fuzz-failures")


def content_of(kind: Kind, name: str, seed: int, number: int) -> bytes:
    """Mutation ``number`` of ``kind``."""
    return mutated(random.Random(f"{name} {seed} {number}"), kind.seeds, kind.words, kind.codec)


def outcome(kind: Kind, content: bytes) -> str:
    """``read``, ``refused``, or what went wrong."""
    try:
        with _limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read(content)
    except ConfigError as error:
        message = str(error)
        fits = "\n" not in message and len(message) < 2_000
        return "refused" if fits else f"a message that is not one short line: {message[:200]!r}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also a panic of a library in Rust
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:200]}"
    return "read"


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    """Raise `TimeoutError` after `SECONDS`."""

    def stop(signum, frame):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def work(name: str, seed: int, start: int, count: int) -> None:
    """Run mutations ``start … count − 1`` and print a line before each and for its outcome."""
    kind = KINDS[name]()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libraries print their panics
    for number in range(start, count):
        print(number, flush=True)
        print(
            outcome(kind, content_of(kind, name, seed, number)).encode("ascii", "replace").decode(),
            flush=True,
        )


def fuzz(name: str, seed: int, count: int, folder: Path) -> int:
    """Run ``count`` mutations of the kind ``name``; store the failures, and return their number."""
    began, shown, start = time.monotonic(), 0.0, 0
    outcomes: collections.Counter[str] = collections.Counter()
    stored: set[str] = set()
    while start < count:
        command = [sys.executable, __file__, name, f"--seed={seed}", f"--count={count}"]
        process = subprocess.Popen(
            [*command, f"--work={start}"], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        number = start - 1
        for line in _lines(process):
            if line.isdecimal():
                number = int(line)
                continue
            failed = line not in ("read", "refused")
            outcomes["failed" if failed else line] += 1
            if failed:
                _store(name, seed, number, line, folder, stored)
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                _report(name, seed, number + 1, count, outcomes, shown - began)
        process.wait()
        if number < start:
            raise SystemExit(f"{name}: the process ended with {process.returncode} at its start")
        if number + 1 < count:
            reason = f"the process ended with {process.returncode}"
            outcomes["failed"] += 1
            _store(name, seed, number, reason, folder, stored)
        start = number + 1
    _report(name, seed, count, count, outcomes, time.monotonic() - began)
    return outcomes["failed"]


def _lines(process: subprocess.Popen) -> Iterator[str]:
    """The lines that ``process`` prints; it is killed if it prints none for `STUCK` seconds."""
    assert process.stdout is not None

    def kill(signum, frame):
        process.kill()

    signal.signal(signal.SIGALRM, kill)
    first = True
    while True:
        # the first line comes after the imports and the models of all families
        signal.alarm(300 if first else STUCK)
        line = process.stdout.readline()
        signal.alarm(0)
        if not line:
            return
        first = False
        yield line.rstrip("\n")


def _store(name: str, seed: int, number: int, reason: str, folder: Path, stored: set[str]) -> None:
    """Write the first mutation of each kind of failure to ``folder``."""
    cause = reason.split(": ")[0]
    if cause in stored:
        return
    stored.add(cause)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{seed}.{number}"
    path.write_bytes(content_of(KINDS[name](), name, seed, number))
    print(f"FAILED {path}: {reason}", flush=True)


def _report(name, seed, done, count, outcomes, seconds) -> None:
    parts = ", ".join(f"{outcomes[key]} {key}" for key in ("read", "refused", "failed"))
    print(f"{name} seed {seed}: {done}/{count} in {seconds:.0f} s: {parts}", flush=True)


def replay(path: Path) -> int:
    """Read the stored file ``path`` again, without limits."""
    name = max((name for name in KINDS if path.name.startswith(name)), key=len, default=None)
    if name is None:
        raise SystemExit(f"{path.name}: must begin with one of {', '.join(KINDS)}")
    KINDS[name]().read(path.read_bytes())
    print(f"{path}: is read")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--count", type=int, default=COUNT, help="mutations of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=Path, metavar="FILE", help="a stored failure")
    parser.add_argument("--failures", type=Path, default=FAILURES, help="folder for failures")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.kinds) - KINDS.keys()
    if unknown:
        parser.error(f"KIND: must be one of {', '.join(KINDS)}")
    if options.replay:
        return replay(options.replay)
    if options.work is not None:
        work(options.kinds[0], options.seed, options.work, options.count)
        return 0
    names = options.kinds or list(KINDS)
    folder = options.failures.absolute()
    return int(any([fuzz(name, options.seed, options.count, folder) for name in names]))


if __name__ == "__main__":
    sys.exit(main())
