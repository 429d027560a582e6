"""Every family's weights in and out of Hugging Face directories, against transformers."""

import warnings

import jax
import numpy as np
import pytest

from layers.mlp import ACTIVATIONS
from research.inference import SamplingConfig, generate
from research.models import FAMILIES, decoder_config, load, save
from tests.research.models.conftest import (
    CASES,
    GPT2,
    TOKENS,
    described,
    logits,
    logits_of,
    make,
    transformers_model,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    theirs = make(request.param)
    theirs.save_pretrained(directory, max_shard_size="5KB" if "tied" in request.param else "1GB")
    with warnings.catch_warnings():
        # each field that transformers writes is read, or known to change nothing
        warnings.simplefilter("error", UserWarning)
        return theirs, load(directory), directory


def test_every_family_is_here():
    kinds = {getattr(transformers, f"{kind}Config").model_type for kind, _ in CASES.values()}
    # of RWKV-7 transformers has nothing: see test_rwkv7.py
    assert kinds | {"rwkv7"} == set(FAMILIES)


def test_logits_are_those_of_transformers(pair):
    theirs, ours, _ = pair
    np.testing.assert_allclose(logits(ours, TOKENS), logits_of(theirs), atol=1e-5, rtol=1e-5)


def test_greedy_tokens_are_those_of_transformers(pair):
    theirs, ours, _ = pair
    prompt = TOKENS[:1, :9]
    with torch.no_grad():
        want = theirs.generate(
            torch.tensor(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None,
            pad_token_id=0, use_cache=theirs.config.use_cache,
        )[0, 9:].tolist()  # fmt: skip
    got = generate(ours, prompt.tolist(), SamplingConfig(max_new_tokens=12, temperature=0.0))
    assert got[0] == want


def test_written_back_it_is_the_same_to_the_bit(pair, tmp_path):
    theirs, ours, directory = pair
    out = tmp_path / "out"
    save(ours, out, described(directory)["model_type"], shard_bytes=3_000)
    assert decoder_config(described(out)) == ours.config
    again = type(theirs).from_pretrained(out, attn_implementation="eager")
    again.config.use_cache = theirs.config.use_cache
    # first: an RWKV's weights are changed in place in its first call
    np.testing.assert_array_equal(logits_of(again), logits_of(theirs))
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_rotary_fields_are_read_in_their_older_spelling(pair):
    hf = described(pair[2])
    if "rope_parameters" not in hf:
        pytest.skip("no rotary positions")
    rope = hf["rope_parameters"]
    old = {k: v for k, v in hf.items() if k != "rope_parameters"}
    if "sliding_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    old["rope_theta"] = rope["rope_theta"]
    old["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0)
    if hf["model_type"] == "gpt_neox":
        old["rotary_pct"] = old["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        old["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    assert decoder_config(old) == pair[1].config


def test_the_balance_loss_is_that_of_transformers(tmp_path):
    """Of one layer: transformers multiplies the means of all layers, and we sum their losses."""
    kind, fields = CASES["mixtral_window"]
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **{**fields, "num_hidden_layers": 1}, router_aux_loss_coef=0.3, router_jitter_noise=0.1
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "in")
    ours = load(tmp_path / "in")
    with torch.no_grad():
        want = 0.3 * theirs(torch.tensor(TOKENS), output_router_logits=True).aux_loss.item()
    got = jax.jit(lambda model, tokens: model(tokens).aux.loss)(ours, TOKENS)
    np.testing.assert_allclose(got, [want], rtol=1e-5)
    assert ours.config.moe.jitter == 0.1
    save(ours, tmp_path / "out", "mixtral")
    hf = described(tmp_path / "out")
    assert hf["router_aux_loss_coef"] == 0.3 and hf["router_jitter_noise"] == 0.1
    with pytest.warns(UserWarning, match="seq_aux: not applied in training"):
        deepseek = {**CASES["deepseek"][1], "aux_loss_alpha": 0.2, "seq_aux": True}
        assert decoder_config({"model_type": "deepseek_v3", **deepseek}).moe.balance_weight == 0.2


def test_the_layers_that_slide_are_those_of_transformers():
    """Named one by one or by a rule; older files have the rule alone."""
    for name, rule in (
        ("qwen2_window", dict(use_sliding_window=True, sliding_window=6, max_window_layers=3)),
        ("gemma2", {}),
        ("gemma3", dict(sliding_window_pattern=3)),
    ):
        kind, fields = CASES[name]
        fields = {k: v for k, v in fields.items() if k != "layer_types"}
        fields = {**fields, "num_hidden_layers": 6, **rule}
        theirs = getattr(transformers, f"{kind}Config")(**fields)
        want = ["sliding" if kind == "sliding_attention" else "attention"
                for kind in theirs.layer_types]  # fmt: skip
        architecture = FAMILIES[theirs.model_type].architecture
        config = decoder_config({"architectures": [architecture], **fields})
        assert list(config.pattern * config.repeats) == want


def test_an_absent_window_is_what_transformers_takes_it_for():
    theirs = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    sizes |= dict(vocab_size=64, intermediate_size=48, num_key_value_heads=2)
    default = transformers.MistralConfig(**sizes).sliding_window
    assert decoder_config({**theirs, **sizes}).attention.window == default
    full = decoder_config({**theirs, **sizes, "sliding_window": None})
    assert full.attention.window is None and full.pattern == ("attention",)


@pytest.mark.parametrize(
    "name",
    [
        "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu",
        "relu",
    ],
)  # fmt: skip
def test_activations_of_gpt2_are_those_of_transformers(name):
    fields = dict(GPT2, architectures=["GPT2LMHeadModel"], activation_function=name)
    config = decoder_config({**fields, "reorder_and_upcast_attn": True})
    assert config == decoder_config(fields)
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    activation, _ = ACTIVATIONS[config.mlp.activation]
    want = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(activation(x), want, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_gemma_whose_layers_are_all_full_runs_in_transformers(name, tmp_path):
    kind, fields = CASES[name]
    full = ["full_attention"] * fields["num_hidden_layers"]
    theirs = transformers_model(kind, **dict(fields, layer_types=full))
    theirs.save_pretrained(tmp_path / "in")
    ours = load(tmp_path / "in")
    assert ours.config.pattern == ("attention",)
    save(ours, tmp_path / "out", theirs.config.model_type)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    np.testing.assert_array_equal(logits_of(again), logits_of(theirs))
