"""What a server refuses; the engine is a fake."""

import json

import httpx
import openai
import pytest

from layers.config import ConfigError
from research.inference.engine.pages import Pages
from tests.research.inference.server.fake import FakeEngine, serving

HELLO = [{"role": "user", "content": "Hello"}]


def reply(tokenizer, text="the cat", count=1):
    tokens = tokenizer.prompt(text, beginning=False)
    return lambda request, index: tokens * count + [tokenizer.stop_tokens[-1]]


@pytest.fixture(scope="module")
def server(tokenizer):
    with serving(FakeEngine(tokenizer.plain, reply(tokenizer)), tokenizer) as server:
        yield server


def post(server, path, body, **headers):
    return httpx.post(f"{server.address}{path}", **body, headers=headers)


def error(response):
    """The parts of an error, which must have OpenAI's form."""
    content = response.json()["error"]
    assert set(content) == {"message", "type", "param", "code"}
    assert "\n" not in content["message"] and len(content["message"]) < 1100
    return response.status_code, content["param"], content["message"]


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


DAMAGED = [{"function": {"name": "f", "arguments": "{"}}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
BOTH = [
    ("max_tokens", -1, "must be in [0, 2147483647]"),
    ("max_tokens", True, "must be of type int, not bool"),
    ("max_tokens", 1.5, "must be of type int"),
    ("max_tokens", 10_000, "max_length=256"),
    ("temperature", float("nan"), "must be a finite number"),
    ("temperature", -0.1, "must be in [0, 2]"),
    ("temperature", "hot", "must be of type float"),
    ("top_p", 0, "must be in (0, 1]"),
    ("top_k", 0, "must be > 0"),
    ("n", 0, "must be in [1, 16]"),
    ("n", 17, "must be in [1, 16]"),
    ("seed", -1, "must be in [0, 4294967295]"),
    ("presence_penalty", 3, "must be in [-2, 2]"),
    ("logit_bias", {"300": 1}, "below vocab_size=300"),
    ("logit_bias", {"x": 1}, "ids of tokens"),
    ("logit_bias", {"5": 101}, "must be in [-100, 100]"),
    ("logit_bias", {"5": True}, "must be in [-100, 100]"),
    ("logit_bias", {"5": float("nan")}, "must be in [-100, 100]"),
    ("stop", [""], "must have 1 to 256 characters"),
    ("stop", ["a"] * 17, "at most 16"),
    ("stop", 7, "must be of type"),
    ("stream", 1, "must be of type bool"),
    ("stream_options", {"include_usage": True}, "requires stream=true"),
    ("stream_options", {"obfuscate": True}, "no such field"),
    ("model", None, "required"),
    ("temprature", 1, "did you mean 'temperature'"),
    ("best_of", 2, "is not supported; give n"),
    ("user", 7, "must be of type str"),
]  # fmt: skip
COMPLETIONS = [
    ("prompt", None, "required"),
    ("prompt", 7, "must be a text"),
    ("prompt", [], "must be a text"),
    ("prompt", [[]], "at least one token"),
    ("prompt", ["a", [1]], "must be a text"),
    ("prompt", [1, 300], "must be an integer in [0, vocab_size=300)"),
    ("prompt", [1, -1], "must be an integer in [0, vocab_size=300)"),
    ("prompt", [1, True], "must be an integer in [0, vocab_size=300)"),
    ("prompt", [1, 2.0], "must be an integer in [0, vocab_size=300)"),
    ("prompt", ["a"] * 5, "must hold at most 4"),
    ("prompt", [5] * 256, "max_length=256"),
    ("prompt", "naïve " * 300, "max_length=256"),
    ("logprobs", 21, "must be in [0, 20]"),
    ("logprobs", -1, "must be in [0, 20]"),
    ("suffix", "x", "is not supported"),
    ("messages", HELLO, "no such field"),
]
CHATS = [
    ("messages", None, "required"),
    ("messages", [], "must be a list of messages"),
    ("messages", ["hi"], "must be an object"),
    ("messages", [{"role": "wizard", "content": "x"}], "must be one of"),
    ("messages", [{"role": "user"}], "is required"),
    ("messages", [{"role": "user", "content": 7}], "must be text or a list of parts"),
    ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "type 'text'"),
    ("messages", [{"role": "user", "content": "x", "tool_calls": []}], "no such field"),
    ("messages", [{"role": "assistant", "tool_calls": DAMAGED}], "the text of a JSON object"),
    ("messages", [{"role": "user", "content": "naïve " * 300}], "max_length=256"),
    ("max_completion_tokens", -1, "must be in [0, 2147483647]"),
    ("logprobs", 5, "must be of type bool"),
    ("top_logprobs", 5, "requires logprobs=true"),
    ("top_logprobs", 21, "must be in [0, 20]"),
    ("tools", {}, "must be a list of 1 to 128 tools"),
    ("tools", [{"type": "function"}], "type 'function'"),
    ("tools", [TOOL, TOOL], "must be given once"),
    ("tools", [{"type": "function", "function": {"name": "a b"}}], "must have 1 to 64"),
    ("tool_choice", "required", "requires tools"),
    ("parallel_tool_calls", False, "is not supported"),
    ("functions", [], "is not supported; give tools"),
    ("response_format", {"type": "xml"}, "must be one of text, json_object, json_schema"),
    ("response_format", {"type": "json_schema"}, "is required"),
    ("response_format", {"type": "json_object", "json_schema": {"name": "x", "schema": {}}},
     "is not read"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "required"),
    ("prompt", "x", "no such field"),
]  # fmt: skip
CASES = [
    *(("/v1/completions", {"prompt": "the"}, *case) for case in (*BOTH, *COMPLETIONS)),
    *(("/v1/chat/completions", {"messages": HELLO}, *case) for case in (*BOTH, *CHATS)),
    ("/tokenize", {}, "prompt", None, "one of prompt and messages is required"),
    ("/tokenize", {"prompt": "x"}, "tools", [TOOL], "requires messages"),
]


@pytest.mark.parametrize("path, body, field, value, reason", CASES)
def test_a_bad_field_is_named_with_its_value_and_range(server, path, body, field, value, reason):
    body = {"model": "small", **body, field: value}
    if value is None:
        del body[field]
    response = post(
        server, path, dict(content=json.dumps(body)), **{"content-type": "application/json"}
    )
    status, param, message = error(response)
    assert status == 400 and reason in message
    assert message.startswith(param) and (param.startswith(field) or field in ("max_tokens",))


def test_two_names_of_one_field_and_two_grammars_are_refused(server):
    url = "/v1/chat/completions"
    body = {"model": "small", "messages": HELLO, "max_tokens": 1, "max_completion_tokens": 1}
    assert error(post(server, url, dict(json=body)))[:2] == (400, "max_completion_tokens")
    form = {"type": "json_object"}
    body = {"model": "small", "messages": HELLO, "tools": [TOOL], "response_format": form}
    assert error(post(server, url, dict(json=body)))[:2] == (400, "response_format")
    body["tool_choice"] = {"type": "function", "function": {"name": "g"}}
    assert error(post(server, url, dict(json=body)))[:2] == (400, "tool_choice")


@pytest.mark.parametrize(
    "content, kind, status, reason",
    [
        (b"{", "application/json", 400, "must be JSON"),
        (b"[]", "application/json", 400, "must be an object"),
        (b'"\xff"', "application/json", 400, "must be JSON"),
        (b'{"model": "a", "model": "b"}', "application/json", 400, "'model' stands twice"),
        (b'{"model": "\\ud800"}', "application/json", 400, "surrogates"),
        (b'{"n": ' + b"9" * 5000 + b"}", "application/json", 400, "must be JSON"),
        (json.dumps({"x": nested(100)}).encode(), "application/json", 400, "64 deep"),
        (b'{"x": ' + b"[" * 100_000 + b"}", "application/json", 400, "64 deep"),
        (b"{}", "text/plain", 415, "must be application/json"),
        (b"{}", "", 415, "must be application/json"),
        (b" " * (1 << 20) + b" ", "application/json", 413, "at most 1048576 bytes"),
        (b" " * (1 << 23), "application/json", 413, "at most 1048576 bytes"),
    ],
)
def test_a_body_that_is_no_json_object_of_bounded_size(server, content, kind, status, reason):
    headers = {"content-type": kind} if kind else {}
    try:
        response = post(server, "/v1/completions", dict(content=content), **headers)
    except httpx.WriteError:  # far too large: the server does not wait for the end
        assert len(content) > 4 << 20
        return
    assert error(response)[0] == status and reason in error(response)[2]


def test_no_answer_is_longer_than_all_pages(tokenizer):
    engine = FakeEngine(tokenizer.plain, reply(tokenizer))
    engine.pages = Pages(2, 16)
    with serving(engine, tokenizer) as server:
        ask = {"model": "small", "messages": HELLO}
        assert post(server, "/v1/chat/completions", dict(json=ask)).status_code == 200
        [request] = engine.requests
        assert len(request.tokens) + request.sampling.max_new_tokens == 32
        response = post(server, "/v1/chat/completions", dict(json=ask | {"max_tokens": 30}))
        assert error(response)[1] == "messages" and "max_length=32" in error(response)[2]
        assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_body_in_pieces_is_counted(server):
    pieces = (b" " * 65536 for _ in range(20))
    response = post(
        server, "/tokenize", dict(content=pieces), **{"content-type": "application/json"}
    )
    assert error(response)[0] == 413


def test_unknown_models_paths_and_methods(server):
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none")
    for call in (
        lambda: client.completions.create(model="large", prompt="x"),
        lambda: client.chat.completions.create(model="large", messages=HELLO),
        lambda: client.models.retrieve("large"),
    ):
        with pytest.raises(openai.NotFoundError, match="this server has the model 'small'"):
            call()
    assert client.models.retrieve("small").id == client.models.list().data[0].id == "small"
    assert error(httpx.get(f"{server.address}/v1/engines"))[0] == 404
    assert error(httpx.get(f"{server.address}/v1/completions"))[0] == 405


def test_a_page_of_another_site_is_refused(server):
    """Its name may resolve to this machine, but the Host header is its own."""
    for host, status in (("evil.example", 403), ("localhost:1", 200), ("[::1]:80", 200), ("", 403)):
        assert httpx.get(f"{server.address}/healthz", headers={"host": host}).status_code == status


def test_a_refusal_of_the_engine_is_the_clients(server, tokenizer, monkeypatch):
    def refuse(self, request):
        raise ConfigError("tokens=9 tokens: exceed all 2 pages")

    monkeypatch.setattr(FakeEngine, "add", refuse)
    response = post(server, "/v1/completions", dict(json={"model": "small", "prompt": "x"}))
    assert error(response) == (400, "tokens", "tokens=9 tokens: exceed all 2 pages")
