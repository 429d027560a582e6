"""The record names the machine, and is made where there is no git as well."""

import json
import re
import subprocess

from research.training import environment as module
from research.training.environment import config_hash, environment


def test_environment_is_json_without_paths():
    found = environment()
    text = json.dumps(found)
    assert "/root" not in text and "/home" not in text
    assert found["devices"] >= 1 and "numpy" in found["packages"]


def test_outside_a_checkout_nothing_is_said_of_it(monkeypatch):
    failed = subprocess.CompletedProcess([], 128, stdout="", stderr="not a git repository")
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: failed)
    found = environment()
    assert found["commit"] is None and found["dirty"] is None


def test_a_machine_without_git_is_recorded_too(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment()
    assert found["commit"] is None and found["dirty"] is None


def test_hash_ignores_order_and_sees_values():
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1}) != config_hash({"a": 1})
    assert re.fullmatch("[0-9a-f]{16}", config_hash({}))
