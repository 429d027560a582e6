"""Calls of tools in text, however the text is cut into pieces."""

import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.config import ConfigError
from research.inference.server.tools import ToolCall, ToolParser, form_of, schema
from tests.research.inference.server import templates

NAMES = ("weather", "time")
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
LLAMA3 = '{"name": "weather", "parameters": {"city": "Zürich"}}'
WEATHER = ToolCall("weather", '{"city": "Zürich"}')
CASES = {
    "hermes": [
        ("Hello", ["Hello"]),
        (" a <b>\n", [" a <b>\n"]),
        (HERMES, [WEATHER]),
        (f"Let me see.\n{HERMES}", ["Let me see.", WEATHER]),
        (f"{HERMES}\n{HERMES}\n", [WEATHER, WEATHER]),
        (HERMES.removesuffix("\n</tool_call>"), [WEATHER]),  # the text ended at a stop token
        ("1 <tool_call", ["1 <tool_call"]),
        ("<tool_call>\n{damaged\n</tool_call> b", ["<tool_call>\n{damaged\n</tool_call> b"]),
        (HERMES.replace("weather", "rm"), [HERMES.replace("weather", "rm")]),
        (HERMES.replace('"weather"', "[1]"), [HERMES.replace('"weather"', "[1]")]),
        (HERMES.replace('{"city": "Zürich"}', "7"), [HERMES.replace('{"city": "Zürich"}', "7")]),
        (HERMES.replace('"Zürich"', "NaN"), [HERMES.replace('"Zürich"', "NaN")]),
    ],
    "llama3": [
        ("Hello {", ["Hello {"]),
        ("  ", ["  "]),
        (LLAMA3, [WEATHER]),
        (f" {LLAMA3}; {LLAMA3}\n", [WEATHER, WEATHER]),
        ('{"name": "weather"', ['{"name": "weather"']),
        (f"{LLAMA3} and so on", [f"{LLAMA3} and so on"]),
        (f"It is\n{LLAMA3}", [f"It is\n{LLAMA3}"]),
        ("{" * 5000, ["{" * 5000]),
    ],
}


@pytest.mark.parametrize("size", [1, 3, 10_000])
@pytest.mark.parametrize(
    "form, text, want", [(form, *case) for form, cases in CASES.items() for case in cases]
)
def test_calls_are_found_whatever_the_pieces(form, text, want, size):
    parser = ToolParser(form, NAMES)
    found = []
    for start in range(0, len(text), size):
        found += parser.push(text[start : start + size])
    found += parser.finish()
    joined = []
    for piece in found:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    assert joined == want


@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<tool", "{", "}", " ", "\n", "é"]))
)
def test_text_without_a_call_is_unchanged(pieces):
    for form in ("hermes", "llama3"):
        parser = ToolParser(form, NAMES)
        found = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
        assert "".join(found) == "".join(pieces)


def test_text_arrives_before_the_end():
    parser = ToolParser("hermes", NAMES)
    assert parser.push("The ") == ["The"] and parser.push("cat <") == [" cat"]
    assert parser.push("b") == [" <b"]


def test_the_form_is_that_of_the_template():
    assert form_of(templates.CHATML) == "hermes" and form_of(templates.LLAMA3) == "llama3"
    for other in (templates.MISTRAL, "{{ messages }}", "{{ tools }}[TOOL_CALLS]",
                  "{{ tools }}<tool_call>\n<function="):  # fmt: skip
        with pytest.raises(ConfigError, match="tools="):
            form_of(other)


def test_a_schema_admits_the_calls_of_its_tools_alone():
    parameters = {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/City"}},
        "$defs": {"City": {"type": "string", "minLength": 2}},
        "required": ["city"],
    }
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": parameters}},
        {"type": "function", "function": {"name": "time"}},
    ]
    for form, key in (("hermes", "arguments"), ("llama3", "parameters")):
        validator = jsonschema.Draft202012Validator(schema(form, tools))
        for call, valid in (
            ({"name": "weather", key: {"city": "Bern"}}, True),
            ({"name": "time", key: {}}, True),
            ({"name": "weather", key: {}}, False),
            ({"name": "weather", key: {"city": "B"}}, False),
            ({"name": "rm", key: {}}, False),
            ({"name": "time", key: {}, "more": 1}, False),
        ):
            assert validator.is_valid(call) == valid, json.dumps(call)
