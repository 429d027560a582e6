"""Latent attention against transformers' DeepSeek-V3, and what its cache holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.config import ConfigError
from layers.context import Context
from layers.decoder import DecoderConfig
from layers.latent_attention import LatentAttention, LatentConfig
from layers.mlp import MlpConfig
from layers.rotary import RotaryConfig
from layers.state import CacheConfig
from layers.weights import flat

B, T, D = 2, 7, 12
HEADS, RANK, OWN, TURNED, VALUE, QUERY = 3, 5, 4, 6, 8, 9
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))


def sizes(**options):
    return LatentConfig(HEADS, RANK, OWN, TURNED, VALUE, **options)


def make(config, interleaved=True):
    rotary = RotaryConfig(interleaved=interleaved)
    return LatentAttention(config, D, rngs=nnx.Rngs(0), rotary_config=rotary)


def as_ours(held):
    """Their tensors (or gradients), by name, in our layout and by our paths."""

    def heads(name, *channels):
        weight = held[name + ".weight"].reshape(HEADS, sum(channels), -1)
        parts = np.split(weight, np.cumsum(channels)[:-1], axis=1)
        return [np.moveaxis(part, 2, 0) for part in parts]

    found = {"out/weight": held["o_proj.weight"].T.reshape(HEADS, VALUE, D)}
    found["key/weight"], found["value/weight"] = heads("kv_b_proj", OWN, VALUE)
    for suffix in ("weight", "bias"):
        if (down := held.get(f"kv_a_proj_with_mqa.{suffix}")) is not None:
            found[f"latent_down/{suffix}"], found[f"rotary_key/{suffix}"] = (
                down[:RANK].T, down[RANK:].T,
            )  # fmt: skip
    found["latent_norm/scale"] = held["kv_a_layernorm.weight"]
    if "q_proj.weight" in held:
        [found["query/weight"]] = heads("q_proj", OWN + TURNED)
    else:
        [found["query_up/weight"]] = heads("q_b_proj", OWN + TURNED)
        found["query_down/weight"] = held["q_a_proj.weight"].T
        found["query_norm/scale"] = held["q_a_layernorm.weight"]
        found["query_down/bias"] = held["q_a_proj.bias"]
    if "o_proj.bias" in held:
        found["out/bias"] = held["o_proj.bias"]
    return found


@pytest.mark.parametrize("query_rank, interleaved", [(None, False), (QUERY, True)])
def test_values_and_gradients_of_transformers(query_rank, interleaved):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    torch.manual_seed(0)
    bias = query_rank is not None
    config = transformers.DeepseekV3Config(
        hidden_size=D, num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=RANK,
        q_lora_rank=query_rank, qk_nope_head_dim=OWN, qk_rope_head_dim=TURNED, v_head_dim=VALUE,
        attention_bias=bias, rope_interleave=interleaved,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = deepseek.DeepseekV3Attention(config, 0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    x = torch.tensor(X, requires_grad=True)
    turns = deepseek.DeepseekV3RotaryEmbedding(config)(x, torch.tensor(POSITIONS))
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    want, _ = theirs(x, turns, mask)
    torch.sin(want).sum().backward()
    named = dict(theirs.named_parameters())
    weights = as_ours({name: p.detach().numpy() for name, p in named.items()})
    ours = make(sizes(query_rank=query_rank, bias=bias), interleaved)
    assert weights.keys() == flat(ours).keys()
    leaves = [jnp.array(weights[path]) for path in flat(ours)]
    ours = jax.tree.unflatten(jax.tree.structure(ours), leaves)

    def loss(mixer, x, state):
        y, _ = mixer(x, Context.of_tokens(POSITIONS, state=state))
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    wanted = as_ours({name: p.grad.numpy() for name, p in named.items()})
    # as in training, and absorbed, through the cache
    for state in (None, ours.init_state(B, T)):
        (_, y), (gradients, dx) = run(ours, X, state)
        np.testing.assert_allclose(y, want.detach(), atol=1e-5)
        np.testing.assert_allclose(dx, x.grad, atol=2e-5)
        for path, gradient in flat(gradients).items():
            atol = 1e-5 * max(1, np.abs(wanted[path]).max())
            np.testing.assert_allclose(gradient, wanted[path], atol=atol, err_msg=path)


def test_a_token_is_kept_as_its_latent_and_its_turned_key():
    state = make(sizes()).init_state(B, 16)
    assert state.values is None and state.keys.codes.nbytes == B * 16 * (RANK + TURNED) * 4
    half = make(sizes()).init_state(B, 16, CacheConfig(dtype="bfloat16"))
    assert half.values is None and half.keys.codes.nbytes == B * 16 * (RANK + TURNED) * 2
    # as many heads as there may be, it is the same
    many = make(LatentConfig(48, RANK, OWN, TURNED, VALUE)).init_state(B, 16)
    assert many.keys.codes.nbytes == state.keys.codes.nbytes


def test_what_is_kept_of_a_token_is_what_the_paper_says():
    """Eq. 9 and 15: the normalised latent, and the key that is rotated to its position."""
    mixer = make(sizes())

    @jax.jit
    def state_after(m):
        return m(X, Context.of_tokens(POSITIONS, state=m.init_state(B, T)))[1].state

    state = state_after(mixer)
    latent = X.astype(np.float64) @ np.asarray(mixer.latent_down.weight[...], np.float64)
    latent /= np.sqrt(np.mean(np.square(latent), -1, keepdims=True) + 1e-6)
    pairs = (X @ np.asarray(mixer.rotary_key.weight[...])).reshape(B, T, -1, 2)
    theta = 10_000.0 ** (-2 * np.arange(TURNED // 2) / TURNED)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * POSITIONS[..., None] * theta)
    turned = np.stack((turned.real, turned.imag), -1).reshape(B, T, TURNED)
    kept = np.asarray(state.keys.codes)[:, 0]
    np.testing.assert_allclose(kept, np.concatenate((latent, turned), -1), atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rank=0), "rank=0: must be > 0"),
        (dict(rotary_dim=3), "rotary_dim=3: must be even and > 0"),
        (dict(query_rank=0), "query_rank=0: must be > 0 or None"),
        (dict(scale=-1.0), "scale=-1.0: must be > 0 or None"),
        (dict(norm_eps=0.0), "norm_eps=0.0: must be > 0 or None"),
        (dict(implementation="flash"), "implementation='flash': must be one of"),
    ],
)
def test_a_bad_configuration_names_its_field(changes, message):
    options = dict(num_heads=HEADS, rank=RANK, head_dim=OWN, rotary_dim=TURNED, value_dim=VALUE)
    with pytest.raises(ConfigError, match=f"^{message}"):
        LatentConfig(**{**options, **changes})


def test_positions_enter_by_rotation_alone():
    options = dict(mlp=MlpConfig(4), latent=sizes(), pattern=("latent",))
    with pytest.raises(ConfigError, match="^position='alibi': must be 'rotary'"):
        DecoderConfig(11, D, 1, position="alibi", **options)
    with pytest.raises(ConfigError, match=f"fraction=0.5: .* not 3 of head_dim={TURNED}"):
        LatentAttention(sizes(), D, rngs=nnx.Rngs(0), rotary_config=RotaryConfig(fraction=0.5))
