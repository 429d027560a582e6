"""Pages: their tables, sharing, refusals, and what hooks and prefixes see of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.hooks import Hooks
from layers.latent_attention import LatentConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.state import CacheConfig, copy_page, with_table

T, V = 8, 11
CONFIG = DecoderConfig(
    V, 16, 2, attention=AttentionConfig(4, 2), mlp=MlpConfig(24), scan=False, init_std=1.0
)
PAGED = CacheConfig("paged", page=2)
TOKENS = jax.random.randint(jax.random.key(1), (2, T), 0, V)
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))


@jax.jit
def read(tokens, positions, state, until=None, hooks=None):
    return MODEL(tokens, positions, state=state, until_bt=until, hooks=hooks)


def at(start, count):
    return jnp.broadcast_to(jnp.arange(start, start + count), (2, count))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="page"), "kind='page': must be "),
        (dict(dtype="int3"), "dtype='int3': must be one of"),
        (dict(kind="paged", page=0), "page=0: must be > 0"),
        (dict(kind="paged", page=True), "page=True: must be of type int, not bool"),
        (dict(kind="paged", pages=0), "pages=0: must be > 0 or None"),
        (dict(page=8), "page=8: changes nothing: requires kind='paged'"),
        (dict(pages=8), "pages=8: changes nothing: requires kind='paged'"),
    ],
)
def test_a_configuration_is_refused_by_its_field(fields, message):
    with pytest.raises(ConfigError) as error:
        CacheConfig(**fields)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "cache", "message"),
    [
        (dict(pattern=("mamba",), mamba=MambaConfig()), PAGED,
         "cache.kind='paged': changes nothing: no layer of pattern=('mamba',) stores keys"),
        (dict(pattern=("mamba",), mamba=MambaConfig()), CacheConfig(dtype="int8"),
         "cache.dtype='int8': changes nothing: no layer of pattern=('mamba',) stores keys"),
        (dict(attention=AttentionConfig(4, 2, head_dim=3)), CacheConfig(dtype="int4"),
         "cache.dtype='int4': requires even channels, not 3"),
        (dict(pattern=("latent",), latent=LatentConfig(2, 5, 4, 2, 4)),
         dataclasses.replace(PAGED, dtype="int4"),
         "cache.dtype='int4': requires even channels, not 7"),
    ],
)  # fmt: skip
def test_a_model_refuses_a_cache_that_it_does_not_support(changes, cache, message):
    config = dataclasses.replace(
        CONFIG, **changes, position="rotary" if "latent" in changes else "none"
    )
    model = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError) as error:
        jax.eval_shape(lambda m: m.init_state(1, T, cache), model)
    assert str(error.value) == message


def test_a_row_has_pages_if_there_are_enough():
    tables = [
        MODEL.init_state(2, 5, dataclasses.replace(PAGED, pages=pages))[0].mixer.table_bn.tolist()
        for pages in (None, 9, 5)
    ]
    assert tables == [[[0, 1, 2], [3, 4, 5]]] * 2 + [[[-1] * 3] * 2]


def test_tables_and_lengths_that_do_not_fit_are_refused():
    state = MODEL.init_state(2, T, PAGED)
    with pytest.raises(ConfigError, match=r"^table.shape=\(2, 3\): must be \(2, 4\)$"):
        with_table(state, jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ConfigError, match=r"^state=\['KVCache'\]: has no pages: requires a cache"):
        with_table(MODEL.init_state(2, T), jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(ConfigError, match="^tokens=8: must be at most max_length=4 of the cache"):
        read(TOKENS, at(0, T), MODEL.init_state(2, 3, PAGED))


def test_rows_share_a_page_and_write_to_a_copy_of_it():
    """Both rows continue the first row's three tokens, whose second page is half full."""
    state = MODEL.init_state(2, T, dataclasses.replace(PAGED, pages=8))
    state = with_table(state, jnp.array([[5, 2, -1, -1], [-1] * 4]))
    positions = jnp.array([[0, 1, 2], [-1] * 3])
    state = read(jnp.tile(TOKENS[:1, :3], (2, 1)), positions, state).state
    state = copy_page(state, 2, 7)
    state = with_table(state, jnp.array([[5, 2, 0, 1], [5, 7, 4, 6]]))
    counted = [
        layer._replace(mixer=dataclasses.replace(layer.mixer, written_b=jnp.array([3, 3])))
        for layer in state
    ]
    tokens = jnp.concatenate((jnp.tile(TOKENS[:1, :3], (2, 1)), TOKENS[:, 3:]), axis=1)
    want = MODEL(tokens).logits_btv[:, 3:]
    got = read(tokens[:, 3:], at(3, T - 3), tuple(counted)).logits_btv
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_hooks_and_prefixes_see_pages_as_they_see_slots():
    captures = Hooks(("attention.weights",))
    until = jnp.where(at(0, 4) < 3, 2, -1)
    results = []
    for cache in (PAGED, CacheConfig()):
        state = MODEL.init_state(2, T, cache)
        first = read(TOKENS[:, :4], at(0, 4), state, until)
        second = read(TOKENS[:, 4:6], at(4, 2), first.state, None, captures)
        unobserved = read(TOKENS[:, 4:6], at(4, 2), first.state)
        np.testing.assert_allclose(second.logits_btv, unobserved.logits_btv, atol=1e-5)
        results.append((first.logits_btv, second.logits_btv, second.taps["attention.weights"]))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.all(results[0][2].sum(-1) > 0.99)
