"""``ablate compile``: a folder that an engine loads, and one line where it cannot be made."""

import dataclasses
from pathlib import Path

import jax
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.state import CacheConfig
from research.cli import main
from research.inference.engine import EngineConfig
from research.inference.engine.compiled import load_programs
from research.training import load_model, save_model

SMALL = DecoderConfig(16, 16, 1, attention=AttentionConfig(4), mlp=MlpConfig(8))
SIZES = ("--slots=2", "--max-length=16", "--chunk=8", "--page=4")
ENGINE = EngineConfig(2, 16, 8, CacheConfig("paged", page=4), prefix=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with checkpoints: with attention, with learned positions, and without keys."""
    folder = tmp_path_factory.mktemp("models")
    learned = dict(position="learned", max_length=12)
    recurrent = dict(pattern=("mamba",), mamba=MambaConfig(3), position="none")
    for name, fields in (("small", {}), ("learned", learned), ("recurrent", recurrent)):
        config = dataclasses.replace(SMALL, **fields)
        save_model(jax.jit(lambda c=config: Decoder(c, rngs=nnx.Rngs(0)))(), folder / name)
    return folder


@pytest.fixture
def runs(models, tmp_path, monkeypatch):
    """The folder in which the command runs."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def test_a_folder_is_written_that_an_engine_loads(runs, capsys):
    assert main(["compile", "small", "--to=DIR", *SIZES]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("written: DIR (6 programs, ")
    assert printed.err == "ablate: compiling\n"
    programs = load_programs(Path("DIR"), load_model(Path("small")), ENGINE)
    assert sorted(programs) == ["admit", "chunk", "copy", "decode", "resume", "snapshot"]
    assert main(["compile", "small", "--to=DIR", *SIZES]) == 2
    assert capsys.readouterr().err == "ablate: directory='DIR': must be absent or empty\n"


@pytest.mark.parametrize(
    "run, options, message",
    [
        ("none", [], "run='none': is not a folder"),
        ("small", ["--slots=0"], "slots=0: must be > 0"),
        ("small", ["--chunk=x"], "chunk='x': must be an integer"),
        ("small", ["--chunk=24"], "cache.page=16: must divide chunk=24"),
        ("small", ["--kv-dtype=int9"], "dtype='int9': must be one of float32, bfloat16"),
        ("small", ["--topology="], "--topology=: must not be empty"),
        ("learned", ["--max-length=16"], "max_length=16: must be at most the model's 12"),
        ("recurrent", ["--kv-dtype=int8"], "kv-dtype='int8': the model has no keys and values to"),
        ("recurrent", ["--page=4"], "page='4': the model has no keys and values to store"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(runs, capsys, run, options, message):
    assert main(["compile", run, "--to=DIR", *options]) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"ablate: {message}")
    assert not Path("DIR").exists()


@pytest.mark.tpu_compile
def test_programs_for_a_slice_that_is_absent_are_refused_here(runs, capsys):
    assert main(["compile", "small", "--to=DIR", *SIZES, "--topology=v5e:2x2"]) == 0
    assert capsys.readouterr().out.startswith("written: DIR (6 programs, ")
    with pytest.raises(ConfigError, match="^source.platform='cpu': 'DIR' has 'tpu'; compile it"):
        load_programs(Path("DIR"), load_model(Path("small")), ENGINE)
    for name, message in (
        ("v5x:2x2", "topology='v5x:2x2': "),
        ("v5e:2x4", "attention.num_heads=4: must be a multiple of mesh.tensor=8"),
    ):
        assert main(["compile", "small", "--to=NEW", *SIZES, f"--topology={name}"]) == 2
        (printed,) = capsys.readouterr().err.splitlines()
        assert printed.startswith(f"ablate: {message}")
