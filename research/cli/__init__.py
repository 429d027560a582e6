"""The command ``ablate``: lists and runs experiments, builds the board, and more.

Exit codes: 0 done; 1 a unit failed or the board is stale; 2 an invalid request or a disk that
cannot be written; 3 another process of the same run was lost; 130 and 143 stopped by Ctrl-C or
SIGTERM, after which the same command continues the run.
"""

import argparse
import glob
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from layers.config import ConfigError
from pallas_kernels.names import suggest
from research.cli import bench, generate, models, plan

# Only argparse above: `ablate --help` must be fast. The commands import what requires JAX.

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_EXAMPLES = """examples:
  ablate list
  ablate run architecture/gqa --scale=smoke
  ablate run architecture/gqa --arms=mha,gqa --seeds=0,1 --config.training.steps=100
  ablate run architecture/gqa --record && ablate report
  ablate run architecture/gqa --list-units | xargs -L1 -P4 ablate run architecture/gqa
"""


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message):
        raise ConfigError(message.replace("argument COMMAND: ", ""))

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            raise ConfigError(
                f"{action.metavar or action.dest}={value!r}: {suggest(value, action.choices)}"
            )


def main(argv: Sequence[str] | None = None, *, package: str = "experiments") -> int:
    """Run the command line ``argv`` (default: the process's); returns the exit code.

    ``package`` is the package with the experiments.
    """
    if argv is None:
        _with_huge_pages()
        _in_any_encoding()
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
        print(f"ablate: {_line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("ablate: interrupted; the same command continues from here", file=sys.stderr)
        code = 130
    except SystemExit as stop:
        _leave(stop.code)
        raise
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


def _in_any_encoding() -> None:
    """Print ``?`` for characters that the terminal's encoding lacks, instead of an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _without_tpu() -> None:
    """Keep JAX from searching for a TPU where only the TPU compiler is installed, as for the tests.

    The search takes seconds and prints long warnings.
    """
    chips = [*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/[0-9]*")]
    others = any(find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    if find_spec("libtpu") and not chips and not others:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _line(error: Exception) -> str:
    """The first line of the message of ``error``, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``argv`` without its ``--config.x=y`` options, and these options as ``x=y``."""
    prefix = "--config."
    arguments = [word for word in argv if not word.startswith(prefix)]
    return arguments, [word.removeprefix(prefix) for word in argv if word.startswith(prefix)]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "ablate",
        description="Does the paper's claim hold, here, with this code?",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_list, _add_run, _add_report, generate.add, plan.add, bench.add, models.add):
        add(commands)
    return parser


def _add_list(commands) -> None:
    parser = commands.add_parser("list", help="list experiments, claims and recorded verdicts")
    _add_results(parser)
    parser.set_defaults(command=_list)


def _add_run(commands) -> None:
    parser = commands.add_parser(
        "run",
        help="run an experiment to its verdicts; resumes what is not finished",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="an experiment, e.g. architecture/gqa")
    parser.add_argument("--scale", default="cpu", help="smoke, cpu (default), gpu or paper")
    parser.add_argument("--arms", help="comma-separated names; default: all")
    parser.add_argument("--seeds", help="comma-separated numbers; default: the experiment's")
    parser.add_argument("--workdir", type=_folder, help="default: runs/NAME/SCALE")
    parser.add_argument("--record", action="store_true", help="write the record for the board")
    parser.add_argument(
        "--profile",
        metavar="FIRST:END",
        help="trace steps FIRST to END - 1 of each unit into the folder profile/ of its workdir",
    )
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="continue units whose files or tokenizer changed since they were begun",
    )
    parser.add_argument(
        "--list-units",
        action="store_true",
        help="print the options that run each independent part, one part per line, and stop",
    )
    parser.add_argument_group("configuration").add_argument(
        "--config.FIELD=VALUE", dest="unused", help="override a field of the configuration"
    )
    _add_results(parser)
    parser.set_defaults(command=_run)


def _add_report(commands) -> None:
    parser = commands.add_parser("report", help="build the board from the records")
    parser.add_argument("--check", action="store_true", help="only check whether it is stale")
    _add_results(parser)
    parser.set_defaults(command=_report)


def _add_results(parser) -> None:
    parser.add_argument("--results", type=Path, help="folder of records; default: the package's")


def _list(options) -> int:
    from rich.console import Console

    from research.ablation import report
    from research.ablation.experiment import discover, load
    from research.ablation.techniques import took

    verdicts: dict[tuple[str, str], str] = {}
    runs: dict[str, list[str]] = {}
    for record in report.records(options.results or report.results_folder(options.package)):
        runs.setdefault(record["experiment"], []).append(took(record))
        for claim in record["claims"]:
            other = verdicts.get((record["experiment"], claim["name"]))
            text = f"{claim['status']} ({record['scale']})"
            verdicts[record["experiment"], claim["name"]] = f"{other}, {text}" if other else text
    console = Console(highlight=False, markup=False)
    code = 0
    for name in discover(options.package):
        try:
            experiment = load(name, options.package)
        except Exception as error:  # an invalid file must not hide the others
            code = 2
            print(f"ablate: {name}: {_line(error)}", file=sys.stderr)
            continue
        console.print(f"{name} ({'; '.join(runs.get(name, ['not run']))})", style="bold")
        console.print(f"  {experiment.paper}", style="dim", soft_wrap=True)
        for claim in experiment.claims:
            verdict = verdicts.get((name, claim.name), "not run")
            console.print(f"  {claim.name}: {verdict}")
    return code


def _run(options) -> int:
    from rich.console import Console

    from research.ablation import report, runner, summary
    from research.ablation.experiment import load
    from research.ablation.progress import Progress
    from research.parallel import initialize
    from research.parallel.processes import is_lead

    initialize()  # before JAX is asked for its devices
    experiment = load(options.name, options.package)
    planned = runner.plan(
        experiment,
        options.scale,
        options.workdir or Path("runs") / experiment.name / options.scale,
        arms=options.arms.split(",") if options.arms else None,
        seeds=_seeds(options.seeds),
        overrides=options.overrides,
        profile=_steps(options.profile),
        accept_changed_data=options.accept_changed_data,
    )
    if options.record:
        planned.require_whole()
    for warning in planned.warnings:
        print(f"ablate: {warning}", file=sys.stderr)
    if options.list_units:
        for line in runner.apart(planned):
            print(line)  # not wrapped
        return 0
    lead = is_lead()
    console = Console(highlight=False, markup=False, quiet=not lead)
    _cache_compiled(planned.workdir / "compiled")
    try:
        failures = runner.execute(planned, Progress(console))
    except SystemExit:  # also `Preempted`, whose exit status is 0
        print("ablate: stopped; the same command continues from here", file=sys.stderr)
        return 128 + signal.SIGTERM
    if not lead:
        return 1 if failures else 0
    from research.training.environment import environment

    summarized = summary.summarize(
        planned, environment(), _repeat_command(options, experiment.name)
    )
    paths = summary.save(planned, summarized, planned.workdir)
    console.print(f"\n{experiment.name} at {options.scale} scale: mean ± 95%", style="bold")
    for table in summary.arms_tables(summarized):
        console.print(table)
    for line in summary.claim_lines(summarized):
        console.print(line, soft_wrap=True)
    changes = summarized.get("data_changes", [])
    for change in changes:
        print(f"ablate: other data: {change}", file=sys.stderr)
    if options.accept_changed_data and not changes:
        print("ablate: --accept-changed-data: no finished unit had changed data", file=sys.stderr)
    for (arm, seed), message in failures.items():
        print(f"ablate: {arm} seed {seed} failed: {message}", file=sys.stderr)
    for unit in planned.units:
        if unit.profile and not (unit.workdir / "profile").exists():
            print(
                f"ablate: {unit.arm} seed {unit.seed} has no trace: these steps were done before, "
                "or the unit has no training",
                file=sys.stderr,
            )
    if options.record and not failures:
        root = options.results or report.results_folder(options.package)
        paths += summary.record(planned, summarized, root)
    console.print(f"written: {', '.join(map(str, paths))}", soft_wrap=True)
    return 1 if failures else 0


def _folder(text: str) -> Path:
    if "://" in text:  # `Path` would take it for a local folder
        raise argparse.ArgumentTypeError(f"{text}: must be a folder; mount the bucket")
    return Path(text)


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+:\d+", text):
        raise ConfigError(f"--profile={text}: must be FIRST:END, e.g. 10:15 for steps 10 to 14")
    first, end = text.split(":")
    return int(first), int(end)


def _repeat_command(options, name: str) -> str:
    """The command that repeats this run on any machine: without this machine's folders."""
    words = ["ablate", "run", name, f"--scale={options.scale}"]
    words += [f"--arms={options.arms}"] if options.arms else []
    words += [f"--seeds={options.seeds}"] if options.seeds else []
    words += [f"--config.{text}" for text in options.overrides]
    return shlex.join(words + (["--record"] if options.record else []))


def _cache_compiled(folder: Path) -> None:
    """Cache compiled programs in ``folder``, for other units and for resumed runs."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _report(options) -> int:
    from research.ablation import report

    root = options.results or report.results_folder(options.package)
    if options.check:
        stale = report.stale(root, options.package)
        for path in stale:
            print(f"ablate: {path} is stale: run `ablate report`", file=sys.stderr)
        return 1 if stale else 0
    for path in report.write(root, options.package):
        print(path)
    return 0


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds={text}: must be comma-separated numbers") from None
