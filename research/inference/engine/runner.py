"""`Runner`: the device's side of an engine: its memory, and the programs that change it."""

import contextlib
import time
from collections.abc import Mapping
from collections.abc import Sequence as Listed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from layers.config import check
from layers.decoder import Decoder
from layers.stack import unstacked
from research.inference.engine.config import EngineConfig
from research.inference.engine.programs import Chunk, Echo, Programs, new_memory
from research.inference.engine.sequence import Sequence
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
    ):
        if mesh is not None:
            axes = {name: size for name, size in mesh.shape.items() if size > 1}
            check(set(axes) <= {"tensor"}, "mesh", axes, "an engine supports the axis tensor only")
        self.config, self._mesh = config, mesh
        self._vocab = model.config.vocab_size
        self._programs = programs = Programs(unstacked(model), compiled)
        self.waited = 0.0
        with self.on_mesh():
            new = jax.jit(lambda leaves: new_memory(programs.model(leaves), config))
            self._memory = new(programs.leaves)
            self._all_allowed = jnp.ones((config.slots, self._vocab), bool)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """The context in which the programs run."""
        return contextlib.nullcontext() if self._mesh is None else use_mesh(self._mesh)

    def warm_up(self, table_bn: np.ndarray | None) -> None:
        """Compile every program, in an engine without sequences."""
        chunk, zero = np.zeros(self.config.chunk, np.int32), np.int32(0)
        self._chunk(table_bn, Chunk(zero, chunk, chunk, zero, zero, np.bool_(False)))
        self._admit(0, SamplingConfig(), [0], 0)
        self.decode(table_bn, [])
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
            active_b[sequence.slot], forced_b[sequence.slot] = True, sequence.forced
        self._memory, sampled = self._programs.decode(
            self._programs.leaves, self._memory, table_bn, active_b, forced_b,
            self._allowed(decoding),
        )  # fmt: skip
        wants_top = any(sequence.request.sampling.logprobs for sequence in decoding)
        begin = time.perf_counter()
        token_b, logprob_b, *top = jax.device_get(sampled if wants_top else sampled[:2])
        self.waited += time.perf_counter() - begin
        choices = []
        for sequence in decoding:
            slot, count = sequence.slot, sequence.request.sampling.logprobs
            pairs = likeliest(top[0][slot], top[1][slot], count) if count else []
            choices.append(Choice(int(token_b[slot]), float(logprob_b[slot]), pairs))
        return choices

    def _allowed(self, decoding: Listed[Sequence]) -> Any:
        """The tokens that each slot may choose, bool ``[slots, v]``."""
        constrained = [s for s in decoding if s.matcher is not None and s.forced < 0]
        if not constrained:
            return self._all_allowed
        allowed_bv = np.ones(self._all_allowed.shape, bool)
        for sequence in constrained:
            allowed_bv[sequence.slot] = sequence.matcher.mask()
        return allowed_bv

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


def likeliest(ids: np.ndarray, logprobs: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The first ``count`` pairs of a token and its log-probability."""
    pairs = zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True)
    return [(token, logprob) for token, logprob in pairs if token >= 0]
