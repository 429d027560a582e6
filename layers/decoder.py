"""The decoder: an embedding, the repeats of a pattern of layers, and a head.

It has three steps: `Decoder.embed`, `Decoder.run_layers`, `Decoder.unembed`. Uniform and hybrid
models differ in their pattern only. Blocks are stacked over repeats and scanned (one compiled
body), or are a list (``scan=False``); `layers.stack` converts one into the other.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.architecture import CACHED, REMAT, DecoderConfig
from layers.block import Block, BlockState, dtypes, make_norm
from layers.config import check
from layers.context import Context
from layers.embedding import Embedding, sinusoidal
from layers.hooks import Hooks, Tap, stacked
from layers.linear import Linear
from layers.moe import Moe, RouterStats, rebalance
from layers.pipeline import pipeline, stages
from layers.rwkv import Depth
from layers.sharding import all_but_gathered, reshard
from layers.state import CONTIGUOUS, CacheConfig
from layers.weights import gathers
from pallas_kernels.mask import CAUSAL, Mask

State = tuple[BlockState, ...]


class Output(NamedTuple):
    """``logits_btv`` float32; ``state`` after these tokens, if one was given; captured ``taps``.

    ``aux``: the reports of the mixtures of experts, stacked in order of layers; None without them.
    """

    logits_btv: jax.Array
    state: State | None
    taps: dict[str, jax.Array]
    aux: RouterStats | None


class Run(NamedTuple):
    """What `Decoder.run_layers` returns besides the residual; see `Output`."""

    state: State | None
    taps: dict[str, jax.Array]
    aux: RouterStats | None


class Decoder(nnx.Module):
    """A decoder-only language model; a pytree of its parameters: use plain ``jax.jit`` and others.

    With ``config.scan``, ``blocks[p]`` is the pattern's ``p``-th layer, stacked over repeats; with
    several circuits, the blocks of the first circuit come first. Without, ``blocks[i]`` is layer
    ``i`` (`DecoderConfig.locate`). Abstract shapes, without memory:
    ``jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))``.
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
                depth = Depth(repeat * len(config.pattern) + p, config.num_layers)
                return Block(config, mixer, feed_forward, rngs=nnx.Rngs(params=key), depth=depth)

            keys = jax.random.split(rngs.params(), config.repeats)
            per_circuit, repeats = config.repeats // config.circuits, jnp.arange(config.repeats)
            slices = [slice(c * per_circuit, (c + 1) * per_circuit) for c in range(config.circuits)]
            return [jax.vmap(make)(keys[rows], repeats[rows]) for rows in slices]

        stacks = [stack(p, *kinds) for p, kinds in enumerate(config.layers)]
        blocks = [block for circuit in zip(*stacks, strict=True) for block in circuit]
        if not config.scan:
            blocks = [row(block, i) for i in range(config.repeats) for block in blocks]
        self.blocks = nnx.List(blocks)
        post = config.norm_position == "post"
        self.final_norm = None if post else make_norm(config, config.final_norm_eps)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(
                "btd,dv->btv",
                (config.width, config.outputs or config.vocab_size),
                ("embed", None if config.outputs else "vocab"),
                ("batch", "time", None if config.outputs else "vocab"),
                rngs=rngs,
                role="head",
                out_dtype=jnp.float32,
                **types,
            )
        )

    @property
    def mixtures(self) -> list[Moe]:
        """The mixtures of experts in ``blocks``."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, Moe)]

    def rebalance(self, counts_le: jax.Array) -> None:
        """Apply `layers.moe.rebalance` to every mixture of experts, in place.

        ``counts_le``: the counts of each mixture in order of layers, as in `Output.aux`.
        """
        layers = range(self.config.num_layers)
        located = [self.config.locate(layer) for layer in layers]
        with_experts = [
            location for location in located if isinstance(self.blocks[location[0]].mlp, Moe)
        ]
        for i, block in enumerate(self.blocks):
            rows = [n for n, (index, _) in enumerate(with_experts) if index == i]
            if rows:
                counts = counts_le[jnp.array(rows)] if self.config.scan else counts_le[rows[0]]
                rebalance(block.mlp, counts)

    def init_state(self, batch: int, max_length: int, cache: CacheConfig = CONTIGUOUS) -> State:
        """Empty states for ``max_length`` tokens: one for each of ``blocks``, stacked alike.

        ``cache``: how attention layers store keys and values. States of recurrent layers do not
        depend on it.

        Raises:
          ConfigError: a size is not positive, a layer does not support ``cache``, no layer reads
            it, or the model does not support generation.
        """
        pattern = self.config.pattern
        stores_keys = not set(pattern).isdisjoint(CACHED)
        for name, default in (("kind", "contiguous"), ("dtype", None)):
            value = getattr(cache, name)
            no_layer = f"changes nothing: no layer of pattern={pattern} stores keys"
            check(stores_keys or value == default, f"cache.{name}", value, no_layer)
        moe = self.config.moe
        sees_later = moe is not None and moe.router == "expert_choice"
        check(
            not sees_later,
            "moe.router",
            "expert_choice",
            "does not support generation: experts see later tokens",
        )

        def empty(block):
            state = block.init_state(batch, max_length, cache)
            if not self.config.scan:
                return state
            repeats = self.config.repeats // self.config.circuits
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (repeats, *a.shape)), state)

        return tuple(empty(block) for block in self.blocks)

    def __call__(
        self,
        tokens_bt: jax.Array,
        positions_bt: jax.Array | None = None,
        segment_ids_bt: jax.Array | None = None,
        state: State | None = None,
        hooks: Hooks | None = None,
        key: jax.Array | None = None,
        *,
        until_bt: jax.Array | None = None,
        rotary_positions: jax.Array | None = None,
    ) -> Output:
        """Logits of the next token after each token: `embed`, `run_layers`, `unembed`.

        Args:
          tokens_bt: int32.
          positions_bt: int32, default ``0, 1, …``; required with ``state``. −1 is padding: no token
            sees it, and it changes no cache, no recurrent state and no expert's capacity.
          segment_ids_bt: int32; tokens see only their own segment.
          state: from `init_state` or an earlier call; these tokens follow those that it holds.
          hooks: what to capture and what to edit (see `layers.hooks`).
          key: for the noise of routers in training; None: no noise.
          until_bt: int32, the last position that a token sees beyond its own: the end of its prefix
            or image (`pallas_kernels.mask.Mask`).
          rotary_positions: the positions of rotary embeddings, default ``positions_bt``.

        Raises:
          ConfigError: tokens that are not ``[b, t]`` integers, a sequence longer than the learned
            positions or the cache, ``state`` without positions.
        """
        check(
            tokens_bt.ndim == 2 and jnp.issubdtype(tokens_bt.dtype, jnp.integer),
            "tokens",
            f"{tokens_bt.dtype}{list(tokens_bt.shape)}",
            "must be integers of shape [batch, time]",
        )
        tap = Tap(hooks)
        x_btd = self.embed(tokens_bt, positions_bt, tap=tap)
        x_btd, run = self.run_layers(
            x_btd,
            Mask.of_tokens(positions_bt, segment_ids_bt, until_bt),
            positions=rotary_positions,
            state=state,
            hooks=hooks,
            key=key,
        )
        logits_btv = self.unembed(x_btd, tap=tap)
        return Output(logits_btv, run.state, run.taps | tap.captured, run.aux)

    def embed(
        self, tokens_bt: jax.Array, positions_bt: jax.Array | None = None, *, tap: Tap | None = None
    ) -> jax.Array:
        """Embeddings ``[b, t, d]`` of tokens, plus those of positions (learned or sinusoidal)."""
        config, t = self.config, tokens_bt.shape[1]
        limit = config.max_length if config.position == "learned" else None
        check(limit is None or t <= limit, "tokens", t, f"must be at most max_length={limit}")
        x = self.embedding(tokens_bt)
        if config.embedding_scale is not None:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.position in ("learned", "sinusoidal"):
            indices_bt = (
                jnp.arange(t)[None] if positions_bt is None else jnp.maximum(positions_bt, 0)
            )
            if self.positions is not None:
                indices_bt = reshard(jnp.broadcast_to(indices_bt, tokens_bt.shape), "batch", "time")
                x = x + self.positions(indices_bt)
            else:
                x = x + sinusoidal(indices_bt, config.width).astype(x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return (tap or Tap())("embedding", x)

    def run_layers(
        self,
        x_btd: jax.Array,
        mask: Mask = CAUSAL,
        *,
        positions: jax.Array | None = None,
        state: State | None = None,
        hooks: Hooks | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Run]:
        """The residual ``[b, t, d]`` after all layers; ``positions``: of rotary embeddings."""
        check(
            state is None or mask.q_positions_bt is not None,
            "positions",
            None,
            "is required with a state",
        )
        size, scan = len(self.config.pattern), self.config.scan
        circuits = [tuple(self.blocks[i : i + size]) for i in range(0, len(self.blocks), size)]
        shared = {n: a for b in circuits[0] for n, a in b.init_shared(x_btd).items()}
        if stages() > 1:
            check(state is None, "mesh.stage", stages(), "generation requires mesh.stage=1")
            return self._pipeline(circuits, x_btd, shared, mask, positions, hooks, key)
        context = Context(mask, positions, shared=shared, key=key)
        states, layers, seen = [], [], set[str]()
        for i, blocks in enumerate(circuits):
            circuit_state = None if state is None else state[i * size : (i + 1) * size]
            run_circuit = self._scanned if scan else self._unrolled
            first = i * (self.config.repeats // self.config.circuits) if scan else i
            x_btd, context, new, observed = run_circuit(
                blocks, x_btd, context, circuit_state, hooks, first, seen
            )
            states += new
            layers += observed
        taps, aux = self._joined(hooks, layers, seen)
        return x_btd, Run(None if state is None else tuple(states), taps, aux)

    def unembed(self, x_btd: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Float32 logits ``[b, t, v]``, or ``[b, t, outputs]``, of the normalised residual."""
        config = self.config
        if config.rwkv is not None:
            x_btd = config.rwkv.rescaled(x_btd, config.num_layers)
        if self.final_norm is not None:
            x_btd = self.final_norm(x_btd)
        x_btd = (tap or Tap())("final", x_btd)
        logits = self.embedding.logits(x_btd) if self.head is None else self.head(x_btd)
        if config.logit_scale is not None:
            logits = logits * config.logit_scale
        if config.logit_cap is not None:
            logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
        return logits

    def _repeat(self, hooks: Hooks | None, context: Context, parameters: Any, seen: set[str]):
        """The function of one repeat of the pattern, under `jax.checkpoint` if ``remat`` is set.

        ``f(x, shared, blocks, states, index) -> (x, shared), (states, captures and report of each
        layer)``.
        """
        config, size = self.config, len(self.config.pattern)

        def repeat(x, shared, blocks, states, index):
            new_states, observed = [], []
            for p, (block, state) in enumerate(zip(blocks, states, strict=True)):
                layer = index * size + p
                tap = Tap(hooks, layer, seen)
                key = None if context.key is None else jax.random.fold_in(context.key, layer)
                x, after = block(
                    x,
                    context.replace(state=state, tap=tap, key=key, layer=layer, shared=shared),
                )
                shared = after.shared
                new_states.append(after.state)
                observed.append((tap.captured, after.report))
            return (x, shared), (new_states, observed)

        policy = REMAT[config.remat]
        if policy is None and gathers(parameters):
            policy = all_but_gathered
        # without scan the index is static, so that only the layers of a `Capture` are stored
        static = () if config.scan else (4,)
        if policy is None:
            return repeat
        return jax.checkpoint(repeat, policy=policy, static_argnums=static)

    def _unrolled(self, blocks, x, context, states, hooks, index, seen):
        states = (None,) * len(blocks) if states is None else states
        repeat = self._repeat(hooks, context, blocks, seen)
        (x, shared), (states, observed) = repeat(x, context.shared, blocks, states, index)
        first = index * len(blocks)
        layers = [(first + p, *of_layer) for p, of_layer in enumerate(observed)]
        return x, context.replace(shared=shared), states, layers

    def _scanned(self, blocks, x, context, states, hooks, first_repeat, seen):
        states = (None,) * len(blocks) if states is None else states
        repeat = self._repeat(hooks, context, blocks, seen)
        count, size = jax.tree.leaves(blocks)[0].shape[0], len(blocks)

        def body(carry, inputs):
            return repeat(*carry, *inputs)

        indices = first_repeat + jnp.arange(count)
        carry, (states, observed) = jax.lax.scan(
            body, (x, context.shared), (blocks, states, indices)
        )
        layers = []
        for i in range(count):
            for p, of_layer in enumerate(observed):
                layers.append(((first_repeat + i) * size + p, *row(of_layer, i)))
        return carry[0], context.replace(shared=carry[1]), states, layers

    def _joined(self, hooks: Hooks | None, layers: Sequence[tuple[int, Any, Any]], seen: set[str]):
        """Captures and reports of all layers, stacked in order."""
        captured: dict[str, dict[int, jax.Array]] = {}
        for layer, taps, _ in layers:
            for name, a in taps.items():
                captured.setdefault(name, {})[layer] = a
        reports = [report for _, _, report in layers if report is not None]
        aux = jax.tree.map(lambda *a: jnp.stack(a), *reports) if reports else None
        return stacked(hooks, captured, seen), aux

    def _pipeline(self, circuits, x, shared, mask, positions, hooks, key):
        """`run_layers` in training, with layers sharded over the stages of a pipeline."""
        microbatches = self.config.part("microbatches")
        check(hooks is None, "hooks", hooks, "require mesh.stage=1")
        check(positions is None, "rotary_positions", "given", "require mesh.stage=1")
        mask = mask.whole(x.shape[0], x.shape[1], x.shape[1])

        def layers(blocks, moving, mask, key, first):
            context = Context(mask, shared=moving[1], key=key)
            output = self._scanned(blocks, moving[0], context, None, None, first, set())
            x, context, _, observed = output
            return (x, context.shared), self._joined(None, observed, set())[1]

        moving, has_experts = (x, shared), "moe" in self.config.feed_forward
        (x, _), aux = pipeline(
            layers, circuits, moving, mask, key, microbatches, apart=not has_experts
        )
        if aux is not None:
            mean = {name: getattr(aux, name) / microbatches for name in ("loss", "balance", "z")}
            aux = dataclasses.replace(aux, **mean)
        return x, Run(None, {}, aux)


def row(tree: Any, index: int) -> Any:
    """One layer of a tree whose arrays are stacked along their first axis."""
    return jax.tree.map(lambda a: a[index], tree)
