"""Scaled rotations: every form in config.json, and the context that they are for."""

import copy

import numpy as np
import pytest

from layers.config import ConfigError
from layers.rotary import frequencies
from research.cli import main
from research.models import FAMILIES, decoder_config, load, save
from research.training import load_model
from tests.research.models.conftest import (
    CASES,
    LLAMA,
    LONGROPE,
    TOKENS,
    assert_close,
    assert_same,
    make,
    transformers_model,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROPES = {
    "dynamic": dict(rope_type="dynamic", factor=3.0),
    "yarn": dict(rope_type="yarn", factor=3.0),
    "yarn_null": dict(rope_type="yarn", factor=None, original_max_position_embeddings=16),
    "yarn_exact": dict(
        rope_type="yarn", factor=3.0, original_max_position_embeddings=16, truncate=False,
        beta_fast=4.0, beta_slow=0.5, attention_factor=1.7,
    ),
    "yarn_mscale": dict(
        rope_type="yarn", factor=3.0, original_max_position_embeddings=16, mscale=0.7,
        mscale_all_dim=1.3,
    ),
    "longrope": dict(
        rope_type="longrope", short_factor=[1.0, 1.1, 1.3, 2], long_factor=[1.5, 2, 8, 40.0],
        original_max_position_embeddings=16,
    ),
    "longrope_factors": dict(
        rope_type="longrope", short_factor=[1.0, 1.1, 1.3, 2], long_factor=[1.5, 2, 8, 40.0],
        original_max_position_embeddings=16, factor=9.0, attention_factor=0.9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers_and_survive_the_round_trip(name):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = dict(LLAMA, hidden_size=32, max_position_embeddings=96)
    fields["rope_parameters"] = {**ROPES[name], "rope_theta": 1e4}
    theirs = transformers.LlamaConfig(**copy.deepcopy(fields))
    length = 96 if "longrope" in name else None
    want, growth = ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]](theirs, "cpu", seq_len=length)
    config = decoder_config({"architectures": ["LlamaForCausalLM"], **fields})
    scaling = config.rotary.scaling
    np.testing.assert_allclose(scaling(frequencies(8, 1e4), 1e4), want.numpy(), rtol=1e-6)
    assert scaling.growth == pytest.approx(growth, rel=1e-9)
    written = FAMILIES["llama"].write(config)
    assert decoder_config({"architectures": ["LlamaForCausalLM"], **written}) == config
    again = transformers.LlamaConfig(**written)
    back, growth_back = ROPE_INIT_FUNCTIONS[scaling.kind](again, "cpu", seq_len=length)
    np.testing.assert_allclose(back.numpy(), want.numpy(), rtol=1e-6)
    assert growth_back == pytest.approx(growth, rel=1e-9)


def test_the_older_name_of_longrope_is_read():
    fields = dict(LLAMA, original_max_position_embeddings=16)
    rope = {name: value for name, value in ROPES["longrope"].items() if "rope_type" not in name}
    one, other = (
        decoder_config(
            {"architectures": ["LlamaForCausalLM"], **fields, "hidden_size": 32,
             "rope_scaling": {"type": kind, **rope}}
        )
        for kind in ("su", "longrope")
    )  # fmt: skip
    assert one == other and one.rotary.scaling.kind == "longrope"


def test_a_context_chooses_the_rotation_for_the_whole_run(tmp_path):
    """transformers chooses it for each input; at that length the two agree."""
    dynamic = dict(rope_type="dynamic", factor=3.0, rope_theta=1e4)
    fields = dict(LLAMA, max_position_embeddings=16, rope_parameters=dynamic)
    llama = transformers_model("Llama", **fields)
    llama.save_pretrained(tmp_path / "llama")
    assert_close(load(tmp_path / "llama", context=TOKENS.shape[1]), llama)
    fresh = transformers_model("Llama", **fields)
    fresh.load_state_dict(llama.state_dict())
    assert_close(load(tmp_path / "llama"), fresh, TOKENS[:, :16])
    # a context up to that of training changes nothing
    assert_close(load(tmp_path / "llama", context=7), fresh, TOKENS[:, :16])

    kind, fields = CASES["phi3_partial"]
    fields = dict(fields, original_max_position_embeddings=16)
    fields["rope_parameters"] = dict(LONGROPE, original_max_position_embeddings=16)
    phi = transformers_model(kind, **fields)
    phi.save_pretrained(tmp_path / "phi")
    long, short = load(tmp_path / "phi"), load(tmp_path / "phi", context=16)
    assert_close(long, phi)
    assert_close(short, phi, TOKENS[:, :16])
    assert long.config.rotary.scaling.length == 64
    imported = str(tmp_path / "imported")
    assert main(["import", str(tmp_path / "phi"), "--to", imported, "--context=16"]) == 0
    assert_same(load_model(imported), short)
    # the length is not part of a checkpoint
    for number, model in enumerate((long, short)):
        save(model, tmp_path / f"saved{number}", "phi3")
        assert_same(load(tmp_path / f"saved{number}"), long)


def test_a_context_that_changes_nothing_is_refused(tmp_path):
    make("llama").save_pretrained(tmp_path)
    for context, message in ((8, "requires a model with a rope_type of dynamic or longrope"),
                             (0, "must be an integer > 0"), ("8", "must be an integer > 0"),
                             (8.0, "must be an integer > 0")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^context={context!r}: {message}$"):
            load(tmp_path, context=context)
