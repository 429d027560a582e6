"""Answers that follow a grammar: JSON by schema, and calls of tools that are required."""

import json

import jsonschema
import openai
import pytest

from research.convert import load_directory
from research.inference.engine import Engine, EngineConfig
from research.inference.server import ServedTokenizer
from tests.research.inference.server.fake import serving
from tests.research.inference.server.test_faults import HELLO, error, post
from tests.research.inference.server.test_openai import write_model

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Zürich"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
CITY = {"properties": {"city": {"$ref": "#/$defs/City"}, "days": {"$ref": "#/$defs/Days"}}}
PARTS = {"City": {"enum": ["Bern", "Zürich"]}, "Days": {"enum": [1, 2]}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": SCHEMA | CITY | {"$defs": PARTS}},
    },
    {"type": "function", "function": {"name": "time"}},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_model(folder)
    tokenizer = ServedTokenizer(folder)
    config = EngineConfig(slots=2, max_length=768, chunk=64, queue=16)
    engine = Engine(load_directory(folder), config, tokenizer=tokenizer.plain)
    engine.warm_up()
    with serving(engine, tokenizer) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def ask(client, **fields):
    fields = dict(max_tokens=150, temperature=1.0, seed=3, n=2) | fields
    return client.chat.completions.create(model="small", messages=HELLO, **fields)


def test_answers_follow_the_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    choices = ask(client, response_format=form).choices
    assert [choice.finish_reason for choice in choices] == ["stop", "stop"]
    for choice in choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    free = ask(client).choices[0].message.content
    with pytest.raises(ValueError):
        json.loads(free)
    for choice in ask(client, response_format={"type": "json_object"}, max_tokens=5).choices:
        assert choice.message.content.startswith("{")


@pytest.mark.parametrize(
    "choice, names",
    [
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        ("required", {"weather", "time"}),
    ],
)
def test_a_required_call_is_a_call_whole_and_streamed(client, choice, names):
    wanted = dict(tools=TOOLS, tool_choice=choice)
    whole = ask(client, **wanted).choices
    for answer in whole:
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        (call,) = answer.message.tool_calls
        assert call.function.name in names and call.type == "function"
        if call.function.name == "weather":
            jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    streamed = {}
    for chunk in ask(client, **wanted, stream=True):
        for part in chunk.choices:
            for call in part.delta.tool_calls or ():
                streamed[part.index] = (call.function.name, call.function.arguments)
            assert not part.delta.content
    calls = [answer.message.tool_calls[0].function for answer in whole]
    assert streamed == {i: (call.name, call.arguments) for i, call in enumerate(calls)}


@pytest.mark.parametrize(
    "schema, reason",
    [
        ({"type": "nonsense"}, "cannot be compiled"),
        ({"$ref": "#/nowhere"}, "cannot be compiled"),
        ({"type": "string", "pattern": "("}, "cannot be compiled"),
        ({"properties": {"x" * 70_000: {}}}, "at most"),
    ],
)
def test_a_schema_that_does_not_compile_in_bounded_time(server, client, schema, reason):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": "small", "messages": HELLO, "response_format": form}
    status, param, message = error(post(server, "/v1/chat/completions", dict(json=body)))
    assert (status, param) == (400, "response_format") and reason in message
    assert client.completions.create(model="small", prompt="a", max_tokens=1).choices
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(openai.BadRequestError, match="^Error code: 400 - tools: "):
        ask(client, tools=tools, tool_choice="required")
