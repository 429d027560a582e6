"""Every field of transformers' configurations is read, refused or without effect.

The oracle is transformers: one field is changed at a time, and its model computes again with the
same weights.
"""

import dataclasses
import json
import warnings

import numpy as np
import pytest

from layers.config import TRAINING, ConfigError, decides
from research.models import FAMILIES, decoder_config, load
from research.models.families.unused import EVERYWHERE, SUPPORTED
from tests.research.models.conftest import CASES, TOKENS, make

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# one case of each family, with a sliding window where there is one
NAMES = (
    "llama", "mistral_window", "qwen2_window", "qwen3", "olmo2", "phi3", "gemma2", "gemma3",
    "mixtral_window", "deepseek", "mamba", "mamba2", "gpt2", "gpt_neox", "bloom", "mpt", "rwkv",
)  # fmt: skip
NESTED = ("rope_parameters", "full_attention", "sliding_attention", "attn_config")
SHORT = TOKENS[:1, :9]  # longer than the windows
# (family, field) → why only one side changes
EXPECTED = {
    ("*", "tie_word_embeddings"): "the weights of the head are equal to those of the embedding",
    ("*", "use_cache"): "theirs is called without a cache",
    ("mixtral_window", "rope_parameters.original_max_position_embeddings"): "the same channels",
    ("gpt_neox", "rope_parameters.rope_theta"): "two channels rotate, at base ** 0",
    **dict.fromkeys(
        (
            ("mpt", field)
            for field in (
                "no_bias",
                "logit_scale",
                "learned_pos_emb",
                "attn_config.alibi",
                "attn_config.alibi_bias_max",
                "attn_config.qk_ln",
            )
        ),
        "the authors' code applies it, and transformers does not",
    ),
}


def written(config):
    """config.json as transformers writes it, with all defaults."""
    return {**json.loads(config.to_json_string(use_diff=False)), "_name_or_path": "a"}


def parsed(config_class, hf):
    """transformers' configuration of a config.json, in which infinity is an object."""

    def hook(value):
        return float("inf") if "__float__" in value else value

    return config_class.from_dict(json.loads(json.dumps(hf), object_hook=hook))


def read(hf):
    """Our configuration without what only training has, and the fields of a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = decoder_config(hf)
    fields = dataclasses.asdict(config)
    unlimited = () if config.position == "learned" else ("max_length",)
    for name in (*decides(config, TRAINING), *unlimited):
        *parents, last = name.split(".")
        part = fields
        for parent in parents:
            part = part[parent]
        del part[last]
    return fields, " ".join(str(warning.message) for warning in caught)


def test_a_case_of_each_family():
    kinds = {getattr(transformers, f"{CASES[name][0]}Config").model_type for name in NAMES}
    assert kinds | {"rwkv7"} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_all_fields_of_transformers_are_known(name):
    kind, fields = CASES[name]
    config_class = getattr(transformers, f"{kind}Config")
    hf = written(config_class(**fields))
    names = {field.name for field in dataclasses.fields(config_class)}
    aliases = config_class.attribute_map  # written under the other name
    assert {aliases.get(field, field) for field in names} <= hf.keys()
    _, message = read(hf)
    assert not message
    for dropout in (n for n in names if n.endswith(("dropout", "pdrop")) and n not in EVERYWHERE):
        if dropout not in FAMILIES[hf["model_type"]].unused:
            assert f"{dropout}: not applied in training" in read({**hf, dropout: 0.25})[1]


def changes(hf):
    """(field, config.json with another value of it)."""
    for name, value in hf.items():
        others = ()
        if isinstance(value, bool):
            others = (not value,)
        elif isinstance(value, int):
            others = (value + 1, 2 * value, max(value // 2, 1))
        elif isinstance(value, float):
            others = (value * 1.5 + 0.1,)
        elif value is None:
            others = (True, 2, 0.3)
        elif isinstance(value, dict) and name in NESTED:
            yield from ((f"{name}.{inner}", {**hf, name: other}) for inner, other in changes(value))
        for other in others:
            if other != value or type(other) is not type(value):
                yield name, {**hf, name: other}


def output(config, weights):
    """The logits of transformers; None: it refuses the configuration, 0: or these weights."""
    try:
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    except Exception:
        return None
    try:
        model.load_state_dict(weights)
        with torch.no_grad():
            return model(torch.tensor(SHORT), use_cache=False).logits
    except (RuntimeError, IndexError, TypeError, ValueError):
        return 0


def effects(theirs, name):
    """(field, config.json, their logits with it, whether our configuration changes)."""
    weights, config_class = theirs.state_dict(), type(theirs.config)
    hf = {**written(theirs.config), "architectures": [type(theirs).__name__]}
    ours = read(hf)[0]
    yield "none", hf, output(parsed(config_class, hf), weights), False
    for field, changed in changes(hf):
        if EXPECTED.keys() & {("*", field), (name, field)} or field in SUPPORTED:
            continue
        if field in EVERYWHERE and name != "llama":
            continue  # of all families; they are changed for one
        try:
            after = output(parsed(config_class, changed), weights)
        except Exception:
            continue  # transformers refuses it
        try:
            follows = read(changed)[0] != ours
        except ConfigError:
            continue
        if after is not None:
            yield field, changed, after, follows


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_field_has_the_effect_that_it_has_in_transformers(name):
    (_, _, before, _), *all_effects = effects(make(name), name)
    for field, changed, after, follows in all_effects:
        differs = isinstance(after, int) or not torch.allclose(before, after, 1e-4, 1e-4)
        assert differs == follows, f"{field}={changed.get(field)}"
    assert sum(follows for _, _, _, follows in all_effects) > 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:config.json")
@pytest.mark.parametrize("name", NAMES)
def test_with_a_changed_field_the_logits_are_those_of_transformers(name, tmp_path):
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    (_, _, before, _), *all_effects = effects(theirs, name)
    compared = 0
    for field, changed, after, follows in all_effects:
        if not follows or isinstance(after, int):
            continue  # nothing changes, or the weights do not fit
        (tmp_path / "config.json").write_text(json.dumps(changed))
        got = load(tmp_path)(SHORT).logits_btv
        np.testing.assert_allclose(got, after, atol=2e-5, rtol=2e-5, err_msg=field)
        compared += 1
    assert compared or name == "rwkv"  # whose fields are sizes
