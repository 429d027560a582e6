"""`Engine`: continuous batching (Yu 2022, Orca) over slots of fixed shape.

Each step admits waiting sequences to free slots, computes one chunk of one prompt, and decodes one
token, or with speculation several, in every slot whose prompt is complete. So a long prompt delays
the others by one chunk, and a sequence that ends makes room at once.

A sequence's tokens are, bit for bit, those that it has alone in the same engine: a row's results do
not depend on other rows, its chunks begin at multiples of ``chunk``, and random numbers are keyed
by (seed, index of the sample, position). A sequence that loses its pages to older ones is computed
again by the same programs: its prompt in chunks, then its tokens one by one, or with speculation in
the same steps as before, as drafts that are accepted.
"""

import collections
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from layers.config import ConfigError, check
from layers.decoder import Decoder
from research.inference.engine import prefixes
from research.inference.engine.allocator import Allocator
from research.inference.engine.config import EngineConfig
from research.inference.engine.pages import Pages
from research.inference.engine.programs import Echo
from research.inference.engine.request import Event, QueueFull, Request, Result, Sample
from research.inference.engine.runner import Choice, Runner, likeliest
from research.inference.engine.sequence import Sequence
from research.inference.engine.speculation import Speculative
from research.inference.engine.stats import Stats
from research.inference.grammar import compile_grammar
from research.inference.text import TextStream


class Engine:
    """Serves many requests with one model. Not thread-safe: one thread calls it.

    ``tokenizer``: is required by stop strings and grammars. ``compiled``: programs of this model,
    configuration and mesh, from `research.inference.engine.compiled.load_programs`; None: `warm_up`
    compiles them. ``speculative``: what drafts, so that a step may yield several tokens a sample.

    Raises:
      ConfigError: the engine cannot serve the model, or ``speculative`` cannot draft for it.
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig,
        *,
        tokenizer: Any = None,
        mesh: Mesh | None = None,
        compiled: Mapping[str, Any] | None = None,
        speculative: Speculative | None = None,
    ):
        config.check_model(model.config)
        if speculative is not None:
            speculative.check_model(model.config, config)
            names = list(compiled or ())
            check(not names, "compiled", names, "does not support speculative")
        self.model_config, self.config, self.tokenizer = model.config, config, tokenizer
        most = 0 if speculative is None else speculative.tokens
        self.stats = Stats(proposed_at=[0] * most, accepted_at=[0] * most)
        self._speculative = speculative
        self._runner = Runner(model, config, mesh, compiled, speculative)
        self._allocator = Allocator(config)
        self._next_id = 0
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._running: list[Sequence] = []  # in order of admission
        self._results: dict[int, Result] = {}  # of the requests that are not finished
        self._events: list[Event] = []

    def warm_up(self) -> None:
        """Compile every program; later steps compile nothing.

        Raises:
          ConfigError: requests wait or run.
        """
        check(not self.has_work, "warm_up", self.waiting + self.running, "requires an idle engine")
        with self._runner.on_mesh():
            self._runner.warm_up(self._allocator.table())

    # requests

    def add(self, request: Request) -> int:
        """Queue ``request``; its id in the events.

        Raises:
          ConfigError: the request does not fit the model or the engine.
          QueueFull: as many requests wait as ``config.queue`` allows.
        """
        self.check(request)
        limit = self.config.queue
        waiting = len({sequence.request_id for sequence in self._waiting})
        if limit is not None and waiting >= limit:
            raise QueueFull(f"queue={limit}: as many requests wait")
        prompt = [int(token) for token in request.tokens]
        request_id, self._next_id = self._next_id, self._next_id + 1
        keys = []
        if self.config.prefix:
            root = prefixes.root("", "", request.salt)
            keys = prefixes.chain(root, prompt[:-1], self.config.chunk)
        for index in range(request.n):
            stream, matcher = self._stream(request), self._matcher(request)
            self._waiting.append(
                Sequence(request_id, index, request, prompt, stream, matcher, keys)
            )
        self._results[request_id] = Result([Sample() for _ in range(request.n)])
        return request_id

    def check(self, request: Request) -> None:
        """Raise `ConfigError` if this engine cannot serve ``request``; nothing is queued."""
        config, sampling = self.config, request.sampling
        request.check_tokens(self.model_config.vocab_size)
        total, new = len(request.tokens) + sampling.max_new_tokens, sampling.max_new_tokens
        check(total <= config.max_length, "tokens", f"{len(request.tokens)} tokens",
              f"with max_new_tokens={new} exceed max_length={config.max_length}")  # fmt: skip
        if (pool := self._allocator.pages) is not None:
            check(pool.needed(total) <= pool.count, "tokens", f"{len(request.tokens)} tokens",
                  f"with max_new_tokens={new} exceed all {pool.count} pages")  # fmt: skip
        for name, value in (("stop", request.stop), ("grammar", request.grammar)):
            check(not value or self.tokenizer is not None, name, value, "requires a tokenizer")

    def cancel(self, request_id: int) -> None:
        """End a request and free its memory; nothing happens if it has ended."""
        for sequence in [s for s in self._waiting if s.request_id == request_id]:
            self._waiting.remove(sequence)
            self._end(sequence, "cancelled")
        for sequence in [s for s in self._running if s.request_id == request_id]:
            self._end(sequence, "cancelled")

    def result(self, request_id: int) -> Result:
        """What a request that has not ended has so far; later steps add to it."""
        return self._results[request_id]

    @property
    def pages(self) -> Pages | None:
        """The pool of pages, or None if the cache has none."""
        return self._allocator.pages

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running or self._events)

    @property
    def waiting(self) -> int:
        """The number of samples that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of samples that have a slot."""
        return len(self._running)

    @property
    def occupancy(self) -> tuple[int, int]:
        """Tokens in the caches of the running samples, and the room that is allocated for them.

        A page that several samples share counts once in both.
        """
        return self._allocator.occupancy(self._running)

    def run(self, requests: Iterable[Request]) -> list[Result]:
        """The results of ``requests``, in their order.

        Raises:
          ConfigError, QueueFull: `add` refuses one of them; none is computed.
        """
        ids: list[int] = []
        try:
            for request in requests:
                ids.append(self.add(request))
        except ConfigError:
            for request_id in ids:
                self.cancel(request_id)
            raise
        results = {request_id: self._results[request_id] for request_id in ids}
        while not all(result.is_finished for result in results.values()):
            self.step()
        return [results[request_id] for request_id in ids]

    def stream(self) -> Iterator[Event]:
        """The events of all requests, until none is left; ``add`` and ``cancel`` meanwhile."""
        while self.has_work:
            yield from self.step()

    def _stream(self, request: Request) -> Any:
        return None if self.tokenizer is None else TextStream(self.tokenizer, request.stop)

    def _matcher(self, request: Request) -> Any:
        grammar, vocab_size = request.grammar, self.model_config.vocab_size
        return None if grammar is None else compile_grammar(grammar, self.tokenizer, vocab_size)

    @property
    def waited(self) -> float:
        """Seconds in which the device's results were waited for; the rest is the scheduler's."""
        return self._runner.waited

    # the loop

    def step(self) -> list[Event]:
        """Admit, compute one chunk, decode one token in every slot; what happened."""
        begin = time.perf_counter()
        with self._runner.on_mesh():
            self._admit()
            self._prefill()
            self._decode()
        self.stats.steps += 1
        self.stats.seconds += time.perf_counter() - begin
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        """Give slots and pages to waiting sequences, in order; the first that must wait ends it."""
        while self._waiting:
            sequence = self._waiting[0]
            leader = self._leader(sequence)
            if leader is not None and not leader.is_decoding:
                return  # it will share the memory that is being computed
            shared = self._allocator.admit(sequence)
            if shared is None:
                return
            self._waiting.popleft()
            self._running.append(sequence)
            if shared:
                self._resume(sequence, shared)
                if sequence.prefilled == sequence.to_prefill:
                    self._begin_decoding(sequence)

    def _leader(self, sequence: Sequence) -> Sequence | None:
        """The running first sample of the same request, if this one has generated nothing."""
        if sequence.index == 0 or sequence.tokens:
            return None
        same = (s for s in self._running if s.request_id == sequence.request_id and s.index == 0)
        return next(same, None)

    def _resume(self, sequence: Sequence, shared: list[prefixes.Prefix]) -> None:
        assert sequence.slot is not None
        self.stats.shared += sequence.prefilled
        self._runner.resume(sequence.slot, shared[-1].snapshot, sequence.prefilled)

    def _prefill(self) -> None:
        """Compute the next chunk of the first sequence whose prompt is not complete."""
        sequence = next((s for s in self._running if not s.is_decoding), None)
        if sequence is None:
            return
        size, start = self.config.chunk, sequence.prefilled
        count = min(size, sequence.to_prefill - start)
        wants_echo = sequence.request.echo and sequence.index == 0
        table_bn = self._allocator.table()
        echo = self._runner.prefill(table_bn, sequence, count, echo=wants_echo)
        sequence.prefilled += count
        self.stats.prefilled += count
        if wants_echo:
            self._record(sequence, start, count, echo)
        if count == size:
            self._keep(sequence, start // size)
        if sequence.prefilled == sequence.to_prefill:
            self._begin_decoding(sequence)

    def _record(self, sequence: Sequence, start: int, count: int, echo: Echo) -> None:
        """Append the log-probabilities of the tokens after positions ``start … start + count``."""
        result = self._results[sequence.request_id]
        if start + 1 < len(result.prompt_logprobs):
            return  # computed before a preemption
        if not result.prompt_logprobs:
            result.prompt_logprobs, result.prompt_top = [None], [[]]
        most = sequence.request.sampling.logprobs or 0
        logprob_t, ids_tk, logprobs_tk = jax.device_get(echo)
        result.prompt_logprobs += logprob_t[:count].tolist()
        for i in range(count):
            result.prompt_top.append(likeliest(ids_tk[i], logprobs_tk[i], most))

    def _keep(self, sequence: Sequence, index: int) -> None:
        """Keep chunk ``index`` of the prompt for later prompts, if prefixes are shared."""
        kept = self._allocator.prefixes
        if kept is None or sequence.keys[index] in kept:
            return
        assert sequence.slot is not None
        snapshot = self._runner.snapshot(sequence.slot)
        size = sum(a.nbytes for a in jax.tree.leaves(snapshot))
        pages = self._allocator.pages
        per_chunk = 0 if pages is None else self.config.chunk // pages.size
        first = index * per_chunk
        parent = sequence.keys[index - 1] if index else None
        of_chunk = sequence.pages[first : first + per_chunk]
        kept.keep(sequence.keys[index], parent, of_chunk, snapshot, size)

    def _begin_decoding(self, sequence: Sequence) -> None:
        """The prompt is complete: decode from its last token, and share it with other samples."""
        self._runner.begin_decoding(sequence)
        sequence.is_decoding = True
        followers = [
            s for s in self._waiting
            if s.request_id == sequence.request_id and not s.tokens and sequence.index == 0
        ]  # fmt: skip
        for follower in followers:
            copied = self._allocator.fork(sequence, follower)
            if copied is None:
                break
            assert sequence.slot is not None and follower.slot is not None
            self._runner.copy(sequence.slot, follower.slot, copied)
            self._waiting.remove(follower)
            self._running.append(follower)
            self._runner.begin_decoding(follower)
            follower.is_decoding = True
        for first in (sequence, *followers):
            if first.is_decoding and first.request.sampling.max_new_tokens == 0:
                self._end(first, "length")

    def _decode(self) -> None:
        """New tokens for every sequence whose prompt is complete: one, or accepted drafts too."""
        planned: list[tuple[Sequence, list[int]]] = []
        for sequence in list(self._running):
            if sequence.is_decoding:
                made = [] if self._speculative is None else self._speculative.drafts(sequence)
                while sequence.is_decoding and not self._allocator.grow(sequence, 1 + len(made)):
                    self._preempt(self._running[-1])
                planned.append((sequence, made))
        decoding = [sequence for sequence, _ in planned if sequence.is_decoding]
        drafts = [made for sequence, made in planned if sequence.is_decoding]
        if not decoding:
            return
        table_bn = self._allocator.table()
        if self._speculative is None:
            chosen = [[choice] for choice in self._runner.decode(table_bn, decoding)]
        else:
            chosen = self._runner.verify(table_bn, decoding, drafts)
        for sequence, made, choices in zip(decoding, drafts, chosen, strict=True):
            if sequence.known:
                self.stats.replayed += len(choices)
                sequence.decoded += len(choices)
            else:
                self.stats.passes += 1
                for i in range(len(made)):
                    self.stats.proposed_at[i] += 1
                self._take(sequence, choices)

    def _take(self, sequence: Sequence, choices: list[Choice]) -> None:
        """Add new tokens to ``sequence``, and end it if one of them is its last."""
        for i, choice in enumerate(choices):
            if math.isnan(choice.logprob):
                self._end(sequence, "nan")
                return
            if i < len(choices) - 1:
                self.stats.accepted_at[i] += 1
            text, reason = self._append(sequence, choice.token)
            if reason is not None:
                self._end(sequence, reason, choice, text)
                return
            identity = (sequence.request_id, sequence.index)
            self._emit(Event(*identity, choice.token, text, *choice[1:], None))
        sequence.decoded = len(sequence.tokens)
        sequence.ends.append(sequence.decoded)

    def _append(self, sequence: Sequence, token: int) -> tuple[str, str | None]:
        """Append ``token``: the text that can be shown now, and why the sequence ends, or None."""
        sampling = sequence.request.sampling
        sequence.tokens.append(token)
        if sequence.ngrams is not None:
            sequence.ngrams.extend([token])
        self.stats.generated += 1
        text, reason, matcher = "", None, sequence.matcher
        if matcher is not None and matcher.error:
            reason = "error"  # met by drafts
        elif token in sampling.stop_tokens:
            reason = "stop"
        else:
            if matcher is not None:
                matcher.accept(token)
                reason = "error" if matcher.error else "stop" if matcher.is_done else None
            if sequence.stream is not None:
                text = sequence.stream.push(token)
                reason = "stop" if sequence.stream.stopped is not None else reason
        if reason is None and sequence.remaining == 0:
            reason = "length"
        return text, reason

    def _end(
        self, sequence: Sequence, reason: str, last: Choice | None = None, text: str = ""
    ) -> None:
        """Free the memory of ``sequence`` and say why it ended, with its ``last`` token if new."""
        if sequence.slot is not None:
            self._allocator.release(sequence)
            self._running.remove(sequence)
        if sequence.stream is not None:
            text += sequence.stream.flush()
        token, logprob, top = (None, 0.0, []) if last is None else last
        identity = (sequence.request_id, sequence.index)
        self._emit(Event(*identity, token, text, logprob, top, reason))

    def _emit(self, event: Event) -> None:
        result = self._results[event.request]
        result.add(event)
        if result.is_finished:
            del self._results[event.request]
        self._events.append(event)

    def _preempt(self, sequence: Sequence) -> None:
        """Take the memory of ``sequence``, which is computed again when there is room."""
        self._allocator.release(sequence)
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)
        self.stats.preemptions += 1
