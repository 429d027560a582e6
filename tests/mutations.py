"""Plant faults one at a time, and see that the tests find them: a test of the default tests.

    python tests/mutations.py              # all of them
    python tests/mutations.py mask-window-one-further moe-capacity-rounds-down
    python tests/mutations.py --list       # check the table, and print it
    python tests/mutations.py --without    # the same tests without a fault: all must pass

The faults are in `mutations.toml`. The tracked files are copied to a temporary folder, a fault is
written into the copy, and the tests named beside it are run there: one of them must fail. A run
that fails for another reason (a test is not there, a file cannot be imported, no time is left) is
no proof and counts as an error. Exit status 0: all faults were caught. pytest does not collect
this file.
"""

import argparse
import dataclasses
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".toml")
# those of `make test`; one order of Hypothesis's examples, so that a result can be had again
PYTEST = ("-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider", "--hypothesis-seed=0")
DEFAULT = ("-m", "not slow and not soak and not gpu")
FAILED = 1  # pytest's exit status when tests ran and some failed


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A fault: ``new`` in place of ``old`` in ``file``, which one of ``tests`` must find."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def complaint(self) -> str | None:
        """Why it cannot be planted, or None."""
        path = ROOT / self.file
        count = path.read_text(encoding="utf-8").count(self.old) if path.is_file() else 0
        if count != 1:
            return f"{self.name}: its text stands {count} times in {self.file}, must be once"
        if self.old == self.new:
            return f"{self.name}: changes nothing"
        missing = [t for t in self.tests if not (ROOT / t.partition("::")[0]).exists()]
        return f"{self.name}: no such file: {missing[0]}" if missing else None


class Run:
    """A run of pytest in a copy of the repository.

    ``status`` is pytest's, or None where it was stopped after ``limit`` seconds; ``first`` is the
    first test that failed, and ``output`` what pytest printed.
    """

    running: set[subprocess.Popen] = set()

    def __init__(self, copy: Path, tests: Iterable[str], limit: float | None):
        begun = time.monotonic()
        environment = {
            **os.environ,
            "PYTHONPATH": str(copy),
            # a fault may be as long as what it replaces: bytecode could be mistaken for its own
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        process = subprocess.Popen(
            [sys.executable, *PYTEST, *DEFAULT, *tests],
            cwd=copy,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that what the tests start ends with them
        )
        self.running.add(process)
        try:
            self.output, self.status = process.communicate(timeout=limit)[0], process.returncode
        except subprocess.TimeoutExpired:
            stop(process)
            self.output, self.status = process.communicate()[0], None
        self.running.discard(process)
        self.seconds = time.monotonic() - begun
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", self.output, re.MULTILINE)
        self.first = failed[1] if failed else ""


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def load() -> dict[str, Mutation]:
    """Name → mutation, of the table."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {
        name: Mutation(name, **{**row, "tests": tuple(row["tests"])}) for name, row in table.items()
    }


def copy_tracked(target: Path) -> Path:
    """The tracked files as they are on disk, under ``target``."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def caught(mutation: Mutation, copies: "queue.Queue[Path]", limit: float) -> bool:
    """Whether its tests find ``mutation``; prints a line."""
    copy = copies.get()
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        run = Run(copy, mutation.tests, limit)
    finally:
        path.write_text(text, encoding="utf-8")
        copies.put(copy)
    if run.status == FAILED and run.first:
        verdict = "caught"
    else:
        verdict = "MISSED" if run.status == 0 else "NOT RUN"
    print(f"{verdict:8}{run.seconds:4.0f} s  {mutation.name}  {run.first}", flush=True)
    if verdict == "NOT RUN":
        why = f"no end after {limit:.0f} s" if run.status is None else f"status {run.status}"
        print(f"{why}\n{run.output[-2000:]}", flush=True)
    return verdict == "caught"


def run_all(mutations: Sequence[Mutation], jobs: int, limit: float, folder: Path) -> int:
    """The number of ``mutations`` that were not caught; each job has a copy of its own."""
    copies: queue.Queue[Path] = queue.Queue()
    for number in range(jobs):
        copies.put(copy_tracked(folder / str(number)))
    with ThreadPoolExecutor(jobs) as pool:
        try:
            found = list(pool.map(lambda m: caught(m, copies, limit), mutations))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(Run.running):
                stop(process)
            raise
    print(f"{sum(found)} of {len(found)} caught")
    return len(found) - sum(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each")
    parser.add_argument("--list", action="store_true", help="check the table and print it")
    parser.add_argument("--without", action="store_true", help="run the tests without a fault")
    arguments = parser.parse_args()
    table = load()
    if unknown := [name for name in arguments.names if name not in table]:
        parser.error(f"no such mutation: {', '.join(unknown)}")
    if complaints := [c for m in table.values() if (c := m.complaint())]:
        parser.error("\n".join(complaints))
    mutations = [table[name] for name in arguments.names or table]
    if arguments.list:
        for mutation in mutations:
            print(f"{mutation.name}  {mutation.file}  {' '.join(mutation.tests)}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if arguments.without:
            tests = dict.fromkeys(test for mutation in mutations for test in mutation.tests)
            run = Run(copy_tracked(Path(folder)), tests, None)
            print(run.output)
            return run.status or 0
        return 1 if run_all(mutations, arguments.jobs, arguments.limit, Path(folder)) else 0


if __name__ == "__main__":
    sys.exit(main())
