"""Which files import which, read from their text: floors, rooms and files import one way."""

import ast
import graphlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floors, from the top: each imports from those after it.
FLOORS = ("notebooks", "experiments", "research", "layers", "pallas_kernels")

# The rooms of research, from the top. A room imports from those on later lines: those on its own
# line stand beside one another. A new room goes onto the line above what it imports.
ROOMS = (
    ("cli", "launch"),
    ("ablation", "benchmark"),
    ("planning",),  # compiles the training step
    ("convert", "inference"),  # what is done with trained models
    ("training",),
    ("models",),
    ("data", "parallel"),
    ("files", "lock", "memory"),
)


def modules() -> dict[str, Path]:
    """Module → its file, of every floor but the notebooks, which are none."""
    found = {}
    for floor in FLOORS[1:]:
        for path in (ROOT / floor).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(text: str) -> Iterator[str]:
    """Ours of the modules that ``text`` imports, also inside functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            # a name of a package is a module of its own, or is defined by the package
            names = [name if name in MODULES else str(node.module) for name in inside]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in (*FLOORS, "tests"))


GRAPH = {
    module: set(imports(path.read_text(encoding="utf-8"))) - {module}
    for module, path in MODULES.items()
}
EDGES = [(module, other) for module in sorted(GRAPH) for other in sorted(GRAPH[module])]


def upward(edges, rank) -> list[str]:
    """The ``edges`` that do not go down, or stay where they are, by ``rank`` of a module."""
    wrong = []
    for module, other in edges:
        above, below = rank(module), rank(other)
        if above[0] > below[0] or (above[0] == below[0] and above != below):
            wrong.append(f"{module} imports {other}")
    return wrong


def floor(module: str) -> tuple[int, str]:
    name = module.split(".")[0]
    return (-1 if name == "tests" else FLOORS.index(name)), name


def room(module: str) -> tuple[int, str]:
    name = module.split(".")[1]
    return next(at for at, names in enumerate(ROOMS) if name in names), name


def test_floors_import_downwards():
    assert upward(EDGES, floor) == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_import_what_is_there(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    # a line that is IPython's own has no imports
    code = [
        re.sub(r"^(\s*)[%!].*", r"\1pass", "".join(cell["source"]), flags=re.MULTILINE)
        for cell in cells
        if cell["cell_type"] == "code"
    ]
    found = {module for text in code for module in imports(text)}
    assert found and found <= set(MODULES)


def test_every_import_is_of_a_module_that_is_there():
    assert [f"{module} imports {other}" for module, other in EDGES if other not in MODULES] == []


def test_every_room_has_its_place_in_the_order():
    listed = [name for names in ROOMS for name in names]
    there = {module.split(".")[1] for module in MODULES if module.startswith("research.")}
    there |= {path.name for path in (ROOT / "research").iterdir() if path.is_dir()}
    assert len(set(listed)) == len(listed) and there - {"__pycache__"} == set(listed)


def test_rooms_import_downwards():
    between = [
        (module, other)
        for module, other in EDGES
        if module.startswith("research.") and other.startswith("research.")
    ]
    assert upward(between, room) == []


def test_no_files_import_each_other():
    graph = {module: GRAPH[module] & set(GRAPH) for module in GRAPH}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import each other: {' → '.join(reversed(error.args[1]))}")


def test_the_reader_sees_imports_of_every_kind():
    text = """
import jax, research.files
from research.planning import plan, nothing
def later():
    from research import training
    from layers.config import check
"""
    assert sorted(imports(text)) == [
        "layers.config", "research.files", "research.planning", "research.planning.plan",
        "research.training",
    ]  # fmt: skip
    edges = [("research.data.packing", "research.training.loop"), ("research.a", "experiments.b")]
    assert upward(edges[:1], room) and upward(edges[1:], floor)
    assert upward([("research.data", "research.parallel.mesh")], room)
    assert not upward([("research.training.loop", "research.data")], room)
    assert not upward([("research.training.loop", "research.training.step")], room)
