"""RWKV-4's time-mix: a mean over tokens with decaying weights (Peng 2023, arXiv:2305.13048)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.context import Context
from layers.linear import Linear, fan_in_normal
from layers.recurrent import RecurrentState, Tail, Tokens, after, before, carried
from layers.rwkv import Depth, RwkvConfig, ramp, vector
from layers.sharding import per_device, reshard
from layers.state import CONTIGUOUS, CacheConfig
from layers.weights import read
from pallas_kernels.wkv import EMPTY, wkv4

CHANNELS = ("batch", None, "channels")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rwkv4State(RecurrentState):
    """``tail``: one token; numerator, denominator and greatest exponent of `wkv4`, float32."""

    tail: Tail
    numerator_bd: jax.Array
    denominator_bd: jax.Array
    greatest_bd: jax.Array

    def cleared(self) -> "Rwkv4State":
        """The empty state; see `pallas_kernels.wkv.EMPTY`."""
        empty = jnp.full_like(self.greatest_bd, EMPTY)
        return dataclasses.replace(super().cleared(), greatest_bd=empty)


class Rwkv4(nnx.Module):
    """RWKV-4's time-mix (2305.13048, eq. 11–17).

    The initial share of a token, against its predecessor, grows with the index of the channel; it
    grows less in later layers.
    """

    def __init__(
        self,
        config: RwkvConfig,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: Depth = Depth(),  # noqa: B008
        out_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.width, self.dtype, self.implementation = width, dtype, config.implementation
        self.channels = channels = config.channels or width
        dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        token_share = ramp(width) ** depth.remaining
        self.mix_key = vector(token_share, "norm", param_dtype)
        self.mix_value = vector(token_share + 0.3 * depth.height, "norm", param_dtype)
        self.mix_receptance = vector(ramp(width) ** (0.5 * depth.remaining), "norm", param_dtype)
        spread = jnp.arange(channels) / max(channels - 1, 1)
        decay = -5 + 8 * spread ** (0.7 + 1.3 * depth.height)
        # exponents of a recurrence: float32 for every param_dtype, as in the released weights
        self.decay = vector(decay, "channels", jnp.float32)
        zigzag = ((jnp.arange(channels) + 1) % 3 - 1) * 0.5
        self.bonus = vector(jnp.log(0.3) + zigzag, "channels", jnp.float32)

        def linear(shape, axes, out_axes, **extra):
            return Linear(
                "btd,dc->btc", shape, axes, out_axes, rngs=rngs, **extra, **dtypes
            )  # fmt: skip

        self.key, self.value, self.receptance = (
            linear((width, channels), ("embed", "channels"), CHANNELS) for _ in range(3)
        )
        self.out = linear(
            (channels, width), ("channels", "embed"), ("batch", "time", None),
            init=fan_in_normal(out_scale),
        )  # fmt: skip

    def init_state(
        self, batch: int, max_length: int, cache: CacheConfig = CONTIGUOUS
    ) -> Rwkv4State:
        """The empty state; ``max_length`` does not change its size."""
        del max_length, cache
        tail, shape = Tail.empty(batch, 1, self.width, self.dtype), (batch, self.channels)
        # an array each: a program that takes over the state takes over no array twice
        sums = (jnp.full(shape, value, jnp.float32) for value in (0, 0, EMPTY))
        return Rwkv4State(tail, *(reshard(a, "batch", "channels") for a in sums))

    def __call__(self, x_btd: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """Mix tokens along time; with a state, these tokens follow those that it holds."""
        state = context.state
        tail = None if state is None else state.tail
        tokens, x_btd = Tokens.of(reshard(x_btd, "batch", None, None), context.mask, tail)
        [previous] = before(x_btd, 1, tokens, tail)

        def shifted(mix):
            mix = read(mix, x_btd.dtype)
            return x_btd * mix + previous * (1 - mix)

        k = self.key(shifted(self.mix_key))
        v = self.value(shifted(self.mix_value))
        r = jax.nn.sigmoid(self.receptance(shifted(self.mix_receptance)))
        k = k.astype(jnp.float32)
        decay, bonus = (
            read(parameter, jnp.float32, deferred=True) for parameter in (self.decay, self.bonus)
        )
        initial = None
        if state is not None:
            continues = tokens.continues(state.tail)
            initial = (
                carried(state.numerator_bd, continues),
                carried(state.denominator_bd, continues),
                carried(state.greatest_bd, continues, EMPTY),
            )
            # padding has weight 0
            assert tokens.valid_bt is not None
            k = jnp.where(tokens.valid_bt[..., None], k, EMPTY)

        def run(decay, bonus, k, v, segments, initial):
            y, end = wkv4(
                decay,
                bonus,
                k,
                v,
                segment_ids_bt=segments,
                initial_state=initial,
                implementation=self.implementation,
            )
            return y, *end

        row = ("batch", "channels")
        y, *end = per_device(
            run,
            (decay, bonus, k, v, tokens.segments_bt, initial),
            (("channels",), ("channels",), CHANNELS, CHANNELS, ("batch", None), (row, row, row)),
            [CHANNELS, row, row, row],
        )
        if state is not None and tokens.valid_bt is not None:
            numerator, denominator, greatest = end
            assert initial is not None
            # the state has decayed at padding too: the exponent takes this back
            padding_b1 = jnp.sum(~tokens.valid_bt, axis=1, keepdims=True)
            is_unchanged_b1 = padding_b1 == x_btd.shape[1]  # bit for bit
            restored = greatest + padding_b1 * jnp.exp(decay)
            greatest = jnp.where(is_unchanged_b1, initial[2], restored)
            state = Rwkv4State(
                after(x_btd, tokens, state.tail), numerator, denominator, greatest
            )  # fmt: skip
        y = context.tap("mixer.hidden", tokens.as_called(r * y.astype(r.dtype)))
        return self.out(y), context.replace(state=state)
