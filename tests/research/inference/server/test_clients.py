"""Which clients a server lets in, and what they cannot do to it; the engine is a fake."""

import asyncio
import contextlib
import json
import socket
import time

import httpx
import openai
import pytest

from layers.config import ConfigError
from research.inference.engine import Event
from research.inference.server import Server, ServerConfig
from research.inference.server.config import Keys, is_loopback
from tests.research.inference.server.fake import FakeEngine, serving
from tests.research.inference.server.test_faults import HELLO, error, post, reply

# keys and addresses


def test_keys(tokenizer, tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("# of two users\nabcdefghijklmnop\n\n  qrstuvwxyz0123456  \n")
    engine = FakeEngine(tokenizer.plain, reply(tokenizer))
    with serving(engine, tokenizer, api_key_file=str(path)) as server:
        for given, status in (
            ({}, 401),
            ({"authorization": "Bearer abcdefghijklmno"}, 401),
            ({"authorization": "Bearer abcdefghijklmnopq"}, 401),
            ({"authorization": "Basic abcdefghijklmnop"}, 401),
            ({"authorization": "Bearer # of two users"}, 401),
            ({"authorization": "Bearer abcdefghijklmnop"}, 200),
            ({"authorization": "bearer qrstuvwxyz0123456", "host": "any.example"}, 200),
        ):
            response = httpx.get(f"{server.address}/v1/models", headers=given)
            assert response.status_code == status
            if status == 401:
                assert error(response)[0] == 401 and "abc" not in response.text
                assert response.headers["www-authenticate"] == "Bearer"
        for open_path, status in (
            ("/healthz", 200),
            ("/", 200),
            ("/metrics", 401),
            ("/tokenize", 401),
        ):
            assert httpx.get(f"{server.address}{open_path}").status_code == status
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="abcdefghijklmnop")
        assert client.completions.create(model="small", prompt="x").choices[0].text == "the cat"
        other = client.with_options(api_key="qrstuvwxyz0123456")
        other.completions.create(model="small", prompt="x")
        # who shares a prefix with another could learn its text by time
        assert len({request.salt for request in engine.requests}) == 2


@pytest.mark.parametrize("content", ["", "# none\n", "short\n", "abcdefgh ijklmnop\n", "é" * 20])
def test_a_file_without_good_keys_is_refused_without_showing_them(tmp_path, content):
    path = tmp_path / "keys.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match="api-key-file=") as raised:
        Keys(str(path))
    assert "short" not in str(raised.value) and "abcdefgh" not in str(raised.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(str(tmp_path / "absent"))


def test_other_addresses_require_keys(tmp_path):
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]")))
    for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.0.0.1.example", ""):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="host=.*requires api-key-file"):
            ServerConfig("small", host)
    with pytest.raises(ConfigError, match=r"port=65536: must be in \[0, 65535\]"):
        ServerConfig("small", port=65536)
    (tmp_path / "keys").write_text("0123456789abcdef")
    with pytest.raises(ConfigError, match="host='no.such.host.invalid'"):
        Server(ServerConfig("small", "no.such.host.invalid", api_key_file=str(tmp_path / "keys")))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"port={port}: cannot be bound: Address already in use"
        ):
            Server(ServerConfig("small", port=port))


# slow and greedy clients


def talk(server, *pieces, pause=0.0, read=True) -> bytes:
    """Send ``pieces`` over a socket; what comes back until the server closes it."""
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        for piece in pieces:
            with contextlib.suppress(OSError):
                connection.sendall(piece)
            time.sleep(pause)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while read and (part := connection.recv(65536)):
                received += part
        return received


def test_slow_and_oversized_headers_and_slow_bodies(tokenizer):
    engine = FakeEngine(tokenizer.plain, reply(tokenizer))
    with serving(engine, tokenizer, header_timeout=0.3, body_timeout=0.3) as server:
        begin = time.monotonic()
        assert talk(server) == b""  # sends nothing
        assert (
            talk(server, b"GET /healthz HTTP/1.1\r\n", b"A: b\r\n", b"C: d\r\n", pause=0.15) == b""
        )
        ok = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answered = talk(server, ok, b"GET /he", pause=0.1)  # the second request does not end
        assert answered.startswith(b"HTTP/1.1 200") and answered.count(b"HTTP/1.1") == 1
        assert talk(server, ok + b"GET /he").count(b"HTTP/1.1") == 1
        assert time.monotonic() - begin < 8
        huge = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 70_000
        assert talk(server, huge).startswith((b"HTTP/1.1 400", b""))
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n"
        assert talk(server, head, b"{").startswith(b"HTTP/1.1 408")
        wrong = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"
        assert talk(server, wrong).startswith(b"HTTP/1.1 400")
        twice = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
        assert talk(server, twice).startswith(b"HTTP/1.1 400")
        # a connection that waits longer than this between two requests is kept
        with httpx.Client() as client:
            for _ in range(2):
                assert client.get(f"{server.address}/healthz").status_code == 200
                time.sleep(0.5)
        assert engine.requests == []


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_disconnect_cancels_within_two_steps(tokenizer, path, stream):
    engine = FakeEngine(tokenizer.plain, reply(tokenizer, count=100))
    engine.seconds = 0.1
    body = {"model": "small", "max_tokens": 200, "stream": stream, "n": 2}
    body |= {"prompt": "the"} if path == "/v1/completions" else {"messages": HELLO}
    with serving(engine, tokenizer) as server:
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + content)
            wait_until(lambda: engine.stats.steps >= 2)
        left = engine.stats.steps
        wait_until(lambda: engine.cancelled)
        assert [identity for identity, _ in engine.cancelled] == [0]
        assert engine.cancelled[0][1] <= left + 2
        assert engine.samples == []
        text = httpx.get(f"{server.address}/metrics").text
        assert "ablate_disconnects_total 1\n" in text and "ablate_samples_running 0\n" in text


def test_a_client_that_left_in_the_queue_is_cancelled(tokenizer):
    """Its request was sent to the engine while a step ran."""
    engine = FakeEngine(tokenizer.plain, reply(tokenizer, count=20))
    with serving(engine, tokenizer) as server:
        with engine.steps:
            post_and_leave(server, {"model": "small", "prompt": "the"})
            post_and_leave(server, {"model": "small", "prompt": "the"})
            time.sleep(0.3)
        wait_until(lambda: not engine.samples)
        assert len(engine.cancelled) == len(engine.requests)


def post_and_leave(server, body):
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    talk(server, f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content, read=False)


def test_a_full_queue_is_429_and_queues_nothing(tokenizer):
    engine = FakeEngine(tokenizer.plain, reply(tokenizer, count=20), slots=1, queue=2)
    body = {"model": "small", "prompt": ["a", "b"]}
    with serving(engine, tokenizer) as server:
        with engine.steps, httpx.Client(timeout=30) as client:

            async def race():
                async with httpx.AsyncClient(timeout=30) as client:
                    calls = [
                        client.post(f"{server.address}/v1/completions", json=body) for _ in range(3)
                    ]
                    running = [asyncio.ensure_future(call) for call in calls]
                    await asyncio.sleep(0.5)
                    engine.steps.release()
                    try:
                        return await asyncio.gather(*running)
                    finally:
                        engine.steps.acquire()

            answers = asyncio.run(race())
            del client
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert error(refused)[2].startswith("queue=2") and refused.headers["retry-after"] == "1"
        assert engine.samples == []
        # what had been queued of a refused request was taken back
        assert len(engine.requests) - len(engine.cancelled) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends(tokenizer, stream):
    engine = FakeEngine(tokenizer.plain, reply(tokenizer, count=100))
    engine.seconds = 0.05
    with serving(engine, tokenizer, timeout=0.3) as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none")
        ask = dict(model="small", prompt="x", max_tokens=100, stream=stream)
        if stream:
            with pytest.raises(openai.APIError, match="takes longer"):
                list(client.completions.create(**ask))
        else:
            with pytest.raises(openai.InternalServerError, match="takes longer") as raised:
                client.completions.create(**ask)
            assert raised.value.status_code == 503
        assert len(engine.requests) == 1  # the client did not try again
        wait_until(lambda: not engine.samples)
        assert "\nablate_disconnects_total 0\n" in httpx.get(f"{server.address}/metrics").text


def test_a_client_that_does_not_read_is_left(tokenizer, monkeypatch):
    monkeypatch.setattr("research.inference.server.app._SEND_SECONDS", 0.2)
    tokens = tokenizer.prompt("the cat" * 60, beginning=False)
    engine = FakeEngine(tokenizer.plain, lambda request, index: tokens, max_length=10**6)
    body = {"model": "small", "prompt": ["a"] * 4, "n": 16, "stream": True, "max_tokens": 100,
            "logprobs": 20}  # fmt: skip
    body["stop"] = ["\x00" * 200] * 16
    with serving(engine, tokenizer, timeout=1.0) as server:
        content = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        host, port = server.address.removeprefix("http://").split(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with connection:
            connection.connect((host, int(port)))
            sent = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
            connection.sendall(sent)
            wait_until(lambda: engine.requests)
            wait_until(lambda: not engine.samples)
            begin = time.monotonic()
            server.drain()
            server.thread.join(20)
            assert not server.thread.is_alive() and time.monotonic() - begin < 15


def test_draining_finishes_what_runs_and_refuses_what_comes(tokenizer):
    engine = FakeEngine(tokenizer.plain, reply(tokenizer, count=10))
    engine.seconds = 0.05
    with serving(engine, tokenizer) as server:

        async def scene():
            async with httpx.AsyncClient(base_url=server.address, timeout=30) as client:
                body = {"model": "small", "prompt": "x", "max_tokens": 21}
                running = asyncio.ensure_future(client.post("/v1/completions", json=body))
                while engine.stats.steps < 2:
                    await asyncio.sleep(0.01)
                server.drain()
                await asyncio.sleep(0.1)
                refused = await client.post("/v1/completions", json=body)
                health = await client.get("/healthz")
                metrics = await client.get("/metrics")
                return await running, refused, health, metrics

        done, refused, health, metrics = asyncio.run(scene())
        assert done.status_code == 200 and done.json()["choices"][0]["text"] == "the cat" * 10
        assert error(refused)[0] == 503 and refused.json()["error"]["code"] == "draining"
        assert health.status_code == 503 and "ablate_draining 1\n" in metrics.text
        server.thread.join(10)
        assert server.codes == [0]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.address}/healthz")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "kind", "message"),
    [
        ("error", openai.BadRequestError, "grammar takes too much time or memory"),
        ("nan", openai.InternalServerError, "the model's log-probabilities are NaN"),
    ],
)
def test_a_sample_that_cannot_go_on_is_an_error(
    tokenizer, monkeypatch, stream, reason, kind, message
):

    def step(self):
        self.stats.steps += 1
        failed, self.samples = self.samples, []
        return [Event(s.id, s.index, None, "", 0.0, [], reason) for s in failed]

    monkeypatch.setattr(FakeEngine, "step", step)
    with serving(FakeEngine(tokenizer.plain, reply(tokenizer)), tokenizer) as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
        kind = openai.APIError if stream else kind
        for _ in range(2):
            with pytest.raises(kind, match=message):
                list(client.completions.create(model="small", prompt="x", stream=stream))


@pytest.mark.parametrize("kind", [RuntimeError, BaseException])  # a panic in Rust is the latter
def test_a_failed_engine_ends_the_server(tokenizer, kind):
    engine = FakeEngine(tokenizer.plain, reply(tokenizer, count=10))
    engine.fault = kind("out of memory")
    with serving(engine, tokenizer, timeout=10.0) as server:
        response = post(server, "/v1/completions", dict(json={"model": "small", "prompt": "x"}))
        assert error(response)[0] == 503 and response.json()["error"]["code"] == "engine_failed"
        server.thread.join(10)
        assert server.codes == [1]
