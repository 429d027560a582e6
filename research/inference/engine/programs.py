"""The compiled programs of an engine: each is compiled once, for fixed shapes.

- ``chunk``: ``chunk`` tokens of one slot's prompt;
- ``admit``: a slot's settings, and the token from which it goes on;
- ``decode``: one token in every slot;
- ``propose``: the draft model's next tokens in every slot;
- ``verify``: instead of ``decode``: the drafts of every slot that are accepted, and one more token;
- ``copy``: one slot's memory, and one page, for another sample of the same prompt;
- ``snapshot``: a slot's recurrent states;
- ``resume``: a slot after a shared prefix, with its recurrent states from a snapshot.

They take the model's leaves, not the model, whose flattening in Python would cost as much as a
small model's step. `Memory` is donated: a program writes into it in place.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.architecture import CACHED
from layers.decoder import Decoder, State
from layers.paged_cache import PagedCache
from layers.sharding import reshard
from layers.state import (
    CONTIGUOUS,
    can_rewind,
    cleared,
    copy_page,
    copy_row,
    put_row,
    rewind,
    rollback,
    take_row,
    with_table,
)
from pallas_kernels.mask import Mask
from research.inference.engine.config import EngineConfig
from research.inference.sampling import (
    MOST_LOGPROBS,
    Sampled,
    SamplingRows,
    logprobs_of,
    probabilities,
    sample,
    top_logprobs,
)
from research.inference.speculative import verify

ECHO_BLOCK = 16  # positions whose logits are in memory together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What an engine remembers on its device.

    ``states``: of the model, and of the draft model if there is one. ``token_b``, ``position_b``:
    the next input of each slot, and where it is.
    """

    states: tuple[State, ...]
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


def new_memory(models: Sequence[Decoder], config: EngineConfig) -> Memory:
    """The memory of an engine without sequences; ``models``: as in `Programs.models`."""
    draft_has_keys = not set(models[-1].config.pattern).isdisjoint(CACHED)
    caches = config.cache, config.cache if draft_has_keys else CONTIGUOUS
    return Memory(
        states=tuple(
            model.init_state(config.slots, config.max_length, cache)
            for model, cache in zip(models, caches, strict=False)
        ),
        rows=SamplingRows.empty(config.slots, models[0].config.vocab_size),
        token_b=jnp.zeros(config.slots, jnp.int32),
        position_b=jnp.zeros(config.slots, jnp.int32),
    )


class Drafts(NamedTuple):
    """The drafts of each slot in one step.

    ``tokens_bt``: int32 ``[slots, γ]``, −1 where the draft model chooses; ``count_b`` of them are
    used. ``last_b``: the known token after the drafts, which are known too, when a step is computed
    again; else −1.
    """

    tokens_bt: Any
    count_b: Any
    last_b: Any


class Accepted(NamedTuple):
    """The new tokens of each slot, ``[slots, γ + 1]``: ``accepted_b`` drafts and one more.

    The others are as in `research.inference.sampling.Sampled`.
    """

    accepted_b: jax.Array
    tokens_bt: jax.Array
    logprobs_bt: jax.Array
    top_ids_btk: jax.Array
    top_logprobs_btk: jax.Array


class Proposed(NamedTuple):
    """The drafts of each slot, and the law by which the draft model chose each, ``[slots, γ, v]``.

    ``fed_b``: how many tokens its state has had.
    """

    tokens_bt: jax.Array
    law_btv: jax.Array
    fed_b: jax.Array


def program_names(config: EngineConfig) -> tuple[str, ...]:
    """The programs that an engine of ``config`` runs."""
    sharing = ("snapshot", "resume") if config.prefix else ()
    return ("chunk", "admit", "decode", "copy", *sharing)


class Programs:
    """The programs of ``model`` with states of ``slots`` rows; all arguments are arrays.

    ``draft``: a model that drafts, or None. ``compiled``: name → a compiled program that is used in
    place of jit's.
    """

    def __init__(
        self,
        model: Decoder,
        compiled: Mapping[str, Any] | None = None,
        draft: Decoder | None = None,
    ):
        models = (model,) if draft is None else (model, draft)
        leaves, structure = jax.tree.flatten(models)
        self.leaves = tuple(leaves)
        self._structure = structure
        donated = functools.partial(jax.jit, donate_argnums=1)
        self.chunk, self.decode = donated(self._chunk), donated(self._decode)
        self.propose, self.verify = donated(self._propose), donated(self._verify)
        self.admit = jax.jit(_admit, donate_argnums=0)
        self.copy = jax.jit(_copy, donate_argnums=0)
        self.snapshot = jax.jit(_snapshot)
        self.resume = jax.jit(_resume, donate_argnums=0)
        for name, program in (compiled or {}).items():
            setattr(self, name, program)

    def models(self, leaves) -> tuple[Decoder, ...]:
        """The model, and the draft model if there is one, with ``leaves`` as their arrays."""
        return jax.tree.unflatten(self._structure, leaves)

    def _chunk(self, leaves, memory: Memory, table_bn, chunk: Chunk) -> tuple[Memory, Echo]:
        """The prompt of one slot continued; at ``start`` 0 the slot is cleared first."""
        models, t = self.models(leaves), chunk.tokens_t.shape[0]
        states = _with_table(memory, table_bn)
        old = take_row(states, chunk.slot)
        row = jax.tree.map(
            lambda empty, a: jnp.where(chunk.start == 0, empty, a), cleared(old), old
        )
        index_t = jnp.arange(t)
        positions_bt = jnp.where(index_t < chunk.count, chunk.start + index_t, -1)[None]
        runs = [
            _run(model, chunk.tokens_t[None], positions_bt, state)
            for model, state in zip(models, row, strict=True)
        ]
        echo = jax.lax.cond(
            chunk.echo,
            lambda x_td: _echo(models[0], x_td, chunk.targets_t),
            lambda x_td: _no_echo(t),
            runs[0][0][0],
        )
        states = put_row(states, chunk.slot, tuple(state for _, state in runs))
        return dataclasses.replace(memory, states=states), echo

    def _decode(
        self, leaves, memory: Memory, table_bn, active_b, forced_b, allowed_bv
    ) -> tuple[Memory, Sampled]:
        """One more token in each active slot: ``forced_b`` if that is not −1, else a sample."""
        (model,) = self.models(leaves)
        (state,) = _with_table(memory, table_bn)
        position_b = jnp.where(active_b, memory.position_b, -1)
        out = model(memory.token_b[:, None], position_b[:, None], state=state)
        assert out.state is not None
        logits_bv = reshard(out.logits_btv[:, 0], None, None)
        sampled = sample(logits_bv, position_b + 1, memory.rows, allowed_bv)
        token_b = jnp.where(forced_b >= 0, forced_b, sampled.token_b)
        memory = Memory(
            states=(out.state,),
            rows=memory.rows.counted(token_b, active_b),
            token_b=jnp.where(active_b, token_b, memory.token_b),
            position_b=memory.position_b + active_b,
        )
        return memory, sampled

    def _propose(
        self, leaves, memory: Memory, table_bn, active_b, drafts: Drafts
    ) -> tuple[Memory, Proposed]:
        """The drafts of active slots, and the law by which the draft model chose each.

        Its state has had all drafts afterwards, also the last one; if it does not support `rewind`,
        it is as before.
        """
        draft, (state, old) = self.models(leaves)[1], _with_table(memory, table_bn)
        slots, most = drafts.tokens_bt.shape
        given_bt = jnp.concatenate((drafts.tokens_bt, jnp.zeros((slots, 1), jnp.int32)), axis=1)

        def step(i, carry):
            new, rows, token_b, tokens_bt, law_btv = carry
            position_b = jnp.where(active_b & (i <= drafts.count_b), memory.position_b + i, -1)
            out = draft(token_b[:, None], position_b[:, None], state=new)
            logits_bv = reshard(out.logits_btv[:, 0], None, None)
            token_b = sample(logits_bv, position_b + 1, rows).token_b
            law_btv = law_btv.at[:, i].set(probabilities(logits_bv, rows))
            token_b = jnp.where(given_bt[:, i] >= 0, given_bt[:, i], token_b)
            rows = rows.counted(token_b, position_b >= 0)
            return out.state, rows, token_b, tokens_bt.at[:, i].set(token_b), law_btv

        nothing = jnp.zeros((slots, most + 1, memory.rows.counts_bv.shape[1]))
        carry = old, memory.rows, memory.token_b, given_bt, nothing
        new, _, _, tokens_bt, law_btv = jax.lax.fori_loop(0, most + 1, step, carry)
        fed_b = jnp.where(active_b, drafts.count_b + 1, 0)
        memory = dataclasses.replace(memory, states=(state, _before_or_after(new, old, fed_b)))
        return memory, Proposed(tokens_bt[:, :most], law_btv[:, :most], fed_b)

    def _verify(
        self,
        leaves,
        memory: Memory,
        table_bn,
        active_b,
        drafts: Drafts,
        proposed: Proposed | None,
        allowed_btv,
    ) -> tuple[Memory, Accepted]:
        """The drafts of each active slot that are accepted, and one more token.

        The model computes ``[slots, γ + 1]`` tokens: the next input and the drafts. Then it forgets
        the drafts that are not accepted: by `rewind`, or if a layer does not support that, by a
        second pass with only the accepted ones.
        """
        models, states = self.models(leaves), _with_table(memory, table_bn)
        drafts_bt = drafts.tokens_bt
        if proposed is not None:
            drafts_bt = jnp.where(drafts_bt >= 0, drafts_bt, proposed.tokens_bt)
        inputs_bt = jnp.concatenate((memory.token_b[:, None], jnp.maximum(drafts_bt, 0)), axis=1)
        index_t = jnp.arange(inputs_bt.shape[1])
        is_fed_bt = active_b[:, None] & (index_t <= drafts.count_b[:, None])
        positions_bt = jnp.where(is_fed_bt, memory.position_b[:, None] + index_t, -1)
        out = models[0](inputs_bt, positions_bt, state=states[0])
        assert out.state is not None
        logits_btv = reshard(out.logits_btv, None, None, None)
        verified = verify(
            logits_btv,
            inputs_bt[:, 1:],
            None if proposed is None else proposed.law_btv,
            memory.position_b + 1,
            memory.rows,
            count_b=drafts.count_b,
            allowed_btv=allowed_btv,
        )
        is_known_b = drafts.last_b >= 0
        accepted_b = jnp.where(is_known_b, drafts.count_b, verified.accepted_b)
        token_b = jnp.where(is_known_b, drafts.last_b, verified.token_b)
        shifted_bt = jnp.pad(inputs_bt[:, 1:], ((0, 0), (0, 1)))
        tokens_bt = jnp.where(index_t < accepted_b[:, None], shifted_bt, token_b[:, None])

        kept_b = jnp.where(active_b, accepted_b + 1, 0)
        fed_b = jnp.sum(is_fed_bt, axis=1, dtype=jnp.int32)
        after = [(_before_or_after(out.state, states[0], fed_b), fed_b)]
        if proposed is not None:
            after.append((states[1], proposed.fed_b))
        memory = Memory(
            states=tuple(
                _keep(model, state, fed_b, inputs_bt, positions_bt, kept_b)
                for model, (state, fed_b) in zip(models, after, strict=True)
            ),
            rows=memory.rows.counted(tokens_bt, index_t < kept_b[:, None]),
            token_b=jnp.where(active_b, token_b, memory.token_b),
            position_b=memory.position_b + kept_b,
        )
        of_tokens = logprobs_of(logits_btv, tokens_bt, memory.rows)
        return memory, Accepted(accepted_b, tokens_bt, *of_tokens)


def _with_table(memory: Memory, table_bn) -> tuple[State, ...]:
    """The states with the present table of pages, if they have any."""
    return memory.states if table_bn is None else with_table(memory.states, table_bn)


def _run(model: Decoder, tokens_bt, positions_bt, state: State) -> tuple[jax.Array, State]:
    """The residual ``[b, t, d]`` after these tokens, and the state after them."""
    x_btd = model.embed(tokens_bt, positions_bt)
    x_btd, run = model.run_layers(x_btd, Mask.of_tokens(positions_bt), state=state)
    assert run.state is not None
    return x_btd, run.state


def _before_or_after(new: State, old: State, fed_b: jax.Array) -> State:
    """``new``, ``fed_b`` tokens after ``old``; without these if a layer cannot `rewind`."""
    return new if can_rewind(new) else rollback(new, old, fed_b)


def _keep(model: Decoder, state: State, fed_b, tokens_bt, positions_bt, kept_b) -> State:
    """The state after the first ``kept_b`` of ``tokens_bt``; ``state``: from `_before_or_after`."""
    if can_rewind(state):
        return rewind(state, fed_b - kept_b)
    is_kept_bt = jnp.arange(tokens_bt.shape[1]) < kept_b[:, None]
    return _run(model, tokens_bt, jnp.where(is_kept_bt, positions_bt, -1), state)[1]


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
    states = copy_row(memory.states, source, target)
    return dataclasses.replace(memory, states=copy_page(states, source_page, target_page))


def _snapshot(memory: Memory, slot) -> Any:
    """The recurrent states of a slot: those that are not in pages."""
    return _without_pages(take_row(memory.states, slot))


def _resume(memory: Memory, slot, snapshot, count) -> Memory:
    """A slot with ``count`` tokens in the pages of its table, and the states of ``snapshot``."""
    row = take_row(memory.states, slot)

    def of_layer(state, kept):
        if isinstance(state, PagedCache):
            return dataclasses.replace(state, written_b=jnp.full_like(state.written_b, count))
        return kept

    row = jax.tree.map(of_layer, row, snapshot, is_leaf=_is_paged)
    return dataclasses.replace(memory, states=put_row(memory.states, slot, row))


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
