"""One layer of the stack: a sequence mixer and a feed-forward layer, with norms and residuals."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from layers.architecture import DecoderConfig
from layers.attention import Attention
from layers.hooks import Tap
from layers.latent_attention import LatentAttention
from layers.mamba import Mamba
from layers.mamba2 import Mamba2
from layers.mlp import Mlp
from layers.moe import Moe, RouterStats
from layers.norm import Norm
from layers.rwkv import ChannelMix, Place
from layers.rwkv4 import Rwkv4
from layers.rwkv7 import Rwkv7


class First(NamedTuple):
    """The layer's index among the RWKV-7 layers, and the values of the first of them."""

    layer: jax.Array | int
    values: jax.Array | None


class BlockState(NamedTuple):
    """What one layer remembers; None where its feed-forward layer remembers nothing."""

    mixer: Any
    feed_forward: Any


class Block(nnx.Module):
    """A mixer and a feed-forward layer, each with its norm and residual connection.

    ``at`` is its place in the stack, which RWKV's initial values depend on.
    """

    def __init__(
        self,
        config: DecoderConfig,
        mixer: str,
        feed_forward: str,
        *,
        rngs: nnx.Rngs,
        at: Place = Place(),  # noqa: B008
    ):
        options = dict(rngs=rngs, out_scale=1 / math.sqrt(2 * config.num_layers), **dtypes(config))
        self.norm_position = config.norm_position
        self.parallel = config.parallel_residual
        self.mixer: Any = _make_mixer(config, mixer, at, options)
        self.mlp: Any = _make_feed_forward(config, feed_forward, at, options)
        has_mlp = self.mlp is not None
        first = config.norm_position != "output"
        last = config.norm_position in ("both", "output")
        own = has_mlp and not (self.parallel and config.shared_norm)
        self.mixer_norm = make_norm(config) if first else None
        self.mlp_norm = make_norm(config) if first and own else None
        self.mixer_post_norm = make_norm(config) if last else None
        self.mlp_post_norm = make_norm(config) if last and has_mlp else None

    def init_state(self, batch: int, max_length: int, dtype) -> BlockState:
        """The empty state for ``max_length`` tokens."""
        keeps = isinstance(self.mlp, ChannelMix)
        return BlockState(
            self.mixer.init_state(batch, max_length, dtype),
            self.mlp.init_state(batch, max_length, dtype) if keeps else None,
        )

    def __call__(
        self,
        x_btd: jax.Array,
        positions_bt: jax.Array,
        segment_ids_bt: jax.Array | None,
        state: BlockState | None,
        tap: Tap,
        first: First,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, BlockState | None, First, RouterStats | None]:
        """Returns ``(x_btd, state, first, stats)``; `Rwkv7` hands ``first`` from layer to layer.

        ``key`` is of a router's noise in training, ``stats`` what a mixture of experts reports.
        """
        where = positions_bt, segment_ids_bt
        mixer_state, mlp_state = (None, None) if state is None else state
        stats: list[RouterStats] = []

        def mix(x):
            if isinstance(self.mixer, Rwkv7):
                y, new, values = self.mixer(
                    x, *where, mixer_state, tap, layer=first.layer, first_values_bthc=first.values
                )
                return checkpoint_name(y, "mixed"), new, First(first.layer, values)
            y, new = self.mixer(x, *where, mixer_state, tap)
            return checkpoint_name(y, "mixed"), new, first

        def feed_forward(x):
            if isinstance(self.mlp, ChannelMix):
                y, new = self.mlp(x, *where, mlp_state)
            elif isinstance(self.mlp, Moe):
                y, found = self.mlp(x, positions_bt, key)
                stats.append(found)
                new = None
            else:
                assert self.mlp is not None
                y, new = self.mlp(x), None
            return tap("mlp.output", y), new

        def normalise(norm, y):
            return y if norm is None else norm(y)

        x = tap("residual", x_btd)
        if self.norm_position == "post":
            y, mixer_state, first = mix(x)
            x = normalise(self.mixer_norm, x + y)
            if self.mlp is not None:
                y, mlp_state = feed_forward(x)
                x = normalise(self.mlp_norm, x + y)
        else:
            normed = normalise(self.mixer_norm, x)
            y, mixer_state, first = mix(normed)
            y = normalise(self.mixer_post_norm, y)
            if not self.parallel:
                x = x + y
                normed = x
                y = None
            if self.mlp_norm is not None:
                normed = self.mlp_norm(x)
            if self.mlp is not None:
                z, mlp_state = feed_forward(normed)
                z = normalise(self.mlp_post_norm, z)
                y = z if y is None else y + z
            x = x if y is None else x + y
        new = None if state is None else BlockState(mixer_state, mlp_state)
        return x, new, first, stats[0] if stats else None


def _make_mixer(config: DecoderConfig, kind: str, at: Place, options: dict[str, Any]):
    if kind in ("attention", "sliding"):
        own = config.sliding_rotary if kind == "sliding" else None
        rotary = own or config.rotary
        return Attention(
            config.part("attention"),
            config.width,
            sliding=kind == "sliding",
            rotary_config=rotary if config.position == "rotary" else None,
            use_alibi=config.position == "alibi",
            qk_norm="rmsnorm_1p" if config.norm == "rmsnorm_1p" else "rmsnorm",
            norm_eps=config.norm_eps,
            **options,
        )
    if kind == "latent":
        return LatentAttention(
            config.part("latent"),
            config.width,
            rotary_config=config.rotary,
            norm_eps=config.norm_eps,
            **options,
        )
    if kind == "mamba":
        return Mamba(config.part("mamba"), config.width, **options)
    if kind == "mamba2":
        return Mamba2(config.part("mamba"), config.width, norm_eps=config.norm_eps, **options)
    return {"rwkv4": Rwkv4, "rwkv7": Rwkv7}[kind](
        config.part("rwkv"), config.width, at=at, **options
    )


def _make_feed_forward(config: DecoderConfig, kind: str, at: Place, options: dict[str, Any]):
    if kind == "none":
        return None
    if kind == "mlp":
        return Mlp(config.part("mlp"), config.width, **options)
    if kind == "moe":
        return Moe(config.part("moe"), config.width, **options)
    hidden = config.part("mlp").width
    return ChannelMix(hidden, config.width, gated=kind == "rwkv4", at=at, **options)


def dtypes(config: DecoderConfig) -> dict[str, Any]:
    """The configuration's ``dtype`` and ``param_dtype`` as layers take them."""
    return dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype))


def make_norm(config: DecoderConfig) -> Norm:
    """The stack's norm over ``width`` features."""
    return Norm(
        config.norm,
        config.width,
        eps=config.norm_eps,
        bias=config.norm_bias,
        param_dtype=jnp.dtype(config.param_dtype),
    )
