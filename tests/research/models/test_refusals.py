"""What cannot be read or written is refused in one line that names it."""

import dataclasses
import errno
import json
import resource
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from layers.config import ConfigError
from research.models import decoder_config, load, save
from tests.research.models.conftest import make

pytest.importorskip("torch")
pytest.importorskip("transformers")


def _broken(tmp_path, change):
    directory = tmp_path / "broken"
    make("llama").save_pretrained(directory)
    change(directory)
    return directory


def _edit(name, value):
    def change(directory):
        path = directory / "config.json"
        hf = json.loads(path.read_text())
        hf[name] = value
        path.write_text(json.dumps(hf))

    return change


def _tensors(f):
    def change(directory):
        path = directory / "model.safetensors"
        tensors = load_file(path)
        f(tensors)
        save_file(tensors, path)

    return change


def _index(content):
    """Replaces the one file by two, with an index that ``content(weight_map)`` gives."""

    def change(directory):
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        names = sorted(tensors)
        weight_map = {}
        for number, part in enumerate((names[:9], names[9:]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, directory / file)
            weight_map |= dict.fromkeys(part, file)
        write_index(directory, content(weight_map))

    return change


def write_index(directory, content):
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
DEEP = "[" * 200_000 + "]" * 200_000
FIRST = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    "change, message",
    [
        (_edit("architectures", ["BambaForCausalLM"]), "architecture='BambaForCausalLM': must be"),
        (_edit("hidden_act", "gelu"), "hidden_act='gelu': must be silu"),
        (
            _edit("rope_parameters", {"rope_type": "ntk", "rope_theta": 1e4}),
            "rope_type='ntk': must be one of default, linear, dynamic, llama3, yarn, longrope, su",
        ),
        (_tensors(lambda t: t.pop(NORM)), f"tensor='{NORM}': is missing"),
        (
            _tensors(lambda t: t.update({NORM: np.ones(31, np.float32)})),
            rf"tensor {NORM}=\[31\]: must have shape \[16\]",
        ),
        (
            _tensors(lambda t: t.update(extra=np.ones(1, np.float32))),
            "tensor='model.extra': is not part of a LlamaForCausalLM",
        ),
        (lambda d: (d / "config.json").unlink(), "must hold config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "must hold model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"1234"), "cannot be read"),
        (lambda d: (d / "config.json").write_text("[1, 2]"), "must be an object, not"),
        (lambda d: (d / "config.json").write_text(DEEP), "nested too deep"),
        (lambda d: (d / "config.json").write_bytes(b"\xff"), "not JSON"),
        (_edit("architectures", "LlamaForCausalLM"), "architectures=.*: must be a list of texts"),
        (_edit("architectures", ["LlamaForCausalLM"] * 2), "architectures=.*: must name one"),
        (_edit("model_type", "mistral"), "model_type='mistral': must be llama for architectures"),
        (_edit("model_type", 3), "model_type=3: must be a text"),
        (_edit("vocab_size", "2000"), "vocab_size='2000': must be an integer"),
        (_edit("hidden_size", 64.5), "hidden_size=64.5: must be an integer"),
        (_edit("hidden_size", None), "hidden_size=None: must not be null"),
        (_edit("num_attention_heads", 0), "num_attention_heads=0: must be ≥ 1"),
        (_edit("num_key_value_heads", -2), "num_key_value_heads=-2: must be ≥ 1"),
        (_edit("num_hidden_layers", True), "num_hidden_layers=True: must be an integer"),
        (_edit("num_hidden_layers", 10**9), "num_hidden_layers=1000000000: must be ≤ 10000"),
        (_edit("num_hidden_layers", 5000), "num_layers=5000: must be their number in the"),
        (_edit("intermediate_size", 2**31 - 1), "mlp.width=2147483647: exceeds the 992 of the"),
        (_edit("head_dim", 2**30), "attention.head_dim=1073741824: exceeds the 992 of the"),
        (_edit("rms_norm_eps", float("nan")), "rms_norm_eps=nan: must be finite"),
        (_edit("tie_word_embeddings", 1), "tie_word_embeddings=1: must be true or false"),
        (_edit("rope_parameters", [1, 2]), r"rope_parameters=\[1, 2\]: must be an object"),
        (_edit("rope_parameters", {"rope_theta": float("inf")}), "rope_theta=inf: must be finite"),
        (_edit("partial_rotary_factor", 0.5), "partial_rotary_factor=0.5: must be 1.0"),
        (_edit("quantization_config", {"bits": 4}), "quantization_config.quant_method: is missing"),
        (_edit("vocab_size", 63), rf"tensor {EMBEDDING}=\[62, 16\]: must have shape \[63, 16\]"),
        (
            _tensors(lambda t: t.update({k: t[k].astype("int8") for k in t if "q_proj" in k})),
            r"q_proj.weight='I8': must be F64, F32, F16, BF16; of quantised",
        ),
        (
            _tensors(lambda t: t.update({NORM: t[NORM].astype(ml_dtypes.float8_e4m3fn)})),
            rf"tensor {NORM}='F8_E4M3': must be F64",
        ),
        (
            lambda d: write_index(d, {"weight_map": {NORM: FIRST}}),
            "has model.safetensors and model.safetensors.index.json, of other files: remove one",
        ),
        (_index(lambda m: [1]), "index.json': the file=.*: must be an object"),
        (_index(lambda m: {}), "index.json': weight_map=.*: must name the file"),
        (_index(lambda m: {"weight_map": 3}), "index.json': weight_map=3: must be an object"),
        (_index(lambda m: {"weight_map": {NORM: 3}}), rf"weight_map.{NORM}=3: must be a text"),
        (_index(lambda m: {"weight_map": {NORM: "../a"}}), "'../a': must be the name of a file"),
        (_index(lambda m: {"weight_map": {NORM: "/etc/passwd"}}), "must be the name of a file"),
        (_index(lambda m: {"weight_map": {NORM: "b" * 300}}), "in the index but does not exist"),
        (_index(lambda m: {"weight_map": {**m, NORM: FIRST}}), f"'{NORM}': is not in {FIRST}"),
        (_index(lambda m: {"weight_map": {**m, "z": FIRST}}), f"tensor='z': is not in {FIRST}"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load(_broken(tmp_path, change))
    assert "\n" not in str(raised.value)


def test_a_missing_directory_field_or_shard_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere'.*does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="hidden_size: is missing"):
        decoder_config({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2})
    make("llama").save_pretrained(tmp_path, max_shard_size="5KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ConfigError, match="model-00002.*is in the index but does not exist"):
        load(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    make("llama").save_pretrained(tmp_path)
    _index(lambda weight_map: {"weight_map": weight_map})(tmp_path)
    load(tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    with pytest.raises(
        ConfigError, match=f"tensor='{name}': is in {first.name} and in {second.name}"
    ):
        load(tmp_path)


def test_a_tied_head_must_be_the_embedding(tmp_path):
    make("llama_biased_tied").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors[EMBEDDING]}, path)
    load(tmp_path)
    other = tensors[EMBEDDING].copy()
    other[-1, -1] += 1
    for head, message in (
        (other, f"'lm_head.weight': differs from {EMBEDDING}, to which tie_word_embeddings"),
        (other[1:], r"tensor lm_head.weight=\[61, 16\]: must have shape \[62, 16\]"),
    ):
        save_file({**tensors, "lm_head.weight": np.ascontiguousarray(head)}, path)
        with pytest.raises(ConfigError, match=message):
            load(tmp_path)


def test_a_field_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match="^param_dtyp='bfloat16': no such field; did you mean"):
        load(tmp_path, param_dtyp="bfloat16")


def test_a_mesh_that_does_not_divide_the_model_is_named(tmp_path, run_script):
    make("llama").save_pretrained(tmp_path)
    run_script(f"""
import pytest
from layers.config import ConfigError
from research.models import load
from research.parallel import MeshConfig, make_mesh
for sizes, message in (
    (dict(tensor=4, data=2), "attention.num_kv_heads=2: must be a multiple of mesh.tensor=4"),
    (dict(stage=8), "num_layers=2: "),
):
    with pytest.raises(ConfigError, match=message) as raised:
        load({str(tmp_path)!r}, mesh=make_mesh(MeshConfig(**{{"data": 1, **sizes}})))
""")


def test_a_disk_that_is_full_is_an_error_that_names_the_file(held, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limit[1]))
    try:
        with pytest.raises(OSError, match="model.safetensors") as raised:
            save(held["llama"], tmp_path / "a", "llama")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert raised.value.errno == errno.EFBIG and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_layers_after_the_last_are_left_out_and_unknown_tensors_are_not(tmp_path):
    make("deepseek").save_pretrained(tmp_path)
    path, nothing = tmp_path / "model.safetensors", np.ones(1, np.float32)
    tensors = load_file(path)
    save_file({**tensors, "model.layers.2.eh_proj.weight": nothing}, path)
    load(tmp_path)
    for name in ("model.layers.1.mlp.gate_proj.weight", "model.layers.0.mlp.experts.0.up_proj.x"):
        save_file({**tensors, name: nothing}, path)
        with pytest.raises(ConfigError, match=f"tensor='{name}': is not part of a Deepseek"):
            load(tmp_path)
    expert = "model.layers.1.mlp.experts.7.down_proj.weight"
    del tensors[expert]
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=f"tensor='{expert}': is missing"):
        load(tmp_path)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A model of each of a few families."""
    found = {}
    for name in ("llama", "qwen3", "gpt2", "gpt_neox", "rwkv", "mixtral", "deepseek", "mamba"):
        directory = tmp_path_factory.mktemp(name)
        make(name).save_pretrained(directory)
        found[name] = load(directory)
    return found


@pytest.mark.parametrize(
    "name, family, message",
    [
        ("llama", "gpt2", "mlp.activation='swiglu': must be one of"),
        ("gpt2", "llama", "mlp.activation='gelu_tanh': a LlamaForCausalLM would have 'swiglu'"),
        ("qwen3", "llama", "attention.qk_norm=True: a LlamaForCausalLM would have False"),
        ("llama", "gemma2", "mlp.activation='swiglu': a Gemma2ForCausalLM would have 'geglu_tanh'"),
        ("gpt_neox", "bloom", "mlp.width=24: a BloomForCausalLM would have 128"),
        ("rwkv", "llama", "attention=None: this model has none"),
        ("gpt2", "rwkv", "rwkv=None: this model has none"),
        ("llama", "mixtral", "moe=None: this model has none"),
        ("mixtral", "llama", "mlp=None: this model has none"),
        ("deepseek", "mixtral", "attention=None: this model has none"),
        ("mixtral", "deepseek_v3", "latent=None: this model has none"),
        ("mamba", "rwkv", "rwkv=None|mlp=None: this model has none"),
    ],
)
def test_what_a_family_cannot_hold_is_not_written(held, name, family, message, tmp_path):
    refused(held[name], family, message, tmp_path)


@pytest.mark.parametrize(
    "name, family, part, changes, message",
    [
        ("mixtral", "mixtral", "moe", dict(router="softmax"),
         "moe.router='softmax': a MixtralForCausalLM would have 'choice_softmax'"),
        ("mixtral", "mixtral", "moe", dict(capacity_factor=2.0), "moe.capacity_factor=2.0"),
        ("mixtral", "mixtral", "moe", dict(shared_experts=1), "moe.shared_experts=1"),
        ("deepseek", "deepseek_v3", "latent", dict(scale=0.5), "latent.scale=0.5"),
        ("deepseek", "deepseek_v3", "latent", dict(norm_eps=1e-5), "latent.norm_eps=1e-05"),
        ("deepseek", "deepseek_v3", None,
         dict(feed_forward=("moe", "mlp"), pattern=("latent",) * 2), "feed_forward="),
        ("mamba", "mamba", "mamba", dict(selective=("b",)), r"mamba.selective=\('b',\)"),
    ],
)  # fmt: skip
def test_what_a_family_says_nothing_of_is_not_written(
    held, name, family, part, changes, message, tmp_path
):
    def changed(config):
        if part is None:
            return dataclasses.replace(config, **changes)
        whole = dataclasses.replace(getattr(config, part), **changes)
        return dataclasses.replace(config, **{part: whole})

    # the parameters are not looked at before the configuration is
    refused(types.SimpleNamespace(config=changed(held[name].config)), family, message, tmp_path)


def refused(model, family, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as raised:
        save(model, tmp_path / "a", family)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "a").exists()


def test_a_model_on_devices_of_other_processes_is_not_written(held, tmp_path, monkeypatch):
    elsewhere = {"final_norm/scale": types.SimpleNamespace(is_fully_addressable=False)}
    monkeypatch.setattr(sys.modules["research.models.save"], "flat", lambda tree: elsewhere)
    message = "parameter='final_norm/scale': must be on the devices of this process"
    refused(held["llama"], "llama", message, tmp_path)


def test_what_is_there_is_not_overwritten_and_a_family_is_named(held, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="must be absent or empty"):
        save(held["llama"], tmp_path, "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(ConfigError, match="family='lama'.*did you mean 'llama'"):
        save(held["llama"], tmp_path / "c", "lama")
