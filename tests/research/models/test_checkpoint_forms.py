"""Other files and names: without a head, as a part of a composite model, pickled by PyTorch."""

import copy
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from layers.config import ConfigError
from research.models import FAMILIES, decoder_config, load, pickled, save
from tests.research.models.conftest import assert_same, described, logits_of, make

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BARE = ("gpt2", "bloom", "mpt", "qwen2", "gemma2", "gemma3", "mamba", "llama_biased_tied")


@pytest.mark.parametrize("name", BARE)
def test_a_model_without_its_head_is_read_if_they_are_tied(name, tmp_path):
    theirs = make(name)
    theirs.base_model.save_pretrained(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "whole")
    [architecture] = described(tmp_path / "base")["architectures"]
    assert architecture == type(theirs.base_model).__name__ != type(theirs).__name__
    # transformers writes names without the prefix
    prefix = FAMILIES[theirs.config.model_type].prefix
    names = load_file(tmp_path / "base" / "model.safetensors")
    assert not any(tensor.startswith(prefix) for tensor in names)
    assert_same(load(tmp_path / "base"), load(tmp_path / "whole"))


def test_every_bare_name_is_that_of_transformers():
    for family in FAMILIES.values():
        if family.model_type != "rwkv7":
            mapping = transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES
            assert mapping[family.model_type] in family.kinds[family.model_type]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "rwkv"])
def test_a_missing_head_that_is_not_tied_is_refused_by_name(name, tmp_path):
    theirs = make(name)
    theirs.base_model.save_pretrained(tmp_path)
    head = FAMILIES[theirs.config.model_type].head
    with pytest.raises(ConfigError, match=f"^tensor='{head}': is missing"):
        load(tmp_path)


@pytest.mark.parametrize("form", ["published", "as in memory", "without head"])
def test_the_text_part_of_a_gemma_3_with_images_is_read(form, tmp_path):
    text = make("gemma3")
    vision = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    config._attn_implementation = "eager"
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    (whole if form != "without head" else whole.model).save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(path)
    assert any(name.startswith("language_model.model.layers.0") for name in tensors)
    if form == "as in memory":
        tensors = {
            f"model.{name.replace('language_model.model.', 'language_model.')}": tensor
            for name, tensor in tensors.items()
        }
        assert tensors.keys() <= whole.state_dict().keys()
        save_file(tensors, path)
    text.save_pretrained(tmp_path / "text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("always", message=".* tensors of ")
        with pytest.warns(
            UserWarning, match=r"tensors of .*vision_tower\..*are not loaded"
        ) as seen:
            ours = load(tmp_path / "whole")
    assert len(seen) == 1
    want = load(tmp_path / "text")
    assert_same(ours, want)
    # it is written as the text model alone
    save(ours, tmp_path / "saved", "gemma3_text", source=tmp_path / "whole")
    written = described(tmp_path / "saved")
    assert "text_config" not in written and "vision_config" not in written
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    )
    np.testing.assert_array_equal(logits_of(again), logits_of(text))


def test_a_text_part_lacks_what_are_the_defaults_of_transformers():
    """As google/gemma-3-4b-it is published."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }  # fmt: skip
    file = {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": text, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = decoder_config(file)
    theirs = transformers.Gemma3TextConfig(**copy.deepcopy(text)).to_dict()
    assert config == decoder_config({**theirs, "max_position_embeddings": None})
    with pytest.raises(ConfigError, match="^text_config.model_type='llama': must be gemma3_text$"):
        decoder_config({**file, "text_config": {**text, "model_type": "llama"}})
    with pytest.raises(ConfigError, match="^text_config.num_hidden_layers: is missing$"):
        decoder_config({**file, "text_config": {}})
    with pytest.raises(ConfigError, match="text_config.num_hidden_layers='4': must be an integer"):
        decoder_config({**file, "text_config": {**text, "num_hidden_layers": "4"}})


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tied model, and its directory with safetensors."""
    theirs, directory = make("llama_biased_tied"), tmp_path_factory.mktemp("tied")
    theirs.save_pretrained(directory)
    return theirs, directory


@pytest.mark.parametrize("form", ["one", "shards", "legacy", "bfloat16"])
def test_files_of_pytorch_are_read(form, tied, tmp_path):
    theirs, directory = tied
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    # the embedding and the head share memory; a view does not begin where its memory does
    tensors = dict(theirs.state_dict())
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.stack((torch.zeros_like(tensors[name]), tensors[name]))[1]
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    if form == "bfloat16":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    if form == "shards":
        shards = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
        weight_map = {name: shards[i % 2] for i, name in enumerate(tensors)}
        for shard in shards:
            part = {name: tensors[name] for name, file in weight_map.items() if file == shard}
            torch.save(part, tmp_path / shard)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    else:
        legacy = {"_use_new_zipfile_serialization": False} if form == "legacy" else {}
        torch.save(tensors, tmp_path / "pytorch_model.bin", **legacy)
    want = load(directory)
    if form == "bfloat16":
        want = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(a.dtype), want)
    assert_same(load(tmp_path), want)


def test_safetensors_precede_files_of_pytorch_and_those_require_pytorch(
    tied, tmp_path, monkeypatch
):
    theirs, directory = tied
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(ConfigError, match="pytorch_model.bin': cannot be read"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    assert_same(load(tmp_path), load(directory))
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(pickled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pytorch_model.bin': requires PyTorch: pip install"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match="must hold model.safetensors or pytorch_model.bin$"):
        load(tmp_path)
