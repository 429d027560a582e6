"""``ablate plan``: what an experiment's step requires on a TPU slice, without that slice."""

import argparse
import sys
from pathlib import Path

from layers.config import ConfigError
from research.cli.options import quiet

_PLAN = """examples:
  ablate plan architecture/gqa                                  # paper scale, its TOPOLOGY
  ablate plan architecture/gqa --topology=v5p:4x4x4 --mesh=fsdp:64
  ablate plan architecture/gqa --mesh=fsdp:64,zero:1 --mesh=data:4,fsdp:16
  ablate plan architecture/gqa --sweep                          # compare meshes and strategies
  ablate plan architecture/gqa --fit                            # the largest batch that fits
  ablate plan architecture/gqa --decode=256x8192                # a decoding step: one token per row
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="compile an experiment's step for a TPU slice: bytes, collectives, time at best",
        epilog=_PLAN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="an experiment, e.g. architecture/gqa")
    parser.add_argument("--scale", default="paper", help="smoke, cpu, gpu or paper (default)")
    parser.add_argument("--arms", help="comma-separated names, or all; default: the first")
    parser.add_argument("--topology", help="a slice, e.g. v5p:4x4x4; default: the experiment's")
    parser.add_argument(
        "--mesh",
        action="append",
        help="axes and strategies, e.g. fsdp:16,tensor:4 or fsdp:64,zero:1,offload:true; "
        "give several to compare them; default: the configuration's",
    )
    parser.add_argument("--batch", type=int, help="rows of the global batch")
    parser.add_argument("--decode", metavar="ROWSxLENGTH", help="decode after LENGTH tokens")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fit", action="store_true", help="find the largest batch that fits")
    what.add_argument("--sweep", action="store_true", help="compare meshes and strategies")
    what.add_argument("--record", action="store_true", help="plan paper scale and write the record")
    parser.add_argument_group("configuration").add_argument(
        "--config.FIELD=VALUE", dest="unused", help="override a field of the configuration"
    )
    parser.add_argument("--results", type=Path, help="folder of records; default: the package's")
    parser.set_defaults(command=_plan)


def _plan(options) -> int:
    from rich.console import Console

    from research.ablation import plans
    from research.ablation.experiment import load
    from research.ablation.report import results_folder
    from research.planning import report

    experiment = load(options.name, options.package)
    choices = (options.topology, options.arms, options.mesh, options.batch, options.decode)
    if options.record and (options.overrides or options.scale != "paper" or any(choices)):
        raise ConfigError("--record: plans paper scale as declared; leave out all other options")
    topology = options.topology or plans.topology(experiment, options.scale)
    arms = [arm.name for arm in experiment.arms]
    if options.record:
        arms = plans.paper_arms(experiment)
    elif options.arms != "all":
        arms = options.arms.split(",") if options.arms else arms[:1]
    setups = plans.setups(
        experiment,
        options.scale,
        topology,
        arms=arms,
        meshes=[_mesh(text) for text in options.mesh or ()],
        batch=options.batch,
        decode=_decode(options.decode),
        overrides=options.overrides,
    )
    # tables are wide; a file has no width limit
    width = None if sys.stdout.isatty() else 160
    console = Console(highlight=False, markup=False, width=width)

    def print_line(text: str) -> None:
        console.print(text, soft_wrap=True)

    with quiet():
        if options.sweep:
            planned = plans.sweep(setups, print_line)
        elif options.fit:
            planned = plans.largest(setups, print_line)
        else:
            planned = plans.plans(setups)
    if len(planned) == 1 and not options.record:
        for line in report.lines(planned[0]):
            console.print(line, soft_wrap=True)
    else:
        console.print(report.table(planned))
        console.print(report.verdict(planned), soft_wrap=True)
    if options.record:
        root = options.results or results_folder(options.package)
        paths = plans.record(experiment, options.scale, planned, root)
        console.print(f"written: {', '.join(map(str, paths))}", soft_wrap=True)
    fits = [one.plan.fits for one in planned]
    return 0 if (any if options.sweep else all)(fits) else 1


def _mesh(text: str) -> dict[str, object]:
    """``fsdp:16,zero:1`` as fields of `MeshConfig`."""
    pairs = [part.partition(":") for part in text.split(",")]
    if not all(name and colon and value for name, colon, value in pairs):
        raise ConfigError(f"--mesh={text}: must be comma-separated axis:size, e.g. fsdp:64")
    words: dict[str, object] = {"true": True, "false": False}

    def read(value: str) -> object:
        return int(value) if value.lstrip("-").isdigit() else words.get(value, value)

    return {name: read(value) for name, _, value in pairs}


def _decode(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    rows, _, length = text.partition("x")
    if not (rows.isdigit() and length.isdigit() and int(rows) and int(length)):
        raise ConfigError(f"--decode={text}: must be ROWSxLENGTH, e.g. 256x8192")
    return int(rows), int(length)
