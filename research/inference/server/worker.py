"""The thread that owns the engine; the event loop sends it requests and gets events back."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence

from layers.config import ConfigError
from research.inference.engine import Engine, Event, QueueFull, Request, Result


class EngineFailed(RuntimeError):
    """The engine raised an error in a step; it serves nothing more."""


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Of each token of prompt ``prompt``, with the likeliest in its place; None for the first."""

    prompt: int
    logprobs: Sequence[float | None]
    top: Sequence[Sequence[tuple[int, float]]]


class Job:
    """The engine's requests of one call. Its methods run in the event loop.

    ``events`` yields what the engine reports: an `Event` whose ``request`` is the index of the
    prompt, or `PromptLogprobs` before a prompt's first event.
    """

    def __init__(self, requests: Sequence[Request]):
        self.requests = tuple(requests)
        self.ids: list[int] = []  # only the worker's thread reads and writes it
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_over = False
        self._left = sum(request.n for request in requests)
        self._arrived: asyncio.Queue[Event | PromptLogprobs | Exception] = asyncio.Queue()

    def admit(self) -> None:
        """The engine has queued all requests."""
        if not self.admitted.done():
            self.admitted.set_result(None)

    def receive(self, items: Sequence[Event | PromptLogprobs | Exception]) -> None:
        for item in items:
            self._arrived.put_nowait(item)

    async def events(self) -> AsyncIterator[Event | PromptLogprobs]:
        """Until all samples have ended; raises what `fail` was given."""
        while self._left:
            item = await self._arrived.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Event) and item.finish_reason is not None:
                self._left -= 1
        self.is_over = True

    def fail(self, error: Exception) -> None:
        """End the job with ``error``."""
        if not self.admitted.done():
            self.admitted.set_exception(error)
        else:
            self.receive([error])


@dataclasses.dataclass
class _Running:
    """A request of the engine: prompt ``index`` of ``job``; ``left`` samples have not ended."""

    job: Job
    index: int
    left: int
    prompt: Result | None  # until its log-probabilities have been sent


class Worker:
    """Steps ``engine`` in a thread of its own while there is work.

    `submit`, `cancel` and `stop` are called in the event loop. They leave an order, which the
    thread carries out before its next step.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.failure: BaseException | None = None
        self._orders: collections.deque[tuple[Callable[[Job], None], Job]] = collections.deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._running: dict[int, _Running] = {}  # by the engine's id; only the thread uses it
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, failed: Callable[[], None]) -> None:
        """Start the thread; ``failed`` is called in the running event loop if a step raises."""
        self._loop, self._failed = asyncio.get_running_loop(), failed
        self._thread.start()

    async def submit(self, requests: Sequence[Request]) -> Job:
        """Queue all ``requests``, or none.

        Raises:
          ConfigError, QueueFull: the engine refuses one of them.
          EngineFailed: the engine has ended.
        """
        job = Job(requests)
        self._order(self._add, job)
        try:
            await job.admitted
        except BaseException:  # also where the client has gone
            self.cancel(job)
            raise
        return job

    def cancel(self, job: Job) -> None:
        """Free what ``job`` holds before the next step; nothing happens if it is over."""
        if not job.is_over:
            job.is_over = True
            self._order(self._remove, job)

    def stop(self) -> None:
        """End the thread after its step, and wait for it."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _order(self, order: Callable[[Job], None], job: Job) -> None:
        with self._changed:
            if self.failure is not None:
                job.fail(EngineFailed(str(self.failure)))
            else:
                self._orders.append((order, job))
                self._changed.notify()

    # in the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._orders or self._stopped or self.engine.has_work):
                    self._changed.wait()
                if self._stopped:
                    return
                orders, self._orders = self._orders, collections.deque()
            try:
                while orders:
                    order, job = orders[0]
                    order(job)
                    orders.popleft()
                if self.engine.has_work:
                    self._deliver(self.engine.step())
            except BaseException as error:  # a panic in Rust, of a grammar, is no Exception
                self._end(error, [job for _, job in orders])
                return

    def _add(self, job: Job) -> None:
        try:
            for index, request in enumerate(job.requests):
                request_id = self.engine.add(request)
                job.ids.append(request_id)
                result = self.engine.result(request_id) if request.echo else None
                self._running[request_id] = _Running(job, index, request.n, result)
        except (ConfigError, QueueFull) as error:
            self._remove(job)
            self._call(functools.partial(job.fail, error))
            return
        self._call(job.admit)

    def _remove(self, job: Job) -> None:
        for request_id in job.ids:
            if self._running.pop(request_id, None) is not None:
                self.engine.cancel(request_id)
        job.ids.clear()

    def _deliver(self, events: Sequence[Event]) -> None:
        """Send the events of each job together, so that the event loop wakes once for each."""
        sent: dict[Job, list[Event | PromptLogprobs]] = {}
        for event in events:
            running = self._running.get(event.request)
            if running is None:
                continue  # cancelled
            items = sent.setdefault(running.job, [])
            if running.prompt is not None:
                logprobs, top = running.prompt.prompt_logprobs, running.prompt.prompt_top
                items.append(PromptLogprobs(running.index, logprobs or [None], top or [[]]))
                running.prompt = None
            items.append(event._replace(request=running.index))
            running.left -= event.finish_reason is not None
            if not running.left:
                del self._running[event.request]
        for job, items in sent.items():
            self._call(functools.partial(job.receive, items))

    def _end(self, error: BaseException, ordered: Sequence[Job]) -> None:
        """Fail all jobs: those that run, those of ``ordered`` and of later orders."""
        traceback.print_exception(error)
        with self._changed:
            self.failure = error
            ordered = [*ordered, *(job for _, job in self._orders)]
            self._orders.clear()
        for job in {*ordered, *(running.job for running in self._running.values())}:
            self._call(functools.partial(job.fail, EngineFailed(str(error))))
        self._call(self._failed)

    def _call(self, function: Callable[[], object]) -> None:
        """Run ``function`` in the event loop; where that has ended, nobody waits for it."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)
