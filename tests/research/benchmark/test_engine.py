"""``ablate bench engine`` on models so small that it is a matter of seconds."""

import importlib.util
import json
import os

import numpy as np
import pytest

from research import cli
from research.benchmark import engine, measure, record
from research.benchmark.targets import DECODE

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A Llama of a few channels, and few tokens; no ceiling is measured."""
    for name, value in dict(PROMPT=4, TOKENS=5, REQUESTS=4, VOCAB=32).items():
        monkeypatch.setattr(engine, name, value)
    sizes = {"13m_b8": engine.Size(64, 1, 2), engine.TRACE: engine.Size(64, 1, 2)}
    monkeypatch.setattr(engine, "CASES", sizes)
    ceiling = {"flops_per_second": 1e9, "bytes_per_second": 1e9}
    monkeypatch.setattr(measure, "ceilings", lambda *_: ceiling)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def bench(*names):
    budget = measure.Budget(300, len(names))
    return engine.bench(names, rounds=2, seconds=60, budget=budget)


def test_a_record_holds_both_sides_of_every_case(tmp_path, capsys):
    assert cli.main(["bench", "engine", "--rounds=2", "--record"]) == 0
    [path] = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["engine"]
    rows = found["cases"]["13m_b8"][DECODE]
    # nothing failed: the tokens agree
    assert rows[engine.OURS]["rounds"] == rows[engine.THEIRS]["rounds"] == 2
    speed = rows[engine.OURS]["tokens_per_second"]
    assert speed == pytest.approx(2 * 5 / rows[engine.OURS]["median"])
    assert 0 < rows[engine.OURS]["scheduler"] < 1
    assert found["cases"]["trace"][DECODE][engine.STATIC]["rounds"] == 2
    verdicts = {one["target"]: one for one in found["targets"]}
    for target in ("2x transformers", "1.4x static batches"):
        [name] = [name for name in verdicts if name.endswith(f"at least {target}") and (
            "13m_b8" in name or "trace" in name)]  # fmt: skip
        assert verdicts[name]["value"] > 0
    cpp = verdicts["cpu 13m_b8, decoding: at least 0.8x llama.cpp"]
    assert cpp["why"] == "llama.cpp not run: there is no export to GGUF"
    assert verdicts["cpu 50m_b1, decoding: at least 3x transformers"]["verdict"] == "not run"
    assert "engine 13m_b8, decoding (width=64" in capsys.readouterr().out


def test_one_that_chooses_other_tokens_has_no_speed(monkeypatch):
    generate = engine._their_generate

    def other(model, prompts):
        run = generate(model, prompts)
        return lambda: [[(token + 1) % 32 for token in row] for row in run()]

    monkeypatch.setattr(engine, "_their_generate", other)
    rows = bench("13m_b8")["cases"]["13m_b8"][DECODE]
    assert "of the norm away" in rows[engine.THEIRS]["absent"]
    assert "median" in rows[engine.OURS]


def test_without_transformers_ours_is_measured_alone(monkeypatch):
    find = importlib.util.find_spec
    gone = lambda name: None if name == "transformers" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    rows = bench("13m_b8")["cases"]["13m_b8"][DECODE]
    assert rows[engine.THEIRS] == {"absent": "skipped: torch and transformers not installed"}
    assert np.isfinite(rows[engine.OURS]["median"])
