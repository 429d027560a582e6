"""``ablate run``: runs an experiment to its verdicts."""

import argparse
import os
import re
import shlex
import signal
import sys
from pathlib import Path

from layers.config import ConfigError
from research.cli import stop

EXAMPLES = """examples:
  ablate list
  ablate run architecture/gqa --scale=smoke
  ablate run architecture/gqa --arms=mha,gqa --seeds=0,1 --config.training.steps=100
  ablate run architecture/gqa --record && ablate report
  ablate run architecture/gqa --list-units | xargs -L1 -P4 ablate run architecture/gqa
"""


def add(commands) -> None:
    """Add the command to argparse's ``commands``."""
    parser = commands.add_parser(
        "run",
        help="run an experiment to its verdicts; resumes what is not finished",
        epilog=EXAMPLES,
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
    parser.add_argument("--results", type=Path, help="folder of records; default: the package's")
    parser.set_defaults(command=_run)


def _run(options) -> int:
    stop.goes_on()
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
        arms=None if options.arms is None else options.arms.split(","),
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
    except SystemExit:  # `Preempted`, whose exit status is 0
        stop.settle()
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
        folder = unit.workdir / "profile"
        if unit.profile and folder.exists():
            console.print(f"trace of {unit.arm}, seed {unit.seed}: {folder}", soft_wrap=True)
        elif unit.profile:
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


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds={text}: must be comma-separated numbers") from None


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
