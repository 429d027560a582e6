"""The board: every technique, claim and verdict, built from the records alone.

The same records give the same bytes, so a stale board is detected by building it again.
"""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from research.ablation.claims import STATUSES
from research.ablation.experiment import discover, folders, load
from research.ablation.results import comparable, metric_names
from research.ablation.summary import effect, number
from research.ablation.techniques import with_table
from research.files import Number, read_fields, write_text

_BOUND = (Number, None)
_TEXTS = ("experiment", "title", "paper", "matched", "scale", "command", "date")
_CLAIM = {
    **dict.fromkeys(("name", "statement", "paper", "target", "reason"), str),
    "status": set(STATUSES),
    "seeds": int,
    **dict.fromkeys(("mean", "low", "high"), _BOUND),
}
# the form of a record, see `research.files.mismatch`
_RECORD = {
    **dict.fromkeys(_TEXTS, str),
    "seeds": [int],
    "seconds": (int, float),
    "claims": [_CLAIM],
    "metrics": {str: {str: {"mean": Number, "low": _BOUND, "high": _BOUND}}},
    "environment": dict,
}

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1f24;--soft:#57606a;--line:#d0d7de;
--card:#f6f8fa;--yes:#116329;--no:#a40e26;--maybe:#7d4e00;--none:#57606a;--link:#0550ae}
@media(prefers-color-scheme:dark){:root{--back:#0d1117;--text:#e6edf3;--soft:#9aa4af;
--line:#30363d;--card:#161b22;--yes:#56d364;--no:#ff8182;--maybe:#e3b341;--none:#9aa4af;
--link:#79b8ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem;font:1rem/1.5 system-ui,sans-serif;
background:var(--back);color:var(--text);overflow-wrap:break-word}
h1{line-height:1.2}h2{line-height:1.25;margin-top:2.5rem}a{color:var(--link)}
.soft{color:var(--soft);font-size:.9rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line);
vertical-align:top}
td.number{text-align:right;white-space:nowrap}
caption{text-align:left;color:var(--soft);padding:.25rem 0}
ul.claims{list-style:none;padding:0}
ul.claims li{background:var(--card);border:1px solid var(--line);border-radius:.5rem;
padding:.75rem 1rem;margin:.75rem 0}
ul.claims h3{margin:.25rem 0;font-size:1rem;font-weight:500}
ul.claims p{margin:.25rem 0}
.verdict{font-weight:700}
.supported{color:var(--yes)}.not-supported{color:var(--no)}
.inconclusive{color:var(--maybe)}.not-run{color:var(--none)}
.figure{overflow-x:auto}
img{width:100%;min-width:36rem;height:auto;background:#fff;border-radius:.5rem}
pre{white-space:pre-wrap;background:var(--card);padding:.75rem;border-radius:.5rem}
"""


def results_folder(package: str = "experiments") -> Path:
    """The folder of the records of ``package``: the default of ``--results``."""
    return folders(package)[0] / "results"


def records(root: Path) -> list[dict[str, Any]]:
    """All records of runs below ``root``, sorted by name and scale.

    Hidden files, which a killed process left half written, are ignored.

    Raises:
      ConfigError: a record is damaged; names it.
    """
    paths = [
        path
        for path in root.rglob("*.json")
        if "plans" not in path.relative_to(root).parts and not path.name.startswith(".")
    ]
    remedy = "restore it, or delete it and run the experiment with --record"
    loaded = [dict(read_fields(path, _RECORD, remedy), path=path) for path in paths]
    return sorted(loaded, key=lambda record: (record["experiment"], record["scale"]))


def build(root: Path, package: str = "experiments") -> dict[Path, str]:
    """Path → text of the two boards, README.md and index.html.

    If ``root`` holds the records of ``package`` in a checkout, the result also has the checkout's
    README.md with the table of techniques.
    """
    loaded = records(root)
    built = {root / "README.md": _markdown(loaded, root), root / "index.html": _page(loaded)}
    package_results = results_folder(package)
    checkout = package_results.parent.parent
    readme = checkout / "README.md"
    if root == package_results and readme.exists():
        experiments = [load(name, package) for name in discover(package)]
        text = readme.read_text(encoding="utf-8")
        built[readme] = with_table(text, checkout, experiments, loaded)
    return built


def write(root: Path, package: str = "experiments") -> list[Path]:
    """Write the boards; returns their paths."""
    boards = build(root, package)
    for path, text in boards.items():
        write_text(path, text)
    return list(boards)


def stale(root: Path, package: str = "experiments") -> list[Path]:
    """The boards on disk that differ from what the records give."""
    return [
        path
        for path, text in build(root, package).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def _markdown(loaded: list[dict[str, Any]], root: Path) -> str:
    head = (
        "technique", "paper", "claim", "verdict", "effect", "seeds", "scale", "device", "date",
        "figure",
    )  # fmt: skip
    lines = ["# Results", "", "Written by `ablate report` from the records beside it.", ""]
    lines += [_row(head), "|" + "---|" * len(head)]
    for record in loaded:
        link = record["path"].relative_to(root).with_suffix(".png").as_posix()
        for claim in record["claims"]:
            cells = (
                f"`{record['experiment']}`",
                record["paper"],
                f"{claim['statement']} (paper: {claim['paper'] or 'no number'})",
                f"**{claim['status']}**",
                effect(claim),
                claim["seeds"],
                record["scale"],
                device(record),
                record["date"],
                f"[figure]({link})",
            )
            lines.append(_row(cells))
    if not loaded:
        lines.append(_row(("no records yet", *[""] * (len(head) - 1))))
    return "\n".join(lines) + "\n"


def device(record: dict[str, Any]) -> str:
    """The name of the device that a record was made on."""
    environment = record["environment"]
    value = environment.get("device") or environment.get("devices") or "unknown"
    if isinstance(value, dict):
        value = value.get("kind") or value.get("name") or ", ".join(map(str, value.values()))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _row(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _page(loaded: list[dict[str, Any]]) -> str:
    counts = {status: 0 for status in STATUSES}
    for record in loaded:
        for claim in record["claims"]:
            counts[claim["status"]] += 1
    tally = ", ".join(f"{count} {status}" for status, count in counts.items())
    rows = "".join(
        f'<tr><td><a href="#{_anchor(record)}">{escape(record["experiment"])}</a><br>'
        f'<span class="soft">{escape(record["scale"])}</span></td>'
        f"<td>{escape(claim['statement'])}</td><td>{_verdict(claim)}</td></tr>\n"
        for record in loaded
        for claim in record["claims"]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>Ablate: does the claim hold?</title>\n<style>{_STYLE}</style>\n</head>\n"
        "<body>\n<header><h1>Does the claim hold?</h1>\n"
        "<p>Each paper's claim beside a verdict made by a machine: the 95% interval over seeds "
        f"against a margin fixed before the run.</p>\n<p>{tally}.</p></header>\n<main>\n"
        f'<div class="scroll"><table><caption>All claims</caption><thead><tr><th scope="col">'
        'Technique</th><th scope="col">Claim</th><th scope="col">Verdict</th></tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n"
        f"{''.join(map(_section, loaded))}</main>\n</body>\n</html>\n"
    )


def _section(record: dict[str, Any]) -> str:
    claims = "".join(
        f"<li>{_verdict(claim)}<h3>{escape(claim['statement'])}</h3>"
        f"<p>Here: {escape(effect(claim))}; {claim['seeds']} seeds. "
        f"{escape(claim['reason'].capitalize())}.</p>"
        f'<p class="soft">Paper: {escape(claim["paper"] or "no number")}</p></li>\n'
        for claim in record["claims"]
    )
    tables = "".join(map(_table, comparable(record["metrics"])))
    names = metric_names(record["metrics"])
    figure = record["path"].with_suffix(".png")
    image = ""
    if figure.exists():
        data = base64.b64encode(figure.read_bytes()).decode("ascii")
        alt = escape(f"{', '.join(names)} of each arm, with seeds and 95% intervals", quote=True)
        image = f'<p class="figure"><img alt="{alt}" src="data:image/png;base64,{data}"></p>\n'
    anchor = _anchor(record)
    facts = (
        f"{record['scale']} scale · {device(record)} · {len(record['seeds'])} seeds · "
        f"{record['seconds']:.0f} s · {record['date']}"
    )
    return (
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{escape(record["title"])}</h2>\n'
        f'<p>{escape(record["paper"])}<br><span class="soft">Matched on {escape(record["matched"])}'
        f"<br>{escape(facts)}</span></p>\n"
        f'<ul class="claims">\n{claims}</ul>\n{image}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Metrics of '
        f'{escape(record["experiment"])}">{tables}</div>\n'
        f"<details><summary>Run it again</summary><pre>{escape(record['command'])}</pre></details>"
        "\n</section>\n"
    )


def _table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """An HTML table with a row per arm and a column per metric."""
    names = metric_names(arms)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(arm)}</th>'
        + "".join(f'<td class="number">{escape(number(spread.get(n)))}</td>' for n in names)
        + "</tr>\n"
        for arm, spread in arms.items()
    )
    return (
        '<table><caption>Mean ± half of the 95% interval</caption><thead><tr><th scope="col">Arm'
        f"</th>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    )


def _verdict(claim: dict[str, Any]) -> str:
    status = claim["status"]
    return f'<span class="verdict {status.replace(" ", "-")}">{status}</span>'


def _anchor(record: dict[str, Any]) -> str:
    return escape(f"{record['experiment']}-{record['scale']}".replace("/", "-"), quote=True)
