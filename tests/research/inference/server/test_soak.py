"""A server at saturation, whose clients leave at random: what it holds is free at the end."""

import asyncio
import collections
import os
import random
import resource
import time

import httpx
import pytest

from layers.state import CacheConfig
from research.convert import load_directory
from research.inference.engine import Engine, EngineConfig
from research.inference.server import ServedTokenizer
from tests.research.inference.server.fake import serving
from tests.research.inference.server.test_openai import write_model

CLIENTS = 8
LEFT, REFUSED = "left", "refused"


class CheckedEngine(Engine):
    """Checks after each step that pages are held by the running samples, and by nothing else."""

    def step(self):
        events = super().step()
        held = collections.Counter(page for s in self._running for page in s.pages)
        pool = self.pages
        assert all(pool.holders(page) == held[page] for page in range(pool.count))
        assert pool.free == pool.count - len(held)
        # the page of a sample's next token, if it has that yet, is its own
        decoding = [(s.pages, s.position // pool.size) for s in self._running if s.is_decoding]
        written = [pages[index] for pages, index in decoding if index < len(pages)]
        assert len(set(written)) == len(written)
        return events


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_model(folder)
    tokenizer = ServedTokenizer(folder)
    cache = CacheConfig("paged", page=4, pages=14)  # too few for four long samples
    config = EngineConfig(slots=4, max_length=64, chunk=8, cache=cache, queue=4)
    engine = CheckedEngine(load_directory(folder), config, tokenizer=tokenizer.plain)
    engine.warm_up()
    return engine, tokenizer


async def ask(client, rng):
    """One request, or half of one; what became of it."""
    body = {"model": "small", "temperature": 1.2, "max_tokens": rng.randint(1, 12)}
    body |= {"n": rng.choice((1, 1, 3)), "stream": rng.random() < 0.5}
    if rng.random() < 0.3:
        body["messages"] = [{"role": "user", "content": "the mat"}]
        path = "/v1/chat/completions"
    else:
        prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 30))] for _ in range(3)]
        body["prompt"] = rng.choice((prompts[:2], prompts[0], "the cat sat"))
        path = "/v1/completions"
    if rng.random() < 0.1:
        wrong = {"n": 99}, {"max_tokens": -1}, {"nonsense": 1}, {"model": "large"}
        body |= rng.choice(wrong)
    patience = rng.choice((0.0, 0.02, 0.1, 60.0, 60.0))
    try:
        async with asyncio.timeout(patience):
            async with client.stream("POST", path, json=body) as answer:
                content = await answer.aread()
    except TimeoutError:
        return LEFT
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
        return answer.status_code
    assert content.rstrip().endswith(b"data: [DONE]" if body["stream"] else b"}")
    assert b'"error"' not in content
    return 200


async def saturate(address, *, requests, seconds, seed=0):
    """Answers by kind, of ``requests`` and for at least ``seconds``; memory on the way."""
    counts, memory = collections.Counter(), []
    end = time.monotonic() + seconds

    async def client(number):
        rng = random.Random(f"{seed} {number}")
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as session:
            while counts.total() < requests or time.monotonic() < end:
                try:
                    kind = await ask(session, rng)
                    counts[kind] += 1
                    await asyncio.sleep(0.1 if kind == 429 else 0.0)
                except httpx.TransportError:  # the connection of a request that was left
                    counts[LEFT] += 1
                if counts.total() % 500 == 0:
                    memory.append(resident())

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return counts, memory


def resident() -> int:
    """Bytes of this process in memory, server and clients."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def run(parts, **load):
    engine, tokenizer = parts
    with serving(engine, tokenizer) as server:
        counts, memory = asyncio.run(saturate(server.address, **load))
        end = time.monotonic() + 30
        while engine.has_work:
            assert time.monotonic() < end
            time.sleep(0.01)
        text = httpx.get(f"{server.address}/metrics").text
    assert server.codes == [0]  # no step has failed its checks
    assert engine.pages.free == engine.pages.count and engine.running == engine.waiting == 0
    assert engine._results == {} and not engine._events
    assert "ablate_pages_free 14\n" in text and "ablate_samples_running 0\n" in text
    assert set(counts) <= {200, 400, 404, 429, LEFT}, counts  # no 5xx
    return counts, memory


def test_everything_is_free_after_clients_that_leave(parts):
    counts, _ = run(parts, requests=150, seconds=0)
    assert counts[200] > 20 and counts[LEFT] > 20 and counts[400] > 1 and counts[429] > 1, counts
    assert parts[0].stats.preemptions > 0


@pytest.mark.soak
def test_ten_thousand_requests_and_ten_minutes_of_saturation(parts):
    """`make soak-server`; ABLATE_SOAK_SECONDS shortens it."""
    seconds = float(os.environ.get("ABLATE_SOAK_SECONDS", "600"))
    counts, memory = run(parts, requests=10_000, seconds=seconds, seed=1)
    print(counts, [size >> 20 for size in memory])
    early, late = memory[len(memory) // 3], max(memory[-3:])
    assert late < early * 1.05 + (8 << 20), [size >> 20 for size in memory]
