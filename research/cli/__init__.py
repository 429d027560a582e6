"""The command ``ablate``: lists and runs experiments, builds the board, and more.

Exit codes: 0 done; 1 a unit failed or the board is stale; 2 an invalid request or a disk that
cannot be written; 3 another process of the same run was lost; 128 + N stopped by signal N, after
which the same command continues the run: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 141 nobody reads.
"""

import argparse
import glob
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from layers.config import ConfigError
from pallas_kernels.names import suggest
from research.cli import bench, board, compile, generate, models, plan, run, serve, stop
from research.cli.errors import line

# Only argparse above: `ablate --help` must be fast. The commands import what requires JAX.

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message):
        raise ConfigError(message.replace("argument COMMAND: ", ""))

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            raise ConfigError(
                f"{action.metavar or action.dest}={value!r}: {suggest(value, action.choices)}"
            )

    def _get_value(self, action, arg_string):
        if not arg_string and action.dest != "prompt" and action.nargs != argparse.PARSER:
            name = action.option_strings[0] if action.option_strings else action.metavar
            raise ConfigError(f"{name}=: must not be empty")
        return super()._get_value(action, arg_string)


def main(argv: Sequence[str] | None = None, *, package: str = "experiments") -> int:
    """Run the command line ``argv`` (default: the process's); returns the exit code.

    ``package`` is the package with the experiments.
    """
    if argv is None:
        _with_huge_pages()
        stop.install()
    argv = list(sys.argv[1:] if argv is None else argv)
    _without_tpu()
    try:
        arguments, overrides = _split(argv)
        options = _parser().parse_args(arguments)
        if overrides and not hasattr(options, "unused"):
            raise ConfigError(
                f"--config.{overrides[0]}: only `ablate run` and `plan` take overrides"
            )
        options.overrides, options.package = overrides, package
        code = options.command(options)
    except (ValueError, OSError) as error:  # ConfigError, and a folder that cannot be written
        print(f"ablate: {line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        stop.settle()
        print("ablate: interrupted; the same command continues from here", file=sys.stderr)
        code = 130
    except SystemExit as exit_:
        _leave(exit_.code)
        raise
    stop.settle()
    _leave(code)
    return code


def _leave(code) -> None:
    """After a failure in a run of several processes, end without waiting for the others."""
    processes = sys.modules.get("research.parallel.processes")
    if code and processes:
        processes.leave(code if isinstance(code, int) else 1)


def _with_huge_pages() -> None:
    """Restart this process with huge pages for malloc, if Linux grants them on request.

    XLA:CPU allocates the memory of a step with malloc and frees it after the step. Mapping it again
    in pages of 4 KiB took a fifth of the time of training a small decoder. glibc ≥ 2.35 requests
    huge pages if GLIBC_TUNABLES says so when the process starts.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or not _HUGE_PAGES.exists():
        return
    if "[madvise]" in _HUGE_PAGES.read_text():
        tunables = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
        environment = {**os.environ, "GLIBC_TUNABLES": tunables}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _without_tpu() -> None:
    """Keep JAX from searching for a TPU where only the TPU compiler is installed, as for the tests.

    The search takes seconds and prints long warnings.
    """
    chips = [*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/[0-9]*")]
    others = any(find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    if find_spec("libtpu") and not chips and not others:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``argv`` without its ``--config.x=y`` options, and these options as ``x=y``."""
    prefix = "--config."
    arguments = [word for word in argv if not word.startswith(prefix)]
    return arguments, [word.removeprefix(prefix) for word in argv if word.startswith(prefix)]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "ablate",
        description="Does the paper's claim hold, here, with this code?",
        epilog=run.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (run, board, generate, serve, compile, plan, bench, models):
        module.add(commands)
    return parser
