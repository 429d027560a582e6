"""The stack: a pattern of blocks, repeated, between an embedding and a head.

``pattern × repeats`` covers uniform and hybrid models alike. Parameters are stacked over repeats
and the blocks either scanned (one compiled body) or unrolled (faster on CPU); the numbers are the
same and so is the checkpoint.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.attention import Attention, AttentionConfig
from layers.config import ConfigError, check, check_choice
from layers.embedding import Embedding, sinusoidal
from layers.hooks import Hooks, Tap
from layers.linear import Linear
from layers.mlp import Mlp, MlpConfig
from layers.norm import NORMS, Norm
from layers.rotary import RotaryConfig, rotated_channels
from layers.sharding import place
from layers.state import KVCache

POSITIONS = ("rotary", "alibi", "learned", "sinusoidal", "none")
MIXERS = ("attention", "sliding")
NORM_POSITIONS = ("pre", "post", "both")
# name → policy of jax.checkpoint; "none" keeps every activation
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model.

    ``pattern`` names the mixer of each layer in turn and is repeated to ``num_layers``:
    ``"attention"`` sees everything before, ``"sliding"`` the last ``attention.window`` tokens.
    ``norm_position``: ``pre`` (GPT-2, Llama), ``post`` (Vaswani 2017) or ``both`` (Gemma 2).
    ``parallel_residual``: attention and MLP read the same normalised input (GPT-J).
    ``max_length``: rows of the learned position table; nothing else limits the length.
    ``embedding_scale`` multiplies embeddings; ``logit_cap`` soft-caps logits (Gemma 2).
    ``dtype`` is what is computed in, ``param_dtype`` what is stored; norms, softmax and logits are
    float32 whatever they are. ``init_std``: of the embeddings; other weights are fan-in scaled, and
    residual outputs by ``1/sqrt(2·num_layers)`` more (GPT-2, §2.3).
    """

    vocab_size: int
    width: int
    num_layers: int
    attention: AttentionConfig
    mlp: MlpConfig
    pattern: tuple[str, ...] = ("attention",)
    position: str = "rotary"
    rotary: RotaryConfig = RotaryConfig()
    max_length: int | None = None
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    norm_position: str = "pre"
    parallel_residual: bool = False
    tie_embeddings: bool = True
    embedding_scale: float | None = None
    logit_cap: float | None = None
    init_std: float = 0.02
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "norm_eps", "init_std"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        for name in ("max_length", "embedding_scale", "logit_cap"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be > 0 or None")
        check_choice("position", self.position, POSITIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("norm_position", self.norm_position, NORM_POSITIONS)
        check_choice("remat", self.remat, REMAT)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("param_dtype", self.param_dtype, DTYPES)
        check(len(self.pattern) > 0, "pattern", self.pattern, "must name at least one layer")
        for i, kind in enumerate(self.pattern):
            check_choice(f"pattern[{i}]", kind, MIXERS)
        check(
            self.num_layers % len(self.pattern) == 0,
            "num_layers",
            self.num_layers,
            f"must be a multiple of the pattern's length {len(self.pattern)}",
        )
        window, sliding = self.attention.window, "sliding" in self.pattern
        check(
            sliding == (window is not None),
            "attention.window",
            window,
            "the pattern's sliding layers need it" if sliding else "no layer of pattern is sliding",
        )
        check(
            self.position != "learned" or self.max_length is not None,
            "max_length",
            None,
            "learned positions need it",
        )
        check(
            self.position != "sinusoidal" or self.width % 2 == 0,
            "width",
            self.width,
            "sinusoidal positions need an even one",
        )
        check(
            not self.norm_bias or self.norm == "layernorm",
            "norm_bias",
            self.norm_bias,
            "only layernorm has one",
        )
        check(
            not (self.parallel_residual and self.norm_position == "post"),
            "parallel_residual",
            True,
            "needs norm_position=pre or both",
        )
        try:
            channels = self.attention.channels(self.width)
        except ConfigError as error:
            raise ConfigError(f"attention.{error}") from None
        if self.position == "rotary":
            rotated_channels(channels, self.rotary.fraction)

    @property
    def repeats(self) -> int:
        return self.num_layers // len(self.pattern)


class Output(NamedTuple):
    """``logits_btv`` float32; ``state`` after these tokens, if one was given; captured ``taps``."""

    logits_btv: jax.Array
    state: tuple[KVCache, ...] | None
    taps: dict[str, jax.Array]


class Block(nnx.Module):
    """A mixer and an MLP, each with its norm and residual connection."""

    def __init__(self, config: DecoderConfig, kind: str, *, rngs: nnx.Rngs):
        dtypes = _dtypes(config)
        out_scale = 1 / math.sqrt(2 * config.num_layers)
        self.norm_position = config.norm_position
        self.parallel = config.parallel_residual
        self.mixer = Attention(
            config.attention,
            config.width,
            rngs=rngs,
            sliding=kind == "sliding",
            rotary_config=config.rotary if config.position == "rotary" else None,
            use_alibi=config.position == "alibi",
            norm_eps=config.norm_eps,
            out_scale=out_scale,
            **dtypes,
        )
        self.mlp = Mlp(config.mlp, config.width, rngs=rngs, out_scale=out_scale, **dtypes)

        both = config.norm_position == "both"
        self.mixer_norm = make_norm(config)
        self.mlp_norm = None if self.parallel else make_norm(config)
        self.mixer_post_norm = make_norm(config) if both else None
        self.mlp_post_norm = make_norm(config) if both else None

    def __call__(self, x_btd, positions_bt, segment_ids_bt, state, tap: Tap):
        """Returns ``(x_btd, state)``."""
        x = tap("residual", x_btd)

        def mix(x):
            return self.mixer(x, positions_bt, segment_ids_bt, state, tap)

        def feed_forward(x):
            return tap("mlp.output", self.mlp(x))

        def normalise(norm, y):
            return y if norm is None else norm(y)

        if self.norm_position == "post":
            y, state = mix(x)
            x = self.mixer_norm(x + y)
            return normalise(self.mlp_norm, x + feed_forward(x)), state
        normed = self.mixer_norm(x)
        y, state = mix(normed)
        y = normalise(self.mixer_post_norm, y)
        if self.parallel:
            return x + y + normalise(self.mlp_post_norm, feed_forward(normed)), state
        x = x + y
        return x + normalise(self.mlp_post_norm, feed_forward(normalise(self.mlp_norm, x))), state


class Decoder(nnx.Module):
    """The whole model. It is a pytree of its parameters: use plain ``jax.jit``, ``jax.grad``, …

    ``blocks[p]`` holds the parameters of the pattern's ``p``-th layer, stacked over repeats. For
    abstract shapes and no memory: ``jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))``.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        dtypes = _dtypes(config)
        self.config = config
        self.embedding = Embedding(
            config.vocab_size, config.width, rngs=rngs, std=config.init_std, **dtypes
        )
        self.positions = (
            Embedding(
                config.max_length,
                config.width,
                rngs=rngs,
                std=config.init_std,
                axes=(None, "embed"),
                **dtypes,
            )
            if config.position == "learned" and config.max_length
            else None
        )

        def stack(kind):
            keys = jax.random.split(rngs.params(), config.repeats)
            return jax.vmap(lambda key: Block(config, kind, rngs=nnx.Rngs(params=key)))(keys)

        self.blocks = nnx.List([stack(kind) for kind in config.pattern])
        self.final_norm = None if config.norm_position == "post" else make_norm(config)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(
                "btd,dv->btv",
                (config.width, config.vocab_size),
                ("embed", "vocab"),
                ("batch", "time", "vocab"),
                rngs=rngs,
                out_dtype=jnp.float32,
                **dtypes,
            )
        )

    def init_state(self, batch: int, max_length: int, dtype=None) -> tuple[KVCache, ...]:
        """Empty caches for ``max_length`` tokens: one a pattern entry, stacked over repeats."""
        dtype = jnp.dtype(dtype or self.config.dtype)

        def stack(block):
            empty = block.mixer.init_state(batch, max_length, dtype)
            repeats = self.config.repeats
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (repeats, *a.shape)), empty)

        return tuple(stack(block) for block in self.blocks)

    def __call__(
        self,
        tokens_bt: jax.Array,
        positions_bt: jax.Array | None = None,
        segment_ids_bt: jax.Array | None = None,
        state: tuple[KVCache, ...] | None = None,
        hooks: Hooks | None = None,
    ) -> Output:
        """Logits of the next token after each token.

        Args:
          tokens_bt: int32.
          positions_bt: int32, default ``0, 1, …``; required with ``state``. −1 is padding: seen by
            nobody, never cached.
          segment_ids_bt: int32; tokens see only their own segment.
          state: from `init_state` or an earlier call; any number of new tokens follow it.
          hooks: what to capture and edit on the way (see `layers.hooks`).

        Raises:
          ConfigError: tokens that are not ``[b, t]`` integers, a sequence longer than the learned
            positions or the cache, ``state`` without positions.
        """
        config = self.config
        check(
            tokens_bt.ndim == 2 and jnp.issubdtype(tokens_bt.dtype, jnp.integer),
            "tokens",
            f"{tokens_bt.dtype}{list(tokens_bt.shape)}",
            "must be integers of shape [batch, time]",
        )
        t = tokens_bt.shape[1]
        limit = config.max_length if config.position == "learned" else None
        check(limit is None or t <= limit, "tokens", t, f"longer than max_length={limit}")
        check(
            state is None or positions_bt is not None,
            "positions",
            None,
            "with a state, say where the tokens stand",
        )
        if positions_bt is None:
            positions_bt = jnp.arange(t, dtype=jnp.int32)[None]
        outer = Tap(hooks)
        x = self.embedding(tokens_bt)
        if config.embedding_scale is not None:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.position in ("learned", "sinusoidal"):
            at = jnp.maximum(positions_bt, 0)
            if self.positions is not None:
                at = jnp.broadcast_to(at, tokens_bt.shape)
                at = place(at, "batch", "time")
                x = x + self.positions(at)
            else:
                x = x + sinusoidal(at, config.width).astype(x.dtype)
        x = outer("embedding", x)
        x, state, taps = self._stack(x, positions_bt, segment_ids_bt, state, hooks)
        if self.final_norm is not None:
            x = self.final_norm(x)
        x = outer("final", x)
        logits = self.embedding.logits(x) if self.head is None else self.head(x)
        if config.logit_cap is not None:
            logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
        return Output(logits, state, taps | outer.captured)

    def _stack(self, x, positions_bt, segment_ids_bt, state, hooks):
        config = self.config
        size = len(config.pattern)

        def repeat(x, blocks, states, index):
            new_states, captured = [], []
            for p, (block, old) in enumerate(zip(blocks, states, strict=True)):
                tap = Tap(hooks, index * size + p)
                x, new = block(x, positions_bt, segment_ids_bt, old, tap)
                new_states.append(new)
                captured.append(tap.captured)
            return x, tuple(new_states), captured

        if config.remat != "none":
            repeat = jax.checkpoint(repeat, policy=REMAT[config.remat])
        blocks = tuple(self.blocks)
        states = (None,) * size if state is None else state
        indices = jnp.arange(config.repeats)
        if config.scan:

            def body(x, inputs):
                x, new, captured = repeat(x, *inputs)
                return x, (new, captured)

            x, (states, captured) = jax.lax.scan(body, x, (blocks, states, indices))
        else:
            outputs = []
            for i, (part, old) in enumerate(
                zip(unstack(blocks, config.repeats), unstack(states, config.repeats), strict=True)
            ):
                x, new, captured_here = repeat(x, part, old, i)
                outputs.append((new, captured_here))
            states, captured = jax.tree.map(lambda *a: jnp.stack(a), *outputs)
        taps = {}
        for name in dict.fromkeys(n for layer in captured for n in layer):
            # [repeats, pattern, …] → layers in order
            each = jnp.stack([layer[name] for layer in captured if name in layer], axis=1)
            taps[name] = each.reshape(-1, *each.shape[2:])
        return x, (None if state is None else states), taps


def _dtypes(config: DecoderConfig) -> dict[str, Any]:
    return dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype))


def unstack(tree, repeats: int) -> list:
    """``repeats`` trees from one whose leaves are stacked along axis 0.

    By `jax.lax.split`, whose gradient is one concatenation rather than a sum of padded slices.
    """
    leaves, structure = jax.tree.flatten(tree)
    parts = [jax.lax.split(a, [1] * repeats, axis=0) for a in leaves]
    return [
        jax.tree.unflatten(structure, [jnp.squeeze(part[i], axis=0) for part in parts])
        for i in range(repeats)
    ]


def make_norm(config: DecoderConfig) -> Norm:
    """The stack's norm over ``width`` features."""
    return Norm(
        config.norm,
        config.width,
        eps=config.norm_eps,
        bias=config.norm_bias,
        param_dtype=jnp.dtype(config.param_dtype),
    )
