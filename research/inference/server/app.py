"""The routes of the server, as a Starlette application."""

import asyncio
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from layers.config import ConfigError
from research.inference.engine import Event, QueueFull
from research.inference.engine.request import NAN
from research.inference.server import requests as parsing
from research.inference.server.answers import Answer, ChatAnswer, CompletionAnswer
from research.inference.server.config import ServerConfig
from research.inference.server.errors import ServerError, dump, invalid
from research.inference.server.fields import ChatFields, CompletionFields, TokenizeFields, read
from research.inference.server.limits import Receive, Scope, Send, parse_body
from research.inference.server.messages import ToolUse, read_messages
from research.inference.server.metrics import CONTENT_TYPE, Metrics
from research.inference.server.page import PAGE, POLICY
from research.inference.server.text import ServedTokenizer
from research.inference.server.worker import EngineFailed, Job, PromptLogprobs, Worker

T = TypeVar("T")
Items = AsyncIterator[Event | PromptLogprobs]

_SEND_SECONDS = 10.0  # after the timeout of an answer, for a client that reads slowly
_RETRY = {"retry-after": "1"}
_NO_RETRY = {
    "x-should-retry": "false"
}  # OpenAI's client would repeat a request that takes too long


class Service:
    """The application, and what its routes share.

    ``calls``: requests that are being answered. While ``is_draining``, new ones are refused.
    """

    def __init__(self, worker: Worker, tokenizer: ServedTokenizer, config: ServerConfig):
        self._worker, self._tokenizer, self._config = worker, tokenizer, config
        engine = worker.engine
        longest, pages = engine.config.max_length, engine.pages
        if pages is not None:  # no sample can have more than all of them
            longest = min(longest, pages.count * pages.size)
        self._limits = parsing.Limits(
            longest,
            engine.model_config.vocab_size,
            engine.config.queue or engine.config.slots,
        )
        self._created = int(time.time())
        self._metrics = Metrics()
        self.is_draining, self.calls = False, 0
        self._app = Starlette(
            routes=[
                self._route("/", self._page),
                self._route("/healthz", self._health),
                self._route("/metrics", self._counts),
                self._route("/v1/models", self._models),
                self._route("/v1/models/{name:path}", self._model),
                self._route("/tokenize", self._tokenize, "POST"),
                self._route("/v1/completions", self._completions, "POST"),
                self._route("/v1/chat/completions", self._chat, "POST"),
            ],
            exception_handlers={HTTPException: self._no_route},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.calls -= 1

    def _route(
        self, path: str, endpoint: Callable[[Request], Awaitable[Response]], method: str = "GET"
    ) -> Route:
        """``endpoint`` with its errors as answers; counts these by status."""

        async def counted(request: Request) -> Response:
            try:
                response = await endpoint(request)
            except ClientDisconnect:
                self._metrics.disconnects += 1
                return Response(status_code=499)  # nobody reads it
            except ServerError as error:
                response = _refusal(error)
            except Exception:
                traceback.print_exc(file=sys.stderr)
                response = _refusal(ServerError(500, "the server has made a mistake"))
            self._metrics.answers[path, response.status_code] += 1
            return response

        return Route(path, counted, methods=[method])

    async def _no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path[:200]}"
        return _refusal(ServerError(error.status_code, f"{what}: {error.detail}"))

    # routes

    async def _page(self, request: Request) -> Response:
        headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
        return Response(PAGE, media_type="text/html", headers=headers)

    async def _health(self, request: Request) -> Response:
        self._check_takes_requests()
        return _json({"status": "ok"})

    async def _counts(self, request: Request) -> Response:
        text = self._metrics.text(self._worker.engine, self.is_draining)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return _json(self._described())

    async def _tokenize(self, request: Request) -> Response:
        body = await _body(request)
        tokens = await asyncio.to_thread(self._tokens, body)
        limit = self._limits.max_length
        return _json({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionFields, parsing.completion, CompletionAnswer)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, ChatFields, parsing.chat, ChatAnswer)

    # answers

    async def _answer(
        self, request: Request, cls: type, parse: Callable, answer_of: type[Answer]
    ) -> Response:
        begin = time.monotonic()
        self._check_takes_requests()
        body = await _body(request)
        call = await asyncio.to_thread(self._parsed, cls, parse, body, request)
        job = await _while_connected(request, self._submitted(call))
        answer = answer_of(call, self._tokenizer, self._config.name)
        items = self._items(job, begin)
        if call.fields.stream:
            return _Stream(
                self._chunks(answer, items, call, job), lambda: self._end(job), self._latest(begin)
            )
        try:
            whole = await _while_connected(request, _all(items))
        finally:
            self._worker.cancel(job)
        return _json(answer.whole(whole))

    def _parsed(self, cls: type, parse: Callable, body: Any, request: Request) -> parsing.Call:
        key = request.scope["state"]["key"]
        try:
            fields = read(cls, body)
            self._check_model(fields.model)
            return parse(fields, self._tokenizer, self._limits, "" if key is None else f"key {key}")
        except parsing.ContextError as error:
            raise invalid(error, code="context_length_exceeded") from None
        except ConfigError as error:
            raise invalid(error) from None

    async def _submitted(self, call: parsing.Call) -> Job:
        try:
            return await self._worker.submit(call.requests)
        except QueueFull as error:
            raise ServerError(429, str(error), code="queue_full", headers=_RETRY) from None
        except ConfigError as error:
            raise invalid(error) from None
        except EngineFailed:
            raise _engine_failed() from None

    async def _items(self, job: Job, begin: float) -> Items:
        """The events of ``job``, within the time of an answer."""
        items = job.events()
        first = True
        while True:
            try:
                async with asyncio.timeout_at(self._latest(begin)):
                    item = await anext(items, None)
            except TimeoutError:
                message = f"timeout={self._config.timeout:g} s: the answer takes longer"
                raise ServerError(503, message, code="timeout", headers=_NO_RETRY) from None
            except EngineFailed:
                raise _engine_failed() from None
            if item is None:
                self._metrics.whole_answer.add(time.monotonic() - begin)
                return
            if isinstance(item, Event):
                if item.finish_reason == "error":
                    message = "response_format: its grammar takes too much time or memory"
                    raise ServerError(400, message, param="response_format")
                if item.finish_reason == "nan":
                    raise ServerError(500, NAN)
                if first:
                    self._metrics.first_token.add(time.monotonic() - begin)
                first = False
            yield item

    async def _chunks(
        self, answer: Answer, items: Items, call: parsing.Call, job: Job
    ) -> AsyncIterator[bytes]:
        """Server-sent events. An error is the last one: the status of the answer has been sent."""
        try:
            async for item in items:
                for choice in answer.parts(item):
                    yield _event(answer.chunk([choice]))
        except ServerError as error:
            self._worker.cancel(job)
            yield _event(error.content())
            return
        if call.fields.include_usage:
            yield _event(answer.usage_chunk())
        yield b"data: [DONE]\n\n"

    def _latest(self, begin: float) -> float:
        """When an answer must be complete, by the clock of the event loop."""
        loop = asyncio.get_running_loop()
        return loop.time() + begin + self._config.timeout - time.monotonic()

    def _end(self, job: Job) -> None:
        """After a stream: what it still holds is freed."""
        if not job.is_over:
            self._metrics.disconnects += 1
            self._worker.cancel(job)

    # checks

    def _check_takes_requests(self) -> None:
        if self._worker.failure is not None:
            raise _engine_failed()
        if self.is_draining:
            raise ServerError(503, "the server is stopping", code="draining", headers=_RETRY)

    def _check_model(self, name: str) -> None:
        known = self._config.name
        if name != known:
            message = f"model={name!r}: this server has the model {known!r}"
            raise ServerError(404, message, param="model", code="model_not_found")

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._config.name,
            "object": "model",
            "created": self._created,
            "owned_by": "ablate",
            "max_model_len": self._limits.max_length,
            "has_chat_template": self._tokenizer.template is not None,
        }

    def _tokens(self, body: Any) -> list[int]:
        try:
            fields = read(TokenizeFields, body)
            if fields.model is not None:
                self._check_model(fields.model)
            if fields.prompt is not None:
                return self._tokenizer.prompt(fields.prompt, fields.add_special_tokens is not False)
            template = parsing.template_of(self._tokenizer)
            use = ToolUse(fields.tools, None, template.source(bool(fields.tools)))
            return self._tokenizer.chat(read_messages(fields.messages), use.shown)
        except ConfigError as error:
            raise invalid(error) from None


class _Stream(StreamingResponse):
    """Server-sent events; calls ``end`` when all are sent, or the client has left, or is slow."""

    def __init__(self, chunks: AsyncIterator[bytes], end: Callable[[], None], latest: float):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._end, self._latest = end, latest

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with asyncio.timeout_at(self._latest + _SEND_SECONDS):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # uvicorn closes the connection of an answer that is not complete
        finally:
            self._end()


async def _body(request: Request) -> dict[str, Any]:
    return parse_body(request.headers.get("content-type", ""), await request.body())


async def _all(items: Items) -> list[Event | PromptLogprobs]:
    return [item async for item in items]


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled if the client leaves: `ClientDisconnect`."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _engine_failed() -> ServerError:
    return ServerError(503, "the engine has failed", code="engine_failed")


def _refusal(error: ServerError) -> Response:
    body, headers = error.body(), error.headers
    return Response(body, error.status, headers=headers, media_type="application/json")


def _json(value: Any) -> Response:
    return Response(dump(value), media_type="application/json")


def _event(value: Any) -> bytes:
    return b"data: " + dump(value) + b"\n\n"
