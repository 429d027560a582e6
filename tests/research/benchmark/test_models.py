"""``ablate bench models`` on models so small that it is a matter of seconds."""

import dataclasses
import importlib.util
import json
import os

import jax
import pytest

from research import cli
from research.benchmark import measure, models, record
from research.benchmark.targets import STEP

pytest.importorskip("torch")
pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=models.VOCAB, hidden_size=8, num_hidden_layers=1, tie_word_embeddings=True,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
HEADS = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A Llama and a Mamba-2 of a few channels; no ceiling is measured."""
    monkeypatch.setattr(models, "BATCH", 2)
    monkeypatch.setattr(models, "TIME", 6)
    chosen = {
        "llama": models.Model("Llama", "llama", dict(SIZES, **HEADS, intermediate_size=12)),
        "mamba2": models.Model(
            "Mamba2",
            "mamba2",
            dict(SIZES, state_size=4, num_heads=4, head_dim=4, n_groups=2),
        ),
    }
    monkeypatch.setattr(models, "MODELS", chosen)
    ceiling = {"flops_per_second": 1e9, "bytes_per_second": 1e9}
    monkeypatch.setattr(measure, "ceilings", lambda *_: ceiling)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    # much is compiled here and little computed
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def bench(names, rounds=2):
    budget = measure.Budget(300, len(names))
    return models.bench(names, rounds=rounds, seconds=60, budget=budget)


def test_a_record_holds_both_sides_of_every_model(tmp_path, capsys):
    assert cli.main(["bench", "models", "--rounds=3", "--record"]) == 0
    [path] = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["models"]
    assert list(found["cases"]) == ["llama", "mamba2"] and found["passes"] == [STEP]
    assert {"torch", "transformers"} < set(found["machine"]["packages"])
    for case in found["cases"].values():
        ours, theirs = (case[STEP][who] for who in (models.OURS, models.THEIRS))
        # nothing failed: the losses agree, and how far an update brings them down
        assert ours["rounds"] == theirs["rounds"] == 3
        ratio = ours["times_as_fast_as"]["transformers"]["ratio"]
        rounds = [b / a for a, b in zip(ours["times"], theirs["times"], strict=True)]
        assert ratio == sorted(rounds)[1]
        assert ours["temp_bytes"] > 0 and ours["compile_seconds"] > 0
    verdicts = {one["target"]: one for one in found["targets"]}
    one = verdicts["cpu llama, training step: at least 1x transformers"]
    assert one["verdict"] in ("met", "missed") and one["value"] > 0
    assert verdicts["cpu gpt2, training step: at least 1x transformers"]["verdict"] == "not run"
    page, shown = path.with_suffix(".md").read_text(), capsys.readouterr().out
    for text in (page, shown):
        assert "models llama, training step (width=256" in text and "parameters=8" in text
    assert path.with_name(f"{path.stem}-models.png").read_bytes().startswith(b"\x89PNG")


def test_one_that_learns_otherwise_has_no_speed(monkeypatch):
    prepare = models._prepare_theirs

    def faster(model, arrays):
        with monkeypatch.context() as patch:
            rate = dataclasses.replace(models.OPTIMIZER, learning_rate=2e-3)
            patch.setattr(models, "OPTIMIZER", rate)
            return prepare(model, arrays)

    monkeypatch.setattr(models, "_prepare_theirs", faster)
    rows = bench(["llama"], rounds=1)["cases"]["llama"][STEP]
    assert "of the norm away from ours/xla's" in rows["transformers"]["absent"]
    assert rows["ours/xla"]["rounds"] == 1 and rows["ours/xla"]["best_peer"] is None


def test_without_transformers_ours_is_timed_alone(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None if name == "torch" else there(name)
    )
    found = bench(["llama"], rounds=1)
    rows = found["cases"]["llama"][STEP]
    assert rows["transformers"] == {"absent": "skipped: torch not installed"}
    assert rows["ours/xla"]["rounds"] == 1
    [verdict] = [one for one in found["targets"] if "llama" in one["target"]]
    assert (verdict["verdict"], verdict["why"]) == (
        "not run",
        "transformers skipped: torch not installed",
    )


def test_models_that_are_not_alike_are_not_compared(monkeypatch):
    wide = dict(models.MODELS["llama"].fields, intermediate_size=24)
    other = models.MODELS["llama"]._replace(fields=wide)
    ours = models.our_model
    monkeypatch.setattr(models, "our_model", lambda model, directory: ours(other, None))
    with pytest.raises(
        models.ConfigError, match="llama: [0-9]+ parameters of ours, [0-9]+ of theirs"
    ):
        bench(["llama"])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--cases=lama"], "cases='lama': must be one of llama, mamba2 (did you mean 'llama'?)"),
        (["--shape=t=8", "--peers=none"], "op='models': does not support --shape, --peers"),
        (["--tune"], "op='models': does not support --tune"),
        (["--record", "--cases=llama"], "--record: runs everything; leave out --cases"),
        (["--rounds=0"], "rounds=0: must be from 1 to 10000"),
    ],
)
def test_a_request_that_cannot_be_is_one_line(arguments, said, capsys):
    assert cli.main(["bench", "models", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_nothing_is_recorded_beside_others_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (7.5, 1.0, 1.0))
    assert cli.main(["bench", "models", "--record"]) == 2
    assert "load=7.5: must be at most" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
