"""An engine without a model, and a server in a thread: for what surrounds an engine."""

import contextlib
import dataclasses
import threading
import time
from types import SimpleNamespace

from layers.config import check
from research.inference import TextStream
from research.inference.engine import Event, QueueFull, Request, Result, Sample
from research.inference.server import Server, ServerConfig


@dataclasses.dataclass
class Running:
    id: int
    index: int
    request: Request
    tokens: list[int]
    text: TextStream


class FakeEngine:
    """Answers each sample with ``reply(request, index)``, one token of every sample in a step.

    ``seconds`` of a step; ``steps`` is a lock that a test can hold to stop the engine in a step.
    """

    def __init__(self, tokenizer, reply, *, slots=4, max_length=256, queue=4, vocab_size=300):
        self.config = SimpleNamespace(slots=slots, max_length=max_length, queue=queue)
        self.model_config = SimpleNamespace(vocab_size=vocab_size)
        self.stats = SimpleNamespace(
            steps=0, seconds=0.0, prefilled=0, shared=0, generated=0, preemptions=0
        )
        self.tokenizer, self.reply, self.pages = tokenizer, reply, None
        self.seconds, self.steps, self.fault = 0.0, threading.Lock(), None
        self.samples: list[Running] = []
        self.requests: list[Request] = []  # that were added
        self.cancelled: list[tuple[int, int]] = []  # ids, and the step after which
        self._results: dict[int, Result] = {}

    def add(self, request):
        # one request for each sample above the slots waits
        waiting = len({s.id for s in self.samples[self.config.slots :]})
        if waiting >= self.config.queue:
            raise QueueFull(f"queue={self.config.queue}: as many requests wait")
        check(-1 not in request.tokens, "tokens", -1, "refused by the engine")
        identity = len(self.requests)
        self.requests.append(request)
        for index in range(request.n):
            tokens = list(self.reply(request, index))[: request.sampling.max_new_tokens]
            self.samples.append(
                Running(identity, index, request, tokens, TextStream(self.tokenizer))
            )
        self._results[identity] = Result([Sample() for _ in range(request.n)])
        if request.echo:
            count = len(request.tokens)
            self._results[identity].prompt_logprobs = [None, *[-0.5] * (count - 1)]
            self._results[identity].prompt_top = [[], *[[(7, -0.25)]] * (count - 1)]
        return identity

    def result(self, identity):
        return self._results[identity]

    def cancel(self, identity):
        self.cancelled.append((identity, self.stats.steps))
        self.samples = [s for s in self.samples if s.id != identity]

    @property
    def has_work(self):
        return bool(self.samples)

    @property
    def running(self):
        return min(len(self.samples), self.config.slots)

    @property
    def waiting(self):
        return len(self.samples) - self.running

    def step(self):
        with self.steps:
            time.sleep(self.seconds)
        if self.fault:
            raise self.fault
        self.stats.steps += 1
        events = []
        for sample in self.samples[: self.config.slots]:
            token = sample.tokens.pop(0) if sample.tokens else None
            stops = token is not None and token in sample.request.sampling.stop_tokens
            text = "" if stops or token is None else sample.text.push(token)
            reason = None
            if stops or not sample.tokens:
                reason, text = "stop" if stops else "length", text + sample.text.flush()
                self.samples.remove(sample)
            top = [(token, -0.5), (7, -1.0)] if sample.request.sampling.logprobs else []
            events.append(Event(sample.id, sample.index, token, text, -0.5, top, reason))
            self.stats.generated += token is not None
        return events


@contextlib.contextmanager
def serving(engine, tokenizer, **config):
    """A running server; its address is ``server.address``. It is drained at the end."""
    server = Server(ServerConfig("small", port=0, **config))
    ready = threading.Event()
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(server.run(engine, tokenizer, lambda _: ready.set()))
    )
    thread.start()
    try:
        assert ready.wait(30)
        server.thread, server.codes = thread, codes
        yield server
    finally:
        server.drain()
        thread.join(30)
        assert not thread.is_alive()
