"""`Runner`: the device's side of an engine: its memory, and the programs that change it."""

import contextlib
import time
from collections.abc import Mapping
from collections.abc import Sequence as Listed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layers.config import check
from layers.decoder import Decoder
from layers.outputs_first import for_decoding
from research.inference.engine.config import EngineConfig
from research.inference.engine.programs import (
    Chunk,
    Drafts,
    Echo,
    Programs,
    new_memory,
    program_names,
)
from research.inference.engine.sequence import Sequence
from research.inference.engine.speculation import BY_MODEL, Speculative
from research.inference.sampling import SamplingConfig, SamplingRows
from research.parallel.rules import use_mesh


class Choice(NamedTuple):
    """The token that a step chose for a sequence, its log-probability, and the likeliest tokens."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Runner:
    """Runs the programs of one model. Tables of pages come from the `Allocator` with each call.

    ``waited``: seconds in which results of the device were waited for.
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig,
        mesh: Mesh | None,
        compiled: Mapping[str, Any] | None = None,
        speculative: Speculative | None = None,
    ):
        if mesh is not None:
            axes = {name: size for name, size in mesh.shape.items() if size > 1}
            check(set(axes) <= {"tensor"}, "mesh", axes, "an engine supports the axis tensor only")
        if compiled is not None:
            names = sorted(program_names(config))
            check(sorted(compiled) == names, "compiled", sorted(compiled), f"must hold {names}")
        self.config, self._mesh, self._speculative = config, mesh, speculative
        self._vocab = model.config.vocab_size
        draft = None if speculative is None else speculative.draft
        self._has_draft = draft is not None
        self.waited = 0.0
        with self.on_mesh():
            self._programs = programs = Programs(
                for_decoding(model), compiled, None if draft is None else for_decoding(draft)
            )
            new = jax.jit(lambda leaves: new_memory(programs.models(leaves), config))
            self._memory = new(programs.leaves)
            inputs = () if speculative is None else (speculative.tokens + 1,)
            self._all_allowed = self._placed(np.ones((config.slots, *inputs, self._vocab), bool))

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """The context in which the programs run."""
        return contextlib.nullcontext() if self._mesh is None else use_mesh(self._mesh)

    def warm_up(self, table_bn: np.ndarray | None) -> None:
        """Compile every program, in an engine without sequences."""
        chunk, zero = np.zeros(self.config.chunk, np.int32), np.int32(0)
        self._chunk(table_bn, Chunk(zero, chunk, chunk, zero, zero, np.bool_(False)))
        self._admit(0, SamplingConfig(), [0], 0)
        if self._speculative is None:
            self.decode(table_bn, [])
        else:
            self.verify(table_bn, [], [])
        self.copy(0, 0, (0, 0))
        if self.config.prefix:
            self.resume(0, self.snapshot(0), 0)
        jax.block_until_ready(self._memory)

    def prefill(
        self, table_bn: np.ndarray | None, sequence: Sequence, count: int, *, echo: bool
    ) -> Echo:
        """Compute the next ``count`` tokens of a prompt; the log-probabilities of those after."""
        start, prompt, size = sequence.prefilled, sequence.prompt, self.config.chunk
        tokens, targets = np.zeros(size, np.int32), np.zeros(size, np.int32)
        tokens[:count] = prompt[start : start + count]
        targets[:count] = prompt[start + 1 : start + 1 + count]
        where = (np.int32(start), np.int32(count), np.bool_(echo))
        return self._chunk(table_bn, Chunk(np.int32(sequence.slot or 0), tokens, targets, *where))

    def _chunk(self, table_bn: np.ndarray | None, chunk: Chunk) -> Echo:
        program, leaves = self._programs.chunk, self._programs.leaves
        self._memory, echo = program(leaves, self._memory, table_bn, chunk)
        return echo

    def begin_decoding(self, sequence: Sequence) -> None:
        """Let a sequence's slot go on from the last token of its prompt."""
        assert sequence.slot is not None
        sampling = sequence.request.sampling
        self._admit(sequence.slot, sampling, sequence.prompt, sequence.index)

    def _admit(self, slot: int, sampling: SamplingConfig, prompt: list[int], index: int) -> None:
        row = SamplingRows.of(sampling, self._vocab, prompt, index)
        token, position = np.int32(prompt[-1]), np.int32(len(prompt) - 1)
        self._memory = self._programs.admit(self._memory, np.int32(slot), row, token, position)

    def decode(self, table_bn: np.ndarray | None, decoding: Listed[Sequence]) -> list[Choice]:
        """One more token for each of ``decoding``."""
        slots = self.config.slots
        active_b, forced_b = np.zeros(slots, bool), np.full(slots, -1, np.int32)
        for sequence in decoding:
            active_b[sequence.slot] = True
            forced_b[sequence.slot] = next(iter(sequence.known), -1)
        allowed_bv = self._all_allowed
        constrained = [s for s in decoding if s.matcher is not None and not s.known]
        if constrained:
            allowed_bv = np.ones(allowed_bv.shape, bool)
            for sequence in constrained:
                allowed_bv[sequence.slot] = sequence.matcher.mask()
            allowed_bv = self._placed(allowed_bv)
        self._memory, sampled = self._programs.decode(
            self._programs.leaves, self._memory, table_bn, active_b, forced_b, allowed_bv
        )
        fetched = self._fetch(sampled, decoding)
        return [_choice(fetched, sequence, (sequence.slot,)) for sequence in decoding]

    def verify(
        self, table_bn: np.ndarray | None, decoding: Listed[Sequence], drafts: Listed[list[int]]
    ) -> list[list[Choice]]:
        """The accepted ``drafts`` of each of ``decoding``, and one more token.

        The draft model chooses those that are `BY_MODEL`.
        """
        assert self._speculative is not None
        slots, most = self.config.slots, self._speculative.tokens
        active_b = np.zeros(slots, bool)
        step = Drafts(
            np.full((slots, most), BY_MODEL, np.int32),
            np.zeros(slots, np.int32),
            np.full(slots, -1, np.int32),
        )
        for sequence, tokens in zip(decoding, drafts, strict=True):
            slot = sequence.slot
            active_b[slot], step.count_b[slot] = True, len(tokens)
            step.tokens_bt[slot, : len(tokens)] = tokens
            if sequence.known:
                step.last_b[slot] = sequence.known[-1]
        arguments, proposed = (table_bn, active_b), None
        if self._has_draft:
            self._memory, proposed = self._programs.propose(
                self._programs.leaves, self._memory, *arguments, step
            )
        allowed_btv = self._all_allowed
        constrained = [s for s in decoding if s.matcher is not None and not s.known]
        if constrained:
            tokens_bt = step.tokens_bt if proposed is None else jax.device_get(proposed.tokens_bt)
            allowed_btv = np.ones(allowed_btv.shape, bool)
            for sequence in constrained:
                slot, count = sequence.slot, step.count_b[sequence.slot]
                masks_tv = sequence.matcher.masks(tokens_bt[slot, :count].tolist())
                allowed_btv[slot, : count + 1] = masks_tv
            allowed_btv = self._placed(allowed_btv)
        self._memory, accepted = self._programs.verify(
            self._programs.leaves, self._memory, *arguments, step, proposed, allowed_btv
        )
        accepted_b, *of_tokens = self._fetch(accepted, decoding)
        return [
            [
                _choice(of_tokens, sequence, (sequence.slot, i))
                for i in range(accepted_b[sequence.slot] + 1)
            ]
            for sequence in decoding
        ]

    def _placed(self, allowed: np.ndarray) -> jax.Array:
        """``allowed`` on the devices, always in the same way: another would be another program."""
        if self._mesh is None:
            return jnp.asarray(allowed)
        return jax.device_put(allowed, NamedSharding(self._mesh, PartitionSpec()))

    def _fetch(self, results: Any, decoding: Listed[Sequence]) -> list[np.ndarray]:
        """``results`` from the device; the last two, of the likeliest tokens, if asked for."""
        wants_top = any(sequence.request.sampling.logprobs for sequence in decoding)
        begin = time.perf_counter()
        fetched = jax.device_get(tuple(results) if wants_top else tuple(results[:-2]))
        self.waited += time.perf_counter() - begin
        return list(fetched)

    def copy(self, source: int, target: int, page: tuple[int, int]) -> None:
        """Copy what a slot remembers to another slot, and a page to another page."""
        where = (np.int32(i) for i in (source, target, *page))
        self._memory = self._programs.copy(self._memory, *where)

    def snapshot(self, slot: int) -> Any:
        """The states of a slot that are not in pages."""
        return self._programs.snapshot(self._memory, np.int32(slot))

    def resume(self, slot: int, snapshot: Any, count: int) -> None:
        """Let a slot go on after ``count`` tokens, which are in its pages and in ``snapshot``."""
        program, where = self._programs.resume, np.int32(slot)
        self._memory = program(self._memory, where, snapshot, np.int32(count))


def _choice(fetched: list[np.ndarray], sequence: Sequence, at: tuple) -> Choice:
    """The choice at an index of tokens, their log-probabilities, and the likeliest tokens."""
    token, logprob, *top = fetched
    count = sequence.request.sampling.logprobs
    pairs = likeliest(top[0][at], top[1][at], count) if count else []
    return Choice(int(token[at]), float(logprob[at]), pairs)


def likeliest(ids: np.ndarray, logprobs: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The first ``count`` pairs of a token and its log-probability."""
    pairs = zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True)
    return [(token, logprob) for token, logprob in pairs if token >= 0]
