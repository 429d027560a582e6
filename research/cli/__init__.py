"""The command ``ablate``: list the experiments, run one to its verdicts, build the board, …

Exit codes: 0 done, 1 a unit failed or the board is stale, 2 a request that cannot be served or a
disk that takes no more, 3 another process of the same run was lost, 130 and 143 stopped by Ctrl-C
or SIGTERM: the same command goes on from there.
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

# Only argparse above: `ablate --help` answers at once, what needs JAX is imported in the commands.

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_EXAMPLES = """examples:
  ablate list
  ablate run architecture/gqa --scale=smoke
  ablate run architecture/gqa --arms=mha,gqa --seeds=0,1 --config.training.steps=100
  ablate run architecture/gqa --record && ablate report
  ablate run architecture/gqa --list-units | xargs -L1 -P4 ablate run architecture/gqa
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message):
        raise ConfigError(message.replace("argument COMMAND: ", ""))

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            raise ConfigError(
                f"{action.metavar or action.dest}={value!r}: {suggest(value, action.choices)}"
            )


def main(argv: Sequence[str] | None = None, *, package: str = "experiments") -> int:
    """Run the command line ``argv`` (default: the process's); the exit code.

    ``package`` is where experiments are looked for.
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
        print("ablate: interrupted; the same command goes on from here", file=sys.stderr)
        code = 130
    except SystemExit as stop:
        _leave(stop.code)
        raise
    _leave(code)
    return code


def _leave(code) -> None:
    """Where others run this command too and it failed here, end without waiting for them."""
    processes = sys.modules.get("research.parallel.processes")
    if code and processes:
        processes.leave(code if isinstance(code, int) else 1)


def _with_huge_pages() -> None:
    """Start this process again with huge pages behind malloc, where Linux gives them on request.

    XLA:CPU takes a step's memory from malloc and gives it back after each; to map it anew by pages
    of 4 KiB was a fifth of the work of training a small decoder. glibc ≥ 2.35 can ask, if told at
    the start.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or not _HUGE_PAGES.exists():
        return
    if "[madvise]" in _HUGE_PAGES.read_text():
        tunables = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
        environment = {**os.environ, "GLIBC_TUNABLES": tunables}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _in_any_encoding() -> None:
    """Print ``?`` for what the terminal's encoding lacks, in place of an error after a long run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _without_tpu() -> None:
    """Keep JAX from a TPU that is not here: where only its compiler is installed (as the tests
    want it), looking for the chip takes seconds and says at length that there is none."""
    chips = [*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/[0-9]*")]
    others = any(find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    if find_spec("libtpu") and not chips and not others:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _line(error: Exception) -> str:
    """The first line of what ``error`` says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``argv`` without its ``--config.x=y``, and those as ``x=y``."""
    prefix = "--config."
    rest = [word for word in argv if not word.startswith(prefix)]
    return rest, [word.removeprefix(prefix) for word in argv if word.startswith(prefix)]


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
    parser = commands.add_parser("list", help="every experiment, its claims and last verdicts")
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
    parser.add_argument("--arms", help="names with commas between; default: all")
    parser.add_argument("--seeds", help="numbers with commas between; default: the experiment's")
    parser.add_argument("--workdir", type=_folder, help="default: runs/NAME/SCALE")
    parser.add_argument("--record", action="store_true", help="write the record for the board")
    parser.add_argument(
        "--profile",
        metavar="FIRST:END",
        help="trace these steps of each unit, END not among them, into its folder's profile/",
    )
    parser.add_argument(
        "--list-units",
        action="store_true",
        help="print options of `ablate run`, a line for what can run apart, and stop",
    )
    parser.add_argument_group("configuration").add_argument(
        "--config.FIELD=VALUE", dest="unused", help="override a field of the configuration"
    )
    _add_results(parser)
    parser.set_defaults(command=_run)


def _add_report(commands) -> None:
    parser = commands.add_parser("report", help="build the board from the records")
    parser.add_argument("--check", action="store_true", help="only say whether it is stale")
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
            known = verdicts.get((record["experiment"], claim["name"]))
            text = f"{claim['status']} ({record['scale']})"
            verdicts[record["experiment"], claim["name"]] = f"{known}, {text}" if known else text
    console = Console(highlight=False, markup=False)
    broken = 0
    for name in discover(options.package):
        try:
            experiment = load(name, options.package)
        except Exception as error:  # one broken file must not hide the others
            broken = 2
            print(f"ablate: {name}: {_line(error)}", file=sys.stderr)
            continue
        console.print(f"{name} ({'; '.join(runs.get(name, ['not run']))})", style="bold")
        console.print(f"  {experiment.paper}", style="dim", soft_wrap=True)
        for claim in experiment.claims:
            verdict = verdicts.get((name, claim.name), "not run")
            console.print(f"  {claim.name}: {verdict}")
    return broken


def _run(options) -> int:
    from rich.console import Console

    from research.ablation import report, runner, summary
    from research.ablation.experiment import load
    from research.ablation.progress import Progress
    from research.parallel import initialize
    from research.parallel.processes import is_lead

    initialize()  # before anything asks which devices there are
    experiment = load(options.name, options.package)
    planned = runner.plan(
        experiment,
        options.scale,
        options.workdir or Path("runs") / experiment.name / options.scale,
        arms=options.arms.split(",") if options.arms else None,
        seeds=_seeds(options.seeds),
        overrides=options.overrides,
        profile=_steps(options.profile),
    )
    if options.record:
        planned.require_whole()
    for warning in planned.warnings:
        print(f"ablate: {warning}", file=sys.stderr)
    if options.list_units:
        for line in runner.apart(planned):
            print(line)  # whole, however long
        return 0
    lead = is_lead()
    console = Console(highlight=False, markup=False, quiet=not lead)
    _keep_compiled(planned.workdir / "compiled")
    try:
        failures = runner.execute(planned, Progress(console))
    except SystemExit:  # `Preempted` too, whose status says that all is well
        print("ablate: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGTERM
    if not lead:
        return 1 if failures else 0
    from research.training.environment import environment

    found = summary.summarize(planned, environment(), _again(options, experiment.name))
    paths = summary.save(planned, found, planned.workdir)
    console.print(f"\n{experiment.name} at {options.scale} scale: mean ± 95%", style="bold")
    for table in summary.arms_tables(found):
        console.print(table)
    for line in summary.claim_lines(found):
        console.print(line, soft_wrap=True)
    for (arm, seed), message in failures.items():
        print(f"ablate: {arm} seed {seed} failed: {message}", file=sys.stderr)
    for unit in planned.units:
        if unit.profile and not (unit.workdir / "profile").exists():
            print(
                f"ablate: {unit.arm} seed {unit.seed} has no trace: these steps were done before, "
                "or it trains nothing",
                file=sys.stderr,
            )
    if options.record and not failures:
        root = options.results or report.results_folder(options.package)
        paths += summary.record(planned, found, root)
    console.print(f"written: {', '.join(map(str, paths))}", soft_wrap=True)
    return 1 if failures else 0


def _folder(text: str) -> Path:
    if "://" in text:  # `Path` would make a local folder of it
        raise argparse.ArgumentTypeError(f"{text}: mount the bucket, and give the folder")
    return Path(text)


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+:\d+", text):
        raise ConfigError(f"--profile={text}: must be FIRST:END, e.g. 10:15 for steps 10 to 14")
    first, end = text.split(":")
    return int(first), int(end)


def _again(options, name: str) -> str:
    """The command that does this run again anywhere: without this machine's folders."""
    words = ["ablate", "run", name, f"--scale={options.scale}"]
    words += [f"--arms={options.arms}"] if options.arms else []
    words += [f"--seeds={options.seeds}"] if options.seeds else []
    words += [f"--config.{text}" for text in options.overrides]
    return shlex.join(words + (["--record"] if options.record else []))


def _keep_compiled(folder: Path) -> None:
    """Keep compiled programs, so that arms, seeds and a resumed run do not compile them again."""
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
        raise ConfigError(f"--seeds={text}: must be numbers with commas between") from None
