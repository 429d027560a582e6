"""Notebooks run from top to bottom, and are stored with no output but pictures."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}})
    client.execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "def main(" in text  # what was generated
    assert "supported" in text  # what was decided


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs_but_pictures(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.get("execution_count") is None
        for output in cell.get("outputs", []):
            assert set(output.get("data", {})) == {"image/png"}
