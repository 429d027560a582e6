"""The README's table of techniques, made from experiments, records and tests.

An experiment names its code (`CODE`). The kernels are those that this code or one of its helpers
imports. A helper is a file that the code imports from, or a file of research/ that the experiment
imports from. The oracles are the packages that the tests of code and kernels import. Verdicts,
scales and times come from the records.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.ablation.claims import STATUSES
from research.ablation.experiment import Experiment

BEGIN, END = "<!-- techniques: written by `ablate report` -->", "<!-- end of techniques -->"
# name in an import or `importorskip` → name in the table
ORACLES = {"torch": "torch", "transformers": "transformers", "rwkv": "rwkv"}


def with_table(
    readme: str, root: Path, experiments: Sequence[Experiment], records: Sequence[Mapping[str, Any]]
) -> str:
    """``readme`` with the new table between its two marks; unchanged if it has no marks.

    ``root`` is the checkout with the code and its tests.
    """
    before, begin, following = readme.partition(BEGIN)
    _, end, after = following.partition(END)
    if not (begin and end):
        return readme
    head = ("technique", "code", "kernels", "tested against", "claims", "recorded runs")
    lines = [_row(head), "|" + "---|" * len(head)]
    for experiment in experiments:
        its_records = [r for r in records if r["experiment"] == experiment.name]
        code = [root / path for path in experiment.code]
        helpers = [file for path in code for file in _helpers(root, path, ("layers", "research"))]
        helpers += _helpers(root, Path(str(experiment.module.__file__)), ("research",))
        files = dict.fromkeys((*code, *helpers))
        kernels = list(dict.fromkeys(op for path in files for op in _kernels(root, path)))
        tests = [_test(path) for path in (*experiment.code, *kernels)]
        lines.append(
            _row(
                (
                    _link(experiment.name, f"experiments/{experiment.name}.py"),
                    ", ".join(_link(Path(path).stem, path) for path in experiment.code),
                    ", ".join(_link(Path(k).name, f"{k}/__init__.py") for k in kernels),
                    ", ".join(_oracles(root / test for test in tests)),
                    "; ".join(f"{record['scale']}: {_tally(record)}" for record in its_records)
                    or f"{len(experiment.claims)} not run",
                    ", ".join(map(took, its_records)) or "none",
                )
            )
        )
    return before + begin + "\n\n" + "\n".join(lines) + "\n\n" + end + after


def took(record: Mapping[str, Any]) -> str:
    """The scale of a recorded run and the time that its units took: ``cpu, 11 min``."""
    return f"{record['scale']}, {max(1, round(record['seconds'] / 60))} min"


def _kernels(root: Path, path: Path) -> Iterator[str]:
    """The operations that the file belongs to or imports, as paths."""
    module_name = ".".join(path.relative_to(root).with_suffix("").parts)
    for module in (module_name, *(".".join(parts) for parts in _imported(path))):
        package, _, name = module.partition(".")
        op = name.partition(".")[0]
        if package == "pallas_kernels" and op and (root / package / op).is_dir():
            yield f"{package}/{op}"


def _helpers(root: Path, path: Path, floors: Sequence[str]) -> Iterator[Path]:
    """The files of ``floors`` that the file ``path`` imports from."""
    for module, name in _imported(path):
        file = _defined(root, module, name) if module.split(".")[0] in floors else None
        if file is not None:
            yield file


def _defined(root: Path, module: str, name: str) -> Path | None:
    """The file that defines ``name`` of ``module``; a package may import it from another file."""
    base = root.joinpath(*module.split("."))
    for path in (base / f"{name}.py", base / name / "__init__.py", base.with_suffix(".py")):
        if name and path.is_file():
            return path
    package = base / "__init__.py"
    if not package.is_file():
        return None
    for source, imported in _imported(package):
        if imported == name and source != module:
            return _defined(root, source, name)
    return package


def _imported(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of each import; ``import a.b`` gives a and b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                module, _, name = alias.name.rpartition(".")
                yield (module or name, name if module else "")


def _test(path: str) -> str:
    """The path of the tests of ``path``, in the same tree below tests/."""
    source = Path(path)
    return str(Path("tests") / source.parent / f"test_{source.stem}.py")


def _oracles(tests: Iterator[Path]) -> list[str]:
    oracles = set()
    for path in tests:
        # an operation may have several test files, e.g. test_wkv4.py and test_wkv7.py
        for file in sorted(path.parent.glob(f"{path.stem}*.py")):
            text = file.read_text(encoding="utf-8")
            skips = re.findall(r"importorskip\(\s*\"(\w+)", text)
            modules = (module.partition(".")[0] for module, _ in _imported(file))
            imports = {*modules, *skips}
            oracles |= {spelt for name, spelt in ORACLES.items() if name in imports}
            oracles |= {"float64 NumPy"} if "np.float64" in text else set()
    return sorted(oracles, key=str.lower)


def _tally(record: Mapping[str, Any]) -> str:
    counts = Counter(claim["status"] for claim in record["claims"])
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])


def _link(text: str, path: str) -> str:
    return f"[{text}]({path})"


def _row(cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
