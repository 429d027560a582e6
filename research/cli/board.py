"""``ablate list`` and ``ablate report``: the experiments, and the board of their records."""

import sys
from pathlib import Path

from layers.config import check
from research.cli.errors import line


def add(commands) -> None:
    """Add the two commands to argparse's ``commands``."""
    parser = commands.add_parser("list", help="list experiments, claims and recorded verdicts")
    _add_results(parser)
    parser.set_defaults(command=_list)

    parser = commands.add_parser("report", help="build the board from the records")
    parser.add_argument("--check", action="store_true", help="only check whether it is stale")
    _add_results(parser)
    parser.set_defaults(command=_report)


def _add_results(parser) -> None:
    parser.add_argument("--results", type=Path, help="folder of records; default: the package's")


def _results(options) -> Path:
    """The folder of records: the one that was named must exist."""
    from research.ablation import report

    named = options.results
    check(named is None or named.is_dir(), "--results", str(named), "must be an existing folder")
    return named or report.results_folder(options.package)


def _list(options) -> int:
    from rich.console import Console

    from research.ablation import report
    from research.ablation.experiment import discover, load
    from research.ablation.techniques import took

    verdicts: dict[tuple[str, str], str] = {}
    runs: dict[str, list[str]] = {}
    for record in report.records(_results(options)):
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
            print(f"ablate: {name}: {line(error)}", file=sys.stderr)
            continue
        console.print(f"{name} ({'; '.join(runs.get(name, ['not run']))})", style="bold")
        console.print(f"  {experiment.paper}", style="dim", soft_wrap=True)
        for claim in experiment.claims:
            verdict = verdicts.get((name, claim.name), "not run")
            console.print(f"  {claim.name}: {verdict}")
    return code


def _report(options) -> int:
    from research.ablation import report

    root = _results(options)
    if options.check:
        stale = report.stale(root, options.package)
        for path in stale:
            print(f"ablate: {path} is stale: run `ablate report`", file=sys.stderr)
        return 1 if stale else 0
    for path in report.write(root, options.package):
        print(path)
    return 0
