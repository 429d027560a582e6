"""Bounds on what a client sends: headers and bodies in time and size, keys, hosts."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from research.inference.server.config import Keys, ServerConfig, is_loopback
from research.inference.server.errors import ServerError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADER_BYTES = 16 << 10
_DEPTH = 64  # of objects and lists inside each other
_OPEN = ("/healthz", "/")  # without a key: the page has none until its user enters one
_DRAINED = 4  # times max_body: how much of a body that is too large is read before the answer


def protocol(header_timeout: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol, which closes a connection whose headers are late.

    uvicorn bounds the time between two requests, but not that of the first bytes of a connection
    nor of headers that have begun.
    """

    class Bounded(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._late = self.loop.call_later(header_timeout, self._close)

        def data_received(self, data: bytes) -> None:
            if self._late is None and self._waits():
                self._late = self.loop.call_later(header_timeout, self._close)
            super().data_received(data)
            if self._late is not None and not self._waits():
                self._cancel()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._late is None and self._waits() and self.conn.trailing_data[0]:
                self._late = self.loop.call_later(header_timeout, self._close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def _waits(self) -> bool:
            """Whether no request is under way: its headers are incomplete, or have not begun."""
            return self.conn.their_state is h11.IDLE

        def _cancel(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _close(self) -> None:
            self._late = None
            if not self.transport.is_closing():
                self.transport.close()

    return Bounded


class Guard:
    """An ASGI application around ``app`` that checks host and key, and reads the body.

    ``app`` gets the whole body as one message, then what the server says about the connection. It
    finds the index of the client's key in ``scope["state"]["key"]``.
    """

    def __init__(self, app: App, config: ServerConfig, keys: Keys | None):
        self._app, self._config, self._keys = app, config, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # "lifespan" is off, and no library serves web sockets
            return
        try:
            headers = dict(scope["headers"])
            self._check_host(headers)
            scope["state"]["key"] = self._check_key(scope["path"], headers)
            body = await self._read(headers, receive)
        except ServerError as error:
            await answer(error, send)
            return
        if body is None:
            return  # the client has gone
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def after_body() -> MutableMapping[str, Any]:
            for message in messages:
                return message
            return await receive()

        await self._app(scope, after_body, send)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """Without keys, refuse a web page of another site that its name server leads here."""
        if self._keys is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
            if not is_loopback(name):
                raise ServerError(403, f"Host={host!r}: must be a loopback address")

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> int | None:
        if self._keys is None or path in _OPEN:
            return None
        found = self._keys.find(headers.get(b"authorization", b""))
        if found is None:
            message = "the header 'Authorization: Bearer KEY' must hold a key of this server"
            challenge = {"www-authenticate": "Bearer"}
            raise ServerError(401, message, code="invalid_api_key", headers=challenge)
        return found

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The body, or None if the client left while it sent."""
        largest = self._config.max_body
        length = headers.get(b"content-length", b"0")
        declared = int(length) if length.isdigit() else 0
        body, size = bytearray(), 0
        too_large = ServerError(413, f"body: must have at most {largest} bytes")
        if declared > _DRAINED * largest:
            raise too_large
        try:
            async with asyncio.timeout(self._config.body_timeout):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    more = message.get("more_body", False)
                    size += len(message.get("body", b""))
                    if size <= largest:
                        body += message.get("body", b"")
                    elif size > _DRAINED * largest:
                        raise too_large
        except TimeoutError:
            seconds = f"{self._config.body_timeout:g} s"
            raise ServerError(408, f"body: must arrive within {seconds}") from None
        if size > largest:  # read to its end: a client that still writes would miss the answer
            raise too_large
        return bytes(body)


async def answer(error: ServerError, send: Send) -> None:
    """Send ``error`` and close the connection, whose input may be incomplete."""
    body = error.body()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def parse_body(content_type: str, body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``.

    Raises:
      ServerError: another type (a web page of another site can send no JSON here), damaged JSON, a
        name twice, nested too deep, or text with half of a surrogate pair.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ServerError(415, f"Content-Type={content_type!r}: must be application/json")
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object)
    except RecursionError:
        raise ServerError(400, f"body: must be nested at most {_DEPTH} deep") from None
    except ValueError as error:
        raise ServerError(400, f"body: must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise ServerError(400, "body: must be an object")
    _check_values(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in an object")
    return value


def _check_values(value: Any) -> None:
    """Check depth and text without recursion."""
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        inside: list[Any] = []
        for item in level:
            if isinstance(item, str):
                with contextlib.suppress(UnicodeEncodeError):
                    item.encode()
                    continue
                raise ServerError(400, "body: its text must be Unicode without lone surrogates")
            if isinstance(item, dict):
                inside += [*item, *item.values()]
            elif isinstance(item, list):
                inside += item
        if not inside:
            return
        level = inside
    raise ServerError(400, f"body: must be nested at most {_DEPTH} deep")
