"""The compiled programs of an engine: each is compiled once, for fixed shapes.

- ``chunk``: ``chunk`` tokens of one slot's prompt;
- ``admit``: a slot's settings, and the token from which it goes on;
- ``decode``: one token in every slot;
- ``copy``: one slot's memory, and one page, for another sample of the same prompt;
- ``snapshot``: a slot's recurrent states;
- ``resume``: a slot after a shared prefix, with its recurrent states from a snapshot.

They take the model's leaves, not the model, whose flattening in Python would cost as much as a
small model's step. `Memory` is donated: a program writes into it in place.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.decoder import Decoder, State
from layers.paged_cache import PagedCache
from layers.sharding import reshard
from layers.state import cleared, copy_page, copy_row, put_row, take_row, with_table
from pallas_kernels.mask import Mask
from research.inference.engine.config import EngineConfig
from research.inference.sampling import MOST_LOGPROBS, Sampled, SamplingRows, sample, top_logprobs

ECHO_BLOCK = 16  # positions whose logits are in memory together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What an engine remembers on its device.

    ``token_b``, ``position_b``: the next input of each slot, and where it is.
    """

    state: State
    rows: SamplingRows
    token_b: jax.Array
    position_b: jax.Array


class Chunk(NamedTuple):
    """A part of one slot's prompt: ``count`` of ``tokens_t`` from position ``start``.

    ``targets_t``: the tokens after each of them. ``echo``: whether to compute the log-probabilities
    of ``targets_t``.
    """

    slot: Any
    tokens_t: Any
    targets_t: Any
    start: Any
    count: Any
    echo: Any


class Echo(NamedTuple):
    """Log-probabilities of a chunk's targets, and the likeliest tokens with theirs."""

    logprob_t: jax.Array
    top_ids_tk: jax.Array
    top_logprobs_tk: jax.Array


def new_memory(model: Decoder, config: EngineConfig) -> Memory:
    """The memory of an engine without sequences."""
    return Memory(
        state=model.init_state(config.slots, config.max_length, config.cache),
        rows=SamplingRows.empty(config.slots, model.config.vocab_size),
        token_b=jnp.zeros(config.slots, jnp.int32),
        position_b=jnp.zeros(config.slots, jnp.int32),
    )


class Programs:
    """The programs of ``model`` with states of ``slots`` rows; all arguments are arrays.

    ``compiled``: name → a compiled program that is used in place of jit's.
    """

    def __init__(self, model: Decoder, compiled: Mapping[str, Any] | None = None):
        leaves, structure = jax.tree.flatten(model)
        self.leaves = tuple(leaves)
        self._structure = structure
        donated = functools.partial(jax.jit, donate_argnums=1)
        self.chunk, self.decode = donated(self._chunk), donated(self._decode)
        self.admit = jax.jit(_admit, donate_argnums=0)
        self.copy = jax.jit(_copy, donate_argnums=0)
        self.snapshot = jax.jit(_snapshot)
        self.resume = jax.jit(_resume, donate_argnums=0)
        for name, program in (compiled or {}).items():
            setattr(self, name, program)

    def model(self, leaves) -> Decoder:
        """The model with ``leaves`` as its arrays."""
        return jax.tree.unflatten(self._structure, leaves)

    def _chunk(self, leaves, memory: Memory, table_bn, chunk: Chunk) -> tuple[Memory, Echo]:
        """The prompt of one slot continued; at ``start`` 0 the slot is cleared first."""
        model, t = self.model(leaves), chunk.tokens_t.shape[0]
        state = memory.state if table_bn is None else with_table(memory.state, table_bn)
        old = take_row(state, chunk.slot)
        row = jax.tree.map(
            lambda empty, a: jnp.where(chunk.start == 0, empty, a), cleared(old), old
        )
        index_t = jnp.arange(t)
        positions_bt = jnp.where(index_t < chunk.count, chunk.start + index_t, -1)[None]
        x_btd = model.embed(chunk.tokens_t[None], positions_bt)
        x_btd, run = model.run_layers(x_btd, Mask.of_tokens(positions_bt), state=row)
        echo = jax.lax.cond(
            chunk.echo,
            lambda x_td: _echo(model, x_td, chunk.targets_t),
            lambda x_td: _no_echo(t),
            x_btd[0],
        )
        return dataclasses.replace(memory, state=put_row(state, chunk.slot, run.state)), echo

    def _decode(
        self, leaves, memory: Memory, table_bn, active_b, forced_b, allowed_bv
    ) -> tuple[Memory, Sampled]:
        """One more token in each active slot: ``forced_b`` if that is not −1, else a sample."""
        model = self.model(leaves)
        state = memory.state if table_bn is None else with_table(memory.state, table_bn)
        position_b = jnp.where(active_b, memory.position_b, -1)
        out = model(memory.token_b[:, None], position_b[:, None], state=state)
        assert out.state is not None
        logits_bv = reshard(out.logits_btv[:, 0], None, None)
        sampled = sample(logits_bv, position_b + 1, memory.rows, allowed_bv)
        token_b = jnp.where(forced_b >= 0, forced_b, sampled.token_b)
        memory = Memory(
            state=out.state,
            rows=memory.rows.counted(token_b, active_b),
            token_b=jnp.where(active_b, token_b, memory.token_b),
            position_b=memory.position_b + active_b,
        )
        return memory, sampled


def _admit(memory: Memory, slot, row: SamplingRows, token, position) -> Memory:
    """Slot ``slot`` goes on from ``token`` at ``position``, by the settings of ``row``."""
    return dataclasses.replace(
        memory,
        rows=memory.rows.set_row(slot, row),
        token_b=memory.token_b.at[slot].set(token),
        position_b=memory.position_b.at[slot].set(position),
    )


def _copy(memory: Memory, source, target, source_page, target_page) -> Memory:
    """What the slot ``source`` remembers, also in ``target``; likewise of two pages."""
    state = copy_row(memory.state, source, target)
    return dataclasses.replace(memory, state=copy_page(state, source_page, target_page))


def _snapshot(memory: Memory, slot) -> Any:
    """The recurrent states of a slot: those that are not in pages."""
    return _without_pages(take_row(memory.state, slot))


def _resume(memory: Memory, slot, snapshot, count) -> Memory:
    """A slot with ``count`` tokens in the pages of its table, and the states of ``snapshot``."""
    row = take_row(memory.state, slot)

    def of_layer(state, kept):
        if isinstance(state, PagedCache):
            return dataclasses.replace(state, written_b=jnp.full_like(state.written_b, count))
        return kept

    row = jax.tree.map(of_layer, row, snapshot, is_leaf=_is_paged)
    return dataclasses.replace(memory, state=put_row(memory.state, slot, row))


def _is_paged(node: Any) -> bool:
    return isinstance(node, PagedCache)


def _without_pages(state: Any) -> Any:
    """``state`` with an empty tuple for each `PagedCache`."""
    return jax.tree.map(lambda a: () if _is_paged(a) else a, state, is_leaf=_is_paged)


def _echo(model: Decoder, x_td: jax.Array, targets_t: jax.Array) -> Echo:
    """Log-probabilities of ``targets_t`` after the residuals ``x_td``, in blocks of positions."""

    def of_block(block):
        x_1td, targets = block[0][None], block[1]
        logits_tv = reshard(model.unembed(x_1td), None, None, None)[0]
        logprobs_tv = jax.nn.log_softmax(logits_tv, axis=-1)
        logprob_t = jnp.take_along_axis(logprobs_tv, targets[:, None], axis=-1)[:, 0]
        return Echo(logprob_t, *top_logprobs(logprobs_tv))

    t = x_td.shape[0]
    blocks = math.gcd(t, ECHO_BLOCK)
    split = x_td.reshape(t // blocks, blocks, -1), targets_t.reshape(-1, blocks)
    return jax.tree.map(lambda a: a.reshape(t, *a.shape[2:]), jax.lax.map(of_block, split))


def _no_echo(t: int) -> Echo:
    none = jnp.full((t, MOST_LOGPROBS), -1, jnp.int32)
    return Echo(jnp.zeros(t), none, jnp.zeros((t, MOST_LOGPROBS)))
