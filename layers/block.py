"""One layer of the stack: a sequence mixer and a feed-forward layer, with norms and residuals."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.architecture import DecoderConfig
from layers.attention import Attention
from layers.context import Context
from layers.latent_attention import LatentAttention
from layers.mamba import Mamba
from layers.mamba2 import Mamba2
from layers.mlp import Mlp
from layers.moe import Moe
from layers.norm import Norm
from layers.rwkv import ChannelMix, Depth
from layers.rwkv4 import Rwkv4
from layers.rwkv7 import Rwkv7
from layers.state import CacheConfig


class BlockState(NamedTuple):
    """The states of a layer's mixer and feed-forward layer; None if that has no state."""

    mixer: Any
    feed_forward: Any


class Block(nnx.Module):
    """A mixer and a feed-forward layer, each with its norms and residual connection.

    ``depth``: the index of the layer in the stack; initial values of RWKV depend on it.
    """

    def __init__(
        self,
        config: DecoderConfig,
        mixer: str,
        feed_forward: str,
        *,
        rngs: nnx.Rngs,
        depth: Depth = Depth(),  # noqa: B008
    ):
        options = dict(rngs=rngs, out_scale=1 / math.sqrt(2 * config.num_layers), **dtypes(config))
        self.mixer: Any = _make_mixer(config, mixer, depth, options)
        self.mlp: Any = _make_feed_forward(config, feed_forward, depth, options)
        self.norm_position = config.norm_position
        self.rwkv = config.rwkv
        self.parallel = config.parallel_residual
        has_mlp, position = self.mlp is not None, config.norm_position
        shared_norm = self.parallel and config.shared_norm

        def norm(present: bool) -> Any:
            return make_norm(config) if present else None

        # norms of a layer's input ("post": of the residual after it), and of its output
        of_input, of_output = position != "output", position in ("both", "output")
        self.mixer_norm = norm(of_input)
        self.mlp_norm = norm(of_input and has_mlp and not shared_norm)
        self.mixer_post_norm = norm(of_output)
        self.mlp_post_norm = norm(of_output and has_mlp)

    def init_state(self, batch: int, max_length: int, cache: CacheConfig) -> BlockState:
        """The empty state for ``max_length`` tokens."""
        layers = (self.mixer, self.mlp)
        return BlockState(
            *(None if a is None else a.init_state(batch, max_length, cache) for a in layers)
        )

    def init_shared(self, x_btd: jax.Array) -> dict[str, Any]:
        """The initial entries of `Context.shared` that this layer requires."""
        return self.mixer.init_shared(x_btd) if hasattr(self.mixer, "init_shared") else {}

    def __call__(self, x_btd: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """The residual after this layer, and the context; its state is a `BlockState` or None."""
        mixer_state, mlp_state = (None, None) if context.state is None else context.state
        has_state, tap = context.state is not None, context.tap

        def rescaled(x):
            return x if self.rwkv is None else self.rwkv.rescaled(x, context.layer)

        def mix(x):
            nonlocal context, mixer_state
            x = tap("mixer.input", x)
            y, context = self.mixer(x, context.replace(state=mixer_state))
            mixer_state = context.state
            return tap("mixer.output", y)

        def feed(x):
            nonlocal context, mlp_state
            x = tap("mlp.input", x)
            y, context = self.mlp(x, context.replace(state=mlp_state))
            mlp_state = context.state
            return tap("mlp.output", y)

        x = tap("residual", x_btd)
        if self.parallel:
            x = self._parallel(x, mix, feed)
        else:
            x = tap("residual.middle", self._add_mixer(x, mix, rescaled))
            if self.mlp is not None:
                x = self._add_feed_forward(x, feed, rescaled)
        state = BlockState(mixer_state, mlp_state) if has_state else None
        return x, context.replace(state=state)

    def _add_mixer(self, x, mix, rescaled):
        if self.norm_position == "pre":
            return x + mix(self.mixer_norm(rescaled(x)))
        if self.norm_position == "post":
            return self.mixer_norm(x + mix(x))
        if self.norm_position == "both":
            return x + self.mixer_post_norm(mix(self.mixer_norm(x)))
        assert self.norm_position == "output"
        return x + self.mixer_post_norm(mix(x))

    def _add_feed_forward(self, x, feed, rescaled):
        if self.norm_position == "pre":
            return x + feed(self.mlp_norm(rescaled(x)))
        if self.norm_position == "post":
            return self.mlp_norm(x + feed(x))
        if self.norm_position == "both":
            return x + self.mlp_post_norm(feed(self.mlp_norm(x)))
        assert self.norm_position == "output"
        return x + self.mlp_post_norm(feed(x))

    def _parallel(self, x, mix, feed):
        normed = self.mixer_norm(x)
        y = mix(normed)
        if self.mixer_post_norm is not None:
            y = self.mixer_post_norm(y)
        if self.mlp is None:
            return x + y
        z = feed(normed if self.mlp_norm is None else self.mlp_norm(x))
        if self.mlp_post_norm is not None:
            z = self.mlp_post_norm(z)
        return x + (y + z)


def _make_mixer(config: DecoderConfig, kind: str, depth: Depth, options: dict[str, Any]):
    if kind in ("attention", "sliding"):
        sliding = config.sliding_rotary if kind == "sliding" else None
        rotary = sliding or config.rotary
        return Attention(
            config.part("attention"),
            config.width,
            sliding=kind == "sliding",
            rotary_config=rotary if config.position == "rotary" else None,
            use_alibi=config.position == "alibi",
            **_qk_norm(config),
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
    if kind == "rwkv4":
        return Rwkv4(config.part("rwkv"), config.width, depth=depth, **options)
    first = config.pattern.index("rwkv7")
    return Rwkv7(config.part("rwkv"), config.width, depth=depth, first_layer=first, **options)


def _qk_norm(config: DecoderConfig) -> dict[str, Any]:
    """The kind of norm of queries and keys, and whether it has a bias, as arguments."""
    if config.part("attention").qk_layernorm:
        return dict(qk_norm="layernorm", norm_bias=config.norm_bias)
    return dict(qk_norm="rmsnorm_1p" if config.norm == "rmsnorm_1p" else "rmsnorm")


def _make_feed_forward(config: DecoderConfig, kind: str, depth: Depth, options: dict[str, Any]):
    if kind == "none":
        return None
    if kind == "mlp":
        return Mlp(config.part("mlp"), config.width, **options)
    if kind == "moe":
        return Moe(config.part("moe"), config.width, **options)
    hidden = config.part("mlp").width
    return ChannelMix(hidden, config.width, gated=kind == "rwkv4", depth=depth, **options)


def dtypes(config: DecoderConfig) -> dict[str, Any]:
    """``dtype`` and ``param_dtype`` of ``config`` as keyword arguments of layers."""
    return dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype))


def make_norm(config: DecoderConfig, eps: float | None = None) -> Norm:
    """The norm that ``config`` selects, over ``width`` features; ``eps``: default ``norm_eps``."""
    return Norm(
        config.norm,
        config.width,
        eps=eps or config.norm_eps,
        bias=config.norm_bias,
        param_dtype=jnp.dtype(config.param_dtype),
    )
