"""RWKV-7's time-mix: a matrix a head that unlearns as it learns (Peng 2025, arXiv:2503.14456)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.config import check
from layers.hooks import Tap
from layers.linear import Linear, fan_in_normal
from layers.recurrent import Tail, Tokens, after, before, carried
from layers.rwkv import Place, RwkvConfig, ramp, vector
from layers.sharding import island, place
from layers.weights import read
from pallas_kernels.wkv import wkv7

HEADS = ("batch", None, "heads", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rwkv7State:
    """``tail`` of one token; the matrix of `wkv7`, values by keys, float32."""

    tail: Tail
    matrix_bhcc: jax.Array


class LowRank(nnx.Module):
    """``inner(x A) B + bias``, as heads of channels: what follows the token cheaply in RWKV-7."""

    def __init__(
        self, width: int, rank: int, heads: int, *, rngs, inner, bias=None, dtype, param_dtype
    ):
        dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.inner = inner

        def orthogonal(key, shape, dtype):
            flat = jax.nn.initializers.orthogonal(0.1)(key, (rank, width), jnp.float32)
            return flat.reshape(shape).astype(dtype)

        self.down = Linear(
            "btd,dr->btr",
            (width, rank),
            ("embed", None),
            ("batch", None, None),
            rngs=rngs,
            init=lambda key, shape, dtype: jnp.zeros(shape, dtype),
            **dtypes,
        )
        self.up = Linear(
            "btr,rhc->bthc",
            (rank, heads, width // heads),
            (None, "heads", "head_dim"),
            HEADS,
            rngs=rngs,
            init=orthogonal,
            bias=bias is not None,
            out_dtype=jnp.float32,
            **dtypes,
        )
        if bias is not None and self.up.bias is not None:
            self.up.bias[...] = bias.reshape(heads, -1).astype(param_dtype)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        return self.up(self.inner(self.down(x_btd)))


def _identity(x):
    return x


class Rwkv7(nnx.Module):
    """RWKV-7's time-mix (2503.14456, §4).

    Layers above the first mix their values with the first layer's (value residual): the call takes
    those and the layer's index, and returns them for the next.
    """

    def __init__(
        self,
        config: RwkvConfig,
        width: int,
        *,
        rngs: nnx.Rngs,
        at: Place = Place(),  # noqa: B008
        out_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        c = config.head_dim
        check(width % c == 0, "rwkv.head_dim", c, f"must divide width={width}")
        self.heads, self.head_dim, h = width // c, c, width // c
        self.width, self.dtype, self.implementation = width, dtype, config.implementation
        dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        powers = dict(receptance=0.2, decay=0.9, key=0.7, value=0.7, rate=0.9, gate=0.2)
        self.mixes = nnx.Dict(
            {
                name: vector(1 - ramp(width) ** (power * at.rest), "norm", param_dtype)
                for name, power in powers.items()
            }
        )

        def heads_in():
            return Linear(
                "btd,dhc->bthc", (width, h, c), ("embed", "heads", "head_dim"), HEADS,
                rngs=rngs, **dtypes,
            )  # fmt: skip

        self.receptance, self.key, self.value = heads_in(), heads_in(), heads_in()

        def low_rank(rank, inner, bias=None):
            return LowRank(width, rank, h, rngs=rngs, inner=inner, bias=bias, **dtypes)

        spread = jnp.arange(width) / max(width - 1, 1)
        decay = -6.5 + 5 * spread ** (0.85 + jnp.sqrt(at.height))
        self.decay = low_rank(config.decay_rank, jnp.tanh, decay)
        self.rate = low_rank(config.rate_rank, _identity, jnp.zeros(width))
        self.residual = low_rank(config.value_rank, _identity, jnp.ones(width))
        self.gate = low_rank(config.gate_rank, jax.nn.sigmoid)

        def per_channel(value):
            return nnx.Param(jnp.full((h, c), value, param_dtype), axes=("heads", "head_dim"))

        self.key_removal, self.key_rate = per_channel(0.85), per_channel(1.0)
        self.bonus = per_channel(0.0)
        self.norm_scale, self.norm_bias = per_channel(1.0), per_channel(0.0)
        self.out = Linear(
            "bthc,hcd->btd",
            (h, c, width),
            ("heads", "head_dim", "embed"),
            ("batch", "time", None),
            rngs=rngs,
            init=fan_in_normal(out_scale, fan_in=width),
            **dtypes,
        )

    def init_state(self, batch: int, max_length: int, dtype=None) -> Rwkv7State:
        """The empty state; ``max_length`` does not change its size."""
        del max_length
        matrix = jnp.zeros((batch, self.heads, self.head_dim, self.head_dim), jnp.float32)
        return Rwkv7State(Tail.empty(batch, 1, self.width, dtype or self.dtype), matrix)

    def __call__(
        self,
        x_btd: jax.Array,
        positions_bt: jax.Array,
        segment_ids_bt: jax.Array | None = None,
        state: Rwkv7State | None = None,
        tap: Tap | None = None,
        *,
        layer: jax.Array | int = 0,
        first_values_bthc: jax.Array | None = None,
    ) -> tuple[jax.Array, Rwkv7State | None, jax.Array]:
        """Mix along time; with ``state``, after the tokens it holds.

        Args:
          layer: 0 at the bottom, whose own values are the first; may be traced.
          first_values_bthc: what the layer below returned; not looked at in layer 0.

        Returns:
          ``(y_btd, state, first_values_bthc)``.
        """
        tap = tap or Tap()
        tail = None if state is None else state.tail
        x_btd = place(x_btd, "batch", None, None)
        tokens = Tokens.of(x_btd, positions_bt, segment_ids_bt, tail)
        [previous] = before(x_btd, 1, tokens, tail)
        change = previous - x_btd

        def shifted(name):
            return x_btd + change * read(self.mixes[name], x_btd.dtype)

        def channels(parameter):
            return read(parameter, jnp.float32)

        r = self.receptance(shifted("receptance")).astype(jnp.float32)
        # log(−log(decay)): the decay lies between e^(−e^−0.5) = 0.545 and 1
        w = -jax.nn.softplus(-self.decay(shifted("decay"))) - 0.5
        k = self.key(shifted("key")).astype(jnp.float32)
        x_value = shifted("value")
        v = self.value(x_value).astype(jnp.float32)
        rate = jax.nn.sigmoid(self.rate(shifted("rate")))
        g = self.gate(shifted("gate"))
        if first_values_bthc is None:
            first_values_bthc = v
        else:
            mixed = v + (first_values_bthc - v) * jax.nn.sigmoid(self.residual(x_value))
            v = jnp.where(layer == 0, v, mixed)
            first_values_bthc = jnp.where(layer == 0, v, first_values_bthc)
        removal = k * channels(self.key_removal)
        length = jnp.sqrt(jnp.sum(jnp.square(removal), -1, keepdims=True) + 1e-24)
        removal = removal / length
        k = k * (1 + (rate - 1) * channels(self.key_rate))
        put_back = removal * rate
        initial = None
        if state is not None:
            initial = carried(state.matrix_bhcc, tokens.continues(state.tail))
            assert tokens.valid_bt is not None
            valid = tokens.valid_bt[..., None, None]
            # padding: no decay, nothing taken, nothing put
            w = jnp.where(valid, w, -1e4)
            k, put_back = jnp.where(valid, k, 0), jnp.where(valid, put_back, 0)

        def run(r, w, k, v, a, b, segments, initial):
            return wkv7(
                r, w, k, v, a, b,
                segment_ids_bt=segments,
                initial_state_bhcc=initial,
                implementation=self.implementation,
            )  # fmt: skip

        matrix_axes = ("batch", "heads", None, None)
        y, matrix = island(
            run,
            (r, w, k, v, -removal, put_back, tokens.segments_bt, initial),
            (*[HEADS] * 6, ("batch", None), matrix_axes),
            [HEADS, matrix_axes],
        )
        if state is not None:
            state = Rwkv7State(after(x_btd, tokens, state.tail), matrix)
        y = _head_norm(y, eps=64e-5)
        y = y * channels(self.norm_scale) + channels(self.norm_bias)
        y += jnp.sum(r * k * channels(self.bonus), -1, keepdims=True) * v
        y = tap("mixer.output", (y * g).astype(x_btd.dtype))
        return self.out(y), state, first_values_bthc


def _head_norm(y: jax.Array, *, eps: float) -> jax.Array:
    """Mean 0 and variance 1 over each head's channels."""
    y -= jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
