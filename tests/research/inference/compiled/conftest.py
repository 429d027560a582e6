"""A key in a folder of the test's own."""

import pytest


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder of the key."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return tmp_path / "home/ablate"
