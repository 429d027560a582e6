"""RWKV-7's time-mix: each head has a matrix with a delta rule (Peng 2025, arXiv:2503.14456)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.config import check
from layers.context import Context
from layers.linear import Linear, fan_in_normal
from layers.recurrent import RecurrentState, Tail, Tokens, after, before, carried
from layers.rwkv import Depth, RwkvConfig, ramp, vector
from layers.sharding import per_device, reshard
from layers.state import CONTIGUOUS, CacheConfig
from layers.weights import read
from pallas_kernels.wkv import wkv7

HEADS = ("batch", None, "heads", None)
FIRST_VALUES = "rwkv7.first_values"  # in `Context.shared`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rwkv7State(RecurrentState):
    """``tail``: one token; ``matrix_bhcc``: of `wkv7`, [values, keys], float32."""

    tail: Tail
    matrix_bhcc: jax.Array


class LowRank(nnx.Module):
    """``inner(x A) B + bias``, ``[b, t, h, c]``: the low-rank maps of RWKV-7."""

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
    """RWKV-7's time-mix (2503.14456, §4). ``first_layer``: index of the first RWKV-7 layer."""

    def __init__(
        self,
        config: RwkvConfig,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: Depth = Depth(),  # noqa: B008
        first_layer: int = 0,
        out_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        c = config.head_dim
        self.first_layer = first_layer
        check(width % c == 0, "rwkv.head_dim", c, f"must divide width={width}")
        self.heads, self.head_dim, h = width // c, c, width // c
        self.width, self.dtype, self.implementation = width, dtype, config.implementation
        dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        powers = dict(receptance=0.2, decay=0.9, key=0.7, value=0.7, rate=0.9, gate=0.2)
        self.mixes = nnx.Dict(
            {
                name: vector(1 - ramp(width) ** (power * depth.remaining), "norm", param_dtype)
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
        decay = -6.5 + 5 * spread ** (0.85 + jnp.sqrt(depth.height))
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

    def init_state(
        self, batch: int, max_length: int, cache: CacheConfig = CONTIGUOUS
    ) -> Rwkv7State:
        """The empty state; ``max_length`` does not change its size."""
        del max_length, cache
        matrix = jnp.zeros((batch, self.heads, self.head_dim, self.head_dim), jnp.float32)
        matrix = reshard(matrix, "batch", "heads", None, None)
        return Rwkv7State(Tail.empty(batch, 1, self.width, self.dtype), matrix)

    def init_shared(self, x_btd: jax.Array) -> dict[str, jax.Array]:
        """Zeros, which the first RWKV-7 layer overwrites with its values."""
        b, t, _ = x_btd.shape
        zeros = jnp.zeros((b, t, self.heads, self.head_dim), jnp.float32)
        return {FIRST_VALUES: reshard(zeros, *HEADS)}

    def __call__(self, x_btd: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """Mix tokens along time; with a state, these tokens follow those that it holds.

        The first RWKV-7 layer stores its values in ``context.shared``; later ones mix these values
        into theirs (value residual). Without an entry there, this layer is the first.
        """
        state = context.state
        tail = None if state is None else state.tail
        tokens, x_btd = Tokens.of(reshard(x_btd, "batch", None, None), context.mask, tail)
        [previous] = before(x_btd, 1, tokens, tail)
        difference = previous - x_btd

        def shifted(name):
            return x_btd + difference * read(self.mixes[name], x_btd.dtype)

        def channels(parameter):
            return read(parameter, jnp.float32)

        r = self.receptance(shifted("receptance")).astype(jnp.float32)
        # log(−log(decay)): the decay is between e^(−e^−0.5) = 0.545 and 1
        w = -jax.nn.softplus(-self.decay(shifted("decay"))) - 0.5
        k = self.key(shifted("key")).astype(jnp.float32)
        x_value = shifted("value")
        v = self.value(x_value).astype(jnp.float32)
        rate = jax.nn.sigmoid(self.rate(shifted("rate")))
        g = self.gate(shifted("gate"))
        shared = context.shared
        if FIRST_VALUES in shared:
            is_first, first = context.layer == self.first_layer, shared[FIRST_VALUES]
            mixed = v + (first - v) * jax.nn.sigmoid(self.residual(x_value))
            v = jnp.where(is_first, v, mixed)
            shared = {**shared, FIRST_VALUES: jnp.where(is_first, v, first)}
        removal = k * channels(self.key_removal)
        norm = jnp.sqrt(jnp.sum(jnp.square(removal), -1, keepdims=True) + 1e-24)
        removal = removal / norm
        k = k * (1 + (rate - 1) * channels(self.key_rate))
        replacement = removal * rate
        initial = None
        if state is not None:
            initial = carried(state.matrix_bhcc, tokens.continues(state.tail))
            assert tokens.valid_bt is not None
            valid = tokens.valid_bt[..., None, None]
            # padding: no decay, nothing is removed or added
            w = jnp.where(valid, w, -1e4)
            k, replacement = jnp.where(valid, k, 0), jnp.where(valid, replacement, 0)

        def run(r, w, k, v, a, b, segments, initial):
            return wkv7(
                r, w, k, v, a, b,
                segment_ids_bt=segments,
                initial_state_bhcc=initial,
                implementation=self.implementation,
            )  # fmt: skip

        matrix_axes = ("batch", "heads", None, None)
        y, matrix = per_device(
            run,
            (r, w, k, v, -removal, replacement, tokens.segments_bt, initial),
            (*[HEADS] * 6, ("batch", None), matrix_axes),
            [HEADS, matrix_axes],
        )
        if state is not None:
            state = Rwkv7State(after(x_btd, tokens, state.tail), matrix)
        y = _head_norm(y, eps=64e-5)
        y = y * channels(self.norm_scale) + channels(self.norm_bias)
        y += jnp.sum(r * k * channels(self.bonus), -1, keepdims=True) * v
        y = tokens.as_called((y * g).astype(x_btd.dtype))
        y = self.out(context.tap("mixer.hidden", y))
        return y, context.replace(state=state, shared=shared)


def _head_norm(y: jax.Array, *, eps: float) -> jax.Array:
    """Mean 0 and variance 1 over each head's channels."""
    y -= jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
