"""The summary of a run in JSON's types, its tables, and its record."""

import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from layers.config import ConfigError
from research.ablation.claims import NOT_RUN, interval95, judge, target
from research.ablation.figure import draw
from research.ablation.results import Results, comparable, metric_names
from research.ablation.runner import Plan, read_result, results, state
from research.data import what_changed
from research.files import plain, write_atomically, write_json, write_text
from research.training.workdir import data_record

NOT_ASKED = "not asked for"  # a claim about an arm that --arms leaves out
# the status and the reason of all other claims at smoke scale
NOT_DECIDED = "not decided at smoke scale"
PLUMBING = "it takes a few steps: it shows that all parts work and decides nothing"


def summarize(planned: Plan, environment: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Everything about a run that the board and a reader require, in JSON's types."""
    run_results, experiment = results(planned), planned.experiment
    units = []
    for unit in planned.units:
        if state(unit) == "finished":
            result = read_result(unit)
            units.append({key: result[key] for key in ("arm", "seed", "seconds", "metrics")})
    claims = []
    for claim in experiment.claims:
        verdict = judge(claim, run_results)
        if planned.scale == "smoke" and verdict.status != NOT_RUN:
            verdict = replace(verdict, status=NOT_DECIDED, reason=PLUMBING)
        claims.append(
            dict(
                name=claim.name,
                statement=claim.statement,
                paper=claim.paper,
                target=target(claim),
                gate=claim.gate.statement if claim.gate else None,
                **{key: getattr(verdict, key) for key in ("status", "reason", "mean", "low")},
                **{key: getattr(verdict, key) for key in ("high", "seeds", "values")},
                # a record lacks no arm, so it does not have this key
                **({"missing": verdict.missing} if verdict.missing else {}),
            )
        )
    return plain(
        dict(
            experiment=experiment.name,
            title=experiment.title,
            paper=experiment.paper,
            matched=experiment.matched,
            scale=planned.scale,
            arms=[arm for arm in dict.fromkeys(unit.arm for unit in planned.units)],
            seeds=planned.seeds,
            overrides=planned.overrides,
            command=command,
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            seconds=sum(unit["seconds"] for unit in units),
            claims=claims,
            metrics={arm: _spread(run_results, arm) for arm in run_results.arms},
            units=units,
            config=experiment.config(planned.scale, planned.overrides),
            environment=environment,
            **({"data_changes": changed} if (changed := _data_changes(planned)) else {}),
        )
    )


def save(planned: Plan, summary: Mapping[str, Any], folder: Path, stem: str = "") -> list[Path]:
    """Write summary.json, table.md and figure.png (or ``stem``.json, …) to ``folder``."""
    names = [f"{stem}.{end}" for end in ("json", "md", "png")]
    summary_path, table_path, figure_path = (
        folder / name for name in (names if stem else ("summary.json", "table.md", "figure.png"))
    )
    run_results = results(planned)
    if run_results.arms:
        write_atomically(figure_path, lambda path: draw(planned.experiment, run_results, path))
    write_text(table_path, markdown(summary))
    write_json(summary_path, summary)  # last: the board is built from it
    return [summary_path, table_path, *([figure_path] if run_results.arms else [])]


def record(planned: Plan, summary: Mapping[str, Any], root: Path) -> list[Path]:
    """Write the record ``<root>/<branch>/<name>-<scale>.json``, .md and .png; their paths.

    Raises:
      ConfigError: the run is not the experiment as declared, or a unit is not finished.
    """
    planned.require_whole()
    missing = [f"{u.arm}/seed{u.seed}" for u in planned.units if state(u) != "finished"]
    if missing:
        raise ConfigError(f"--record: requires all units; unfinished: {', '.join(missing)}")
    branch, _, stem = planned.experiment.name.rpartition("/")
    return save(planned, summary, root / branch, f"{stem}-{planned.scale}")


def markdown(summary: Mapping[str, Any]) -> str:
    """The verdicts and the arms × metrics table as Markdown."""
    lines = [f"# {summary['title']}", "", f"Paper: {summary['paper']}  "]
    lines += [f"Matched on: {summary['matched']}  ", f"Scale: {summary['scale']}", ""]
    lines += ["| claim | paper | verdict | effect | why |", "|---|---|---|---|---|"]
    for claim in summary["claims"]:
        status = NOT_ASKED if _left_out(claim, summary) else claim["status"]
        row = (claim["statement"], claim["paper"], status, effect(claim), claim["reason"])
        lines.append(_row(row))
    for change in summary.get("data_changes", []):
        lines += ["", f"Other data: {change}"]
    for arms in comparable(summary["metrics"]):
        names = metric_names(arms)
        lines += ["", _row(("arm", *names)), "|---|" + "---:|" * len(names)]
        for arm, spread in arms.items():
            lines.append(_row((arm, *(number(spread.get(name)) for name in names))))
    return "\n".join(lines) + "\n"


def arms_tables(summary: Mapping[str, Any]) -> list[Table]:
    """A table for each group of `comparable` arms: mean ± half of the 95% interval.

    The columns are the arms or the metrics, whichever are fewer.
    """
    tables = []
    for spreads in comparable(summary["metrics"]):
        table = Table()
        arms, metrics = list(spreads), metric_names(spreads)
        columns, rows = (arms, metrics) if len(metrics) > len(arms) else (metrics, arms)
        table.add_column("metric" if rows is metrics else "arm", overflow="fold")
        for name in columns:
            table.add_column(name, justify="right", overflow="fold")
        for row in rows:
            pairs = ((row, name) if rows is arms else (name, row) for name in columns)
            table.add_row(row, *(number(spreads[arm].get(name)) for arm, name in pairs))
        tables.append(table)
    return tables


def claim_lines(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per claim; one for all claims that require arms which this run leaves out."""
    claims = [claim for claim in summary["claims"] if not _left_out(claim, summary)]
    lines = [
        f"{claim['status'].upper()}: {claim['statement']} ({claim['reason']}; "
        f"paper: {claim['paper'] or 'no number'})"
        for claim in claims
    ]
    if left_out := len(summary["claims"]) - len(claims):
        lines.append(f"{NOT_ASKED}: claims that require arms which --arms leaves out: {left_out}")
    return lines


def _left_out(claim: Mapping[str, Any], summary: Mapping[str, Any]) -> bool:
    """Whether the claim requires an arm that this run leaves out."""
    missing = claim.get("missing")
    return missing is not None and missing not in summary["arms"]


def number(spread: Mapping[str, Any] | None) -> str:
    """``1.234 ± 0.012``; only the mean if there is no interval; empty if ``spread`` is None."""
    if spread is None:
        return ""
    average = f"{float(spread['mean']):.4g}"
    if spread["low"] is None or spread["high"] is None:
        return average
    return f"{average} ± {(float(spread['high']) - float(spread['low'])) / 2:.2g}"


def effect(claim: Mapping[str, Any]) -> str:
    """``0.004 [-0.002, 0.011], must be < 0.02``: the mean, its interval, what is claimed."""
    if claim["mean"] is None:
        return f"must be {claim['target']}"
    interval = ""
    if None not in (claim["low"], claim["high"]) and claim["low"] != claim["high"]:
        interval = f" [{float(claim['low']):.4g}, {float(claim['high']):.4g}]"
    return f"{float(claim['mean']):.4g}{interval}, must be {claim['target']}"


def _data_changes(planned: Plan) -> list[str]:
    """Where finished units were trained on other data: after a step, or than another unit."""
    lines: list[str] = []
    first: dict[str, tuple[str, Any]] = {}
    for unit in planned.units:
        record = data_record(unit.workdir) if state(unit) == "finished" else None
        if record is None:
            continue
        given, data = record
        name = f"{unit.arm}, seed {unit.seed}"
        lines += [
            f"{name}, after step {entry['step']}: {'; '.join(entry['changes'])}"
            for entry in data.get("history", [])
        ]
        # units that were given the same configuration of the data
        other, before = first.setdefault(json.dumps(given, sort_keys=True), (name, data))
        changed = what_changed(before, data)
        lines += [f"{name}, unlike {other}: {'; '.join(changed)}"] if changed else []
    return lines


def _spread(run_results: Results, arm: str) -> dict[str, dict[str, Any]]:
    spreads = {}
    for name, by_seed in run_results.scalars(arm).items():
        values = list(by_seed.values())
        low, high = interval95(values) if len(values) > 1 else (None, None)
        spreads[name] = dict(mean=sum(values) / len(values), low=low, high=high, seeds=len(values))
    return spreads


def _row(cells: Any) -> str:
    escape: Callable[[Any], str] = lambda cell: str(cell).replace("|", "\\|")  # noqa: E731
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"
