"""Common parts of RWKV-4 and RWKV-7 (Peng 2023, arXiv:2305.13048; Peng 2025, arXiv:2503.14456).

The time-mix is a sequence mixer (`layers.rwkv4`, `layers.rwkv7`), the channel-mix a feed-forward
layer. Both see the preceding token (*token shift*); the time-mix also has a state of fixed size.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.config import EXECUTION, check, check_choice, check_types
from layers.context import Context
from layers.linear import Linear, fan_in_normal
from layers.recurrent import Tail, Tokens, after, before
from layers.sharding import reshard
from layers.state import CONTIGUOUS, CacheConfig
from layers.weights import read
from pallas_kernels.dispatch import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class RwkvConfig:
    """The configuration of RWKV layers; the hidden size of the channel-mix is ``mlp.width``.

    RWKV-4 only: ``channels``: of the time-mix; None: the model's width. ``rescale_every``: norms
    are of the residual divided by 2 for every so many layers before, as transformers stores it for
    float16, which changes their ε alone; 0: they are of the residual.
    RWKV-7 only: ``head_dim``: must divide the model's width. ``decay_rank``, ``rate_rank``,
    ``value_rank``, ``gate_rank``: of the low-rank maps for decay, in-context learning rate, value
    residual and gate.
    ``implementation``: of `pallas_kernels.wkv`; None chooses by platform.
    """

    head_dim: int = 64
    decay_rank: int = 64
    rate_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128
    channels: int | None = None
    rescale_every: int = 0
    implementation: str | None = dataclasses.field(default=None, metadata=EXECUTION)

    def rescaled(self, x: jax.Array, layers: Any) -> jax.Array:
        """The residual ``x`` after ``layers`` layers, for a norm; ``layers`` may be traced."""
        if not self.rescale_every:
            return x
        halvings = jnp.asarray(layers // self.rescale_every)
        return x * jnp.ldexp(jnp.float32(1), -halvings).astype(x.dtype)

    def __post_init__(self):
        check_types(self)
        for name in ("head_dim", "decay_rank", "rate_rank", "value_rank", "gate_rank"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        check(self.rescale_every >= 0, "rescale_every", self.rescale_every, "must be ≥ 0")
        channels = self.channels
        check(channels is None or channels > 0, "channels", channels, "must be > 0 or None")
        if self.implementation is not None:
            check_choice("implementation", self.implementation, IMPLEMENTATIONS)


class Depth(NamedTuple):
    """The index of a layer in the stack, on which initial shifts and decays depend."""

    layer: jax.Array | int = 0  # may be traced
    num_layers: int = 1

    @property
    def height(self) -> Any:
        """0 for the first layer, 1 for the last."""
        return self.layer / max(self.num_layers - 1, 1)

    @property
    def remaining(self) -> Any:
        """1 for the first layer, ``1 / num_layers`` for the last."""
        return 1 - self.layer / self.num_layers


def ramp(width: int) -> jax.Array:
    """``i / width`` for the channels ``i``."""
    return jnp.arange(width) / width


def vector(value: jax.Array, axis: str, dtype) -> nnx.Param:
    """A parameter for each channel."""
    return nnx.Param(value.astype(dtype), axes=(axis,))


class ChannelMix(nnx.Module):
    """RWKV's feed-forward layer: squared ReLU of the token and its predecessor.

    ``gated``: the result is multiplied by a sigmoid of them (RWKV-4, 2305.13048, eq. 18; not in
    RWKV-7). Mixing parameters are shares of the token if ``gated``, else of its predecessor, as in
    each paper's weights.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        gated: bool,
        depth: Depth = Depth(),  # noqa: B008
        out_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.width, self.gated, self.dtype = width, gated, dtype
        dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        token_share = ramp(width) ** depth.remaining
        initial = token_share if gated else 1 - ramp(width) ** (depth.remaining**4)
        self.mix_key = vector(initial, "norm", param_dtype)
        self.mix_receptance = vector(token_share, "norm", param_dtype) if gated else None
        hidden_axes = ("batch", None, "mlp")
        self.key = Linear(
            "btd,df->btf", (width, hidden), ("embed", "mlp"), hidden_axes, rngs=rngs, **dtypes
        )
        self.receptance = (
            Linear(
                "btd,dc->btc", (width, width), ("embed", None), ("batch", None, None),
                rngs=rngs, **dtypes,
            )
            if gated
            else None
        )  # fmt: skip
        self.value = Linear(
            "btf,fd->btd", (hidden, width), ("mlp", "embed"), ("batch", None, None),
            rngs=rngs, init=fan_in_normal(out_scale), **dtypes,
        )  # fmt: skip

    def init_state(self, batch: int, max_length: int, cache: CacheConfig = CONTIGUOUS) -> Tail:
        """The empty state: no token came before."""
        del max_length, cache
        return Tail.empty(batch, 1, self.width, self.dtype)

    def __call__(self, x_btd: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """The layer applied to each token and its predecessor; a state holds the first's."""
        state = context.state
        tokens, x_btd = Tokens.of(reshard(x_btd, "batch", None, None), context.mask, state)
        [previous] = before(x_btd, 1, tokens, state)

        def shifted(mix):
            mix = read(mix, x_btd.dtype)
            share = mix if self.gated else 1 - mix
            return x_btd * share + previous * (1 - share)

        h_btf = jnp.square(jax.nn.relu(self.key(shifted(self.mix_key))))
        y = self.value(context.tap("mlp.hidden", h_btf))
        if self.receptance is not None and self.mix_receptance is not None:
            y = jax.nn.sigmoid(self.receptance(shifted(self.mix_receptance))) * y
        if state is not None:
            state = after(x_btd, tokens, state)
        y = reshard(tokens.as_called(y), "batch", "time", None)
        return y, context.replace(state=state)
