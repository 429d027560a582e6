"""The stack: a pattern of blocks, repeated, between an embedding and a head.

``pattern × repeats`` covers uniform and hybrid models alike. Parameters are stacked over repeats
and the blocks either scanned (one compiled body) or unrolled (faster on CPU); the numbers are the
same and so is the checkpoint.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.architecture import REMAT, DecoderConfig
from layers.block import Block, BlockState, First, dtypes, make_norm
from layers.config import check
from layers.embedding import Embedding, sinusoidal
from layers.hooks import Hooks, Tap
from layers.linear import Linear
from layers.moe import Moe, RouterStats
from layers.pipeline import pipeline, stages
from layers.rwkv import Place
from layers.sharding import all_but_gathered, place
from layers.weights import gathers

State = tuple[BlockState, ...]


class Output(NamedTuple):
    """``logits_btv`` float32; ``state`` after these tokens, if one was given; captured ``taps``.

    ``aux``: what the mixtures of experts report, stacked over them in order; None without any.
    """

    logits_btv: jax.Array
    state: State | None
    taps: dict[str, jax.Array]
    aux: RouterStats | None


class Decoder(nnx.Module):
    """The whole model. It is a pytree of its parameters: use plain ``jax.jit``, ``jax.grad``, …

    ``blocks[p]`` holds the parameters of the pattern's ``p``-th layer, stacked over repeats; where
    there are several circuits, the first one's patterns come first (`DecoderConfig.place`). For
    abstract shapes and no memory: ``jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))``.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        types = dtypes(config)
        self.config = config
        self.embedding = Embedding(
            config.vocab_size, config.width, rngs=rngs, std=config.init_std, **types
        )
        self.positions = (
            Embedding(
                config.max_length,
                config.width,
                rngs=rngs,
                std=config.init_std,
                axes=(None, "embed"),
                **types,
            )
            if config.position == "learned" and config.max_length
            else None
        )

        self.embedding_norm = make_norm(config) if config.embedding_norm else None

        def stack(p, mixer, feed_forward):
            def make(key, repeat):
                at = Place(repeat * len(config.pattern) + p, config.num_layers)
                return Block(config, mixer, feed_forward, rngs=nnx.Rngs(params=key), at=at)

            keys = jax.random.split(rngs.params(), config.repeats)
            each, repeats = config.repeats // config.circuits, jnp.arange(config.repeats)
            cuts = [slice(c * each, (c + 1) * each) for c in range(config.circuits)]
            return [jax.vmap(make)(keys[cut], repeats[cut]) for cut in cuts]

        stacks = [stack(p, *kinds) for p, kinds in enumerate(config.layers)]
        self.blocks = nnx.List(
            [block for circuit in zip(*stacks, strict=True) for block in circuit]
        )
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
                **types,
            )
        )

    @property
    def mixtures(self) -> list[Moe]:
        """The mixtures of experts in ``blocks``, each stacked over repeats."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, Moe)]

    def init_state(self, batch: int, max_length: int, dtype=None) -> State:
        """Empty states for ``max_length`` tokens, one for each of ``blocks``, stacked alike."""
        dtype = jnp.dtype(dtype or self.config.dtype)
        moe = self.config.moe
        looks_ahead = moe is not None and moe.router == "expert_choice"
        check(not looks_ahead, "moe.router", "expert_choice", "sees later tokens: cannot generate")

        def stack(block):
            empty = block.init_state(batch, max_length, dtype)
            repeats = self.config.repeats // self.config.circuits
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (repeats, *a.shape)), empty)

        return tuple(stack(block) for block in self.blocks)

    def __call__(
        self,
        tokens_bt: jax.Array,
        positions_bt: jax.Array | None = None,
        segment_ids_bt: jax.Array | None = None,
        state: State | None = None,
        hooks: Hooks | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """Logits of the next token after each token.

        Args:
          tokens_bt: int32.
          positions_bt: int32, default ``0, 1, …``; required with ``state``. −1 is padding: seen by
            nobody, never cached.
          segment_ids_bt: int32; tokens see only their own segment.
          state: from `init_state` or an earlier call; any number of new tokens follow it.
          hooks: what to capture and edit on the way (see `layers.hooks`).
          key: of the noise of routers, in training; None for no noise.

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
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = outer("embedding", x)
        x, state, taps, aux = self._stack(x, positions_bt, segment_ids_bt, state, hooks, key)
        if self.final_norm is not None:
            x = self.final_norm(x)
        x = outer("final", x)
        logits = self.embedding.logits(x) if self.head is None else self.head(x)
        if config.logit_cap is not None:
            logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
        return Output(logits, state, taps | outer.captured, aux)

    def _stack(self, x, positions_bt, segment_ids_bt, state, hooks, key):
        config, size = self.config, len(self.config.pattern)
        circuits = [tuple(self.blocks[i : i + size]) for i in range(0, len(self.blocks), size)]
        values = self._no_values(x)
        if stages() > 1:
            check(state is None, "mesh.stage", stages(), "must be 1: a pipeline does not generate")
            return self._pipeline(circuits, x, values, positions_bt, segment_ids_bt, hooks, key)
        outputs = []
        for c, blocks in enumerate(circuits):
            states = (None,) * size if state is None else state[c * size : (c + 1) * size]
            first = c * (config.repeats // config.circuits)
            (x, values), *output = self._repeats(
                blocks, states, (x, values), positions_bt, segment_ids_bt, hooks, key, first
            )
            outputs.append(output)
        states, captured, reported = zip(*outputs, strict=True)
        state = None if state is None else tuple(s for circuit in states for s in circuit)
        taps, aux = (
            jax.tree.map(lambda *a: jnp.concatenate(a), *each) for each in (captured, reported)
        )
        return x, state, taps, aux

    def _pipeline(self, circuits, x, values, positions_bt, segment_ids_bt, hooks, key):
        """The layers of a training step, split over stages."""
        parts = self.config.part("microbatches")
        check(hooks is None, "hooks", hooks, "stages have none: use a mesh without them")
        where = jnp.broadcast_to(positions_bt, x.shape[:2]), segment_ids_bt

        def layers(blocks, moving, where, key, first):
            none, (positions, segments) = (None,) * len(blocks), where
            moving, _, _, report = self._repeats(
                blocks, none, moving, positions, segments, None, key, first
            )
            return moving, report

        moving, routed = (x, values), "moe" in self.config.feed_forward
        (x, _), aux = pipeline(layers, circuits, moving, where, key, parts, apart=not routed)
        if aux is not None:
            mean = {name: getattr(aux, name) / parts for name in ("loss", "balance", "z")}
            aux = dataclasses.replace(aux, **mean)
        return x, None, {}, aux

    def _repeats(
        self, blocks, states, carry, positions_bt, segment_ids_bt, hooks, key, first_repeat
    ):
        """Through ``blocks``: ``((x, values), states, taps, aux)``, all in order of layers."""
        config, size = self.config, len(self.config.pattern)
        count = jax.tree.leaves(blocks)[0].shape[0]

        def repeat(x, values, blocks, states, index):
            new_states, captured, reported = [], [], []
            for p, (block, old) in enumerate(zip(blocks, states, strict=True)):
                tap = Tap(hooks, index * size + p)
                first = First(index * size + p - self._first_rwkv7, values)
                own = None if key is None else jax.random.fold_in(key, index * size + p)
                x, new, (_, values), stats = block(
                    x, positions_bt, segment_ids_bt, old, tap, first, own
                )
                reported += [] if stats is None else [stats]
                new_states.append(new)
                captured.append(tap.captured)
            return x, values, tuple(new_states), (captured, reported)

        policy = REMAT[config.remat]
        if policy is None and gathers(blocks):
            policy = all_but_gathered
        if policy is not None:
            repeat = jax.checkpoint(repeat, policy=policy)
        if config.scan:

            def body(carry, inputs):
                x, values, new, captured = repeat(*carry, *inputs)
                return (x, values), (new, captured)

            indices = first_repeat + jnp.arange(count)
            carry, (states, captured) = jax.lax.scan(body, carry, (blocks, states, indices))
        else:
            outputs = []
            for i, (part, old) in enumerate(
                zip(unstack(blocks, count), unstack(states, count), strict=True)
            ):
                x, values, new, captured_here = repeat(
                    carry[0], carry[1], part, old, first_repeat + i
                )
                carry = x, values
                outputs.append((new, captured_here))
            states, captured = jax.tree.map(lambda *a: jnp.stack(a), *outputs)
        captured, reported = captured
        taps = {}
        for name in dict.fromkeys(n for layer in captured for n in layer):
            # [repeats, pattern, …] → layers in order
            each = jnp.stack([layer[name] for layer in captured if name in layer], axis=1)
            taps[name] = each.reshape(-1, *each.shape[2:])
        aux = None
        if reported:
            each = jax.tree.map(lambda *a: jnp.stack(a, axis=1), *reported)
            aux = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), each)
        return carry, states, taps, aux

    @property
    def _first_rwkv7(self) -> int:
        """The pattern's first RWKV-7 layer."""
        pattern = self.config.pattern
        return pattern.index("rwkv7") if "rwkv7" in pattern else 0

    def _no_values(self, x_btd: jax.Array) -> jax.Array | None:
        """What the first RWKV-7 layer overwrites with its values; None without such a layer."""
        if "rwkv7" not in self.config.pattern:
            return None
        c = self.config.part("rwkv").head_dim
        b, t, d = x_btd.shape
        return place(jnp.zeros((b, t, d // c, c), jnp.float32), "batch", None, "heads", None)


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
