"""Runs the server: binds its address, answers until it is asked to stop, then drains."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from layers.config import ConfigError
from research.inference.engine import Engine
from research.inference.server.app import Service
from research.inference.server.config import Keys, ServerConfig
from research.inference.server.limits import HEADER_BYTES, Guard, protocol
from research.inference.server.text import ServedTokenizer
from research.inference.server.worker import Worker

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_KEEP_ALIVE = 15  # seconds between two requests of a connection
_LOOK = 0.05  # seconds between two looks whether the last answer has been sent


class Server:
    """An HTTP server for one engine, at ``address``, which is bound when this is made.

    Raises:
      ConfigError: the address cannot be bound, or the file of keys cannot be used.
    """

    def __init__(self, config: ServerConfig):
        self.config = config
        self._keys = None if config.api_key_file is None else Keys(config.api_key_file)
        self._socket = _bind(config)
        host, port = self._socket.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._uvicorn: _Uvicorn | None = None

    def run(
        self,
        engine: Engine,
        tokenizer: ServedTokenizer,
        ready: Callable[[str], object] = lambda address: None,
    ) -> int:
        """Answer requests until SIGINT, SIGTERM, SIGHUP or `drain`; the exit code.

        Then new requests get 503, those that run are finished, and 0 is returned; 1 if the engine
        has failed. Signals are heeded in the main thread only. ``ready`` gets the address when the
        server listens.
        """
        worker = Worker(engine)
        service = Service(worker, tokenizer, self.config)
        app = Guard(service, self.config, self._keys)
        self._uvicorn = _Uvicorn(app, self, service, worker, ready)
        try:
            self._uvicorn.run([self._socket])
        finally:
            worker.stop()
            if tokenizer.template is not None:
                tokenizer.template.close()
        return 0 if worker.failure is None else 1

    def drain(self) -> None:
        """Refuse new requests, finish those that run, and end `run`. Any thread may call it."""
        if self._uvicorn is not None:
            self._uvicorn.drain()


class _Uvicorn(uvicorn.Server):
    def __init__(
        self,
        app: Any,
        server: Server,
        service: Service,
        worker: Worker,
        ready: Callable[[str], object],
    ):
        config = server.config
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(config.header_timeout),  # only h11 bounds the size of headers
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_KEEP_ALIVE,
                limit_concurrency=config.connections,
                backlog=config.connections,
                loop="asyncio",
                ws="none",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_config=None,
            )
        )
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        # asyncio warns of each write to a client that has just left
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        self._server, self._service, self._worker, self._ready = server, service, worker, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked = False  # to drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker.start(self._fail)
        await super().startup(sockets)
        self._ready(self._server.address)
        if self._asked:
            self._begin_draining()

    def drain(self) -> None:
        self._asked = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        if not self._service.is_draining:
            self._service.is_draining = True
            self._draining = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        while self._service.calls:
            await asyncio.sleep(_LOOK)
        self.should_exit = True

    def _fail(self) -> None:
        """The engine has failed: send what the calls get, and end."""
        self._begin_draining()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain at a signal; uvicorn would close the socket at once, and raise the signal again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, lambda *_: self.drain()) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _bind(config: ServerConfig) -> socket.socket:
    """A socket at the address of ``config``; it refuses connections until it listens."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, kind, number, _, address = found[0]
        bound = socket.socket(family, kind, number)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host={config.host!r}: {_reason(error)}") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        name = "host" if config.port == 0 else "port"
        value = config.host if config.port == 0 else config.port
        raise ConfigError(f"{name}={value!r}: cannot be bound: {_reason(error)}") from None
    return bound


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
