"""Calls of tools in a model's text, in the forms of Hermes (also Qwen) and of Llama 3.

A chat template describes the tools to the model, and the form of a call with them. Here the calls
are found in the text that comes back.
"""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from layers.config import check

Form = Literal["hermes", "llama3"]
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_ARGUMENTS: dict[Form, str] = {"hermes": "arguments", "llama3": "parameters"}


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of the tool ``name``; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


def form_of(template: str) -> Form:
    """The form of calls that a chat template asks for.

    Raises:
      ConfigError: it describes no tools, or calls in another form.
    """
    hermes = _OPEN in template and "<function=" not in template
    llama3 = not hermes and '"parameters"' in template and "[TOOL_CALLS]" not in template
    requirement = "the chat template must describe tools, with calls as in Hermes or Llama 3"
    check("tools" in template and (hermes or llama3), "tools", [...], requirement)
    return "hermes" if hermes else "llama3"


def schema(form: Form, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of ``tools``, which have OpenAI's form."""
    arguments = _ARGUMENTS[form]
    calls = []
    for i, tool in enumerate(tools):
        function = tool["function"]
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        root = (
            f"#/properties/{arguments}"
            if len(tools) == 1
            else f"#/anyOf/{i}/properties/{arguments}"
        )
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    arguments: _moved(parameters, root),
                },
                "required": ["name", arguments],
                "additionalProperties": False,
            }
        )
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _moved(value: Any, root: str) -> Any:
    """A schema that becomes part of another one, at ``root``: its references begin there."""
    if isinstance(value, list):
        return [_moved(item, root) for item in value]
    if not isinstance(value, Mapping):
        return value
    moved = {name: _moved(item, root) for name, item in value.items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved


def lark(form: Form, tools: Sequence[Mapping[str, Any]]) -> str:
    """A grammar of exactly one call, in Lark's notation with llguidance's ``%json``.

    There is no white space but single spaces, of which a model could otherwise write any number.
    """
    compact = {"x-guidance": {"whitespace_flexible": False, "lenient": False}}
    call = f"%json {json.dumps(schema(form, tools) | compact)}"
    if form == "hermes":
        return f'start: "{_OPEN}\\n" call "\\n{_CLOSE}"\ncall: {call}\n'
    return f"start: call\ncall: {call}\n"


class ToolParser:
    """Splits a stream of text into text and calls of the tools in ``names``.

    What may yet become a call is kept until it is one, or is not. What looks like a call but has
    another tool's name or damaged JSON is text.
    """

    def __init__(self, form: Form, names: Collection[str]):
        self._form: Form = form
        self._names = set(names)
        self._kept = ""  # text that is not decided
        self._space = ""  # white space: dropped if a call follows or has come before
        self._called = self._plain = False

    def push(self, text: str) -> list[str | ToolCall]:
        self._kept += text
        return list(self._decided())

    def finish(self) -> list[str | ToolCall]:
        """What is left at the end of the text."""
        kept, self._kept = self._kept, ""
        found = list(self._last(kept))
        if self._space and not self._called:
            found.append(self._space)
        return found

    def _decided(self) -> Iterator[str | ToolCall]:
        if self._form == "llama3":
            start = self._kept.lstrip()
            self._plain |= bool(start) and start[0] != "{"  # only a whole text is a call
            if self._plain or not start:
                yield from self._text(self._kept)
                self._kept = ""
            return
        while True:
            before, opened, rest = self._kept.partition(_OPEN)
            inside, closed, after = rest.partition(_CLOSE)
            if not opened:
                keep = _beginning(self._kept, _OPEN)
                yield from self._text(self._kept[: len(self._kept) - keep])
                self._kept = self._kept[len(self._kept) - keep :]
                return
            yield from self._text(before)
            self._kept = opened + rest
            if not closed:
                return
            yield from self._calls(inside, opened + inside + closed)
            self._kept = after

    def _last(self, kept: str) -> Iterator[str | ToolCall]:
        if self._form == "hermes" and not kept.startswith(_OPEN):
            return self._text(kept)
        return self._calls(kept.removeprefix(_OPEN), kept)  # the last tag may be missing

    def _calls(self, inside: str, whole: str) -> Iterator[str | ToolCall]:
        """The calls in ``inside``: JSON objects; ``whole`` as text if there is anything else."""
        calls, decoder, rest = [], json.JSONDecoder(), inside.strip()
        while rest:
            try:
                value, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                calls = []
                break
            call = self._call(value)
            rest = rest[end:].lstrip().removeprefix(";").lstrip()
            if call is None:
                calls = []
                break
            calls.append(call)
        if not calls:
            yield from self._text(whole)
            return
        self._called, self._space = True, ""
        yield from calls

    def _call(self, value: Any) -> ToolCall | None:
        if not isinstance(value, dict):
            return None
        name, arguments = value.get("name"), value.get(_ARGUMENTS[self._form], {})
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        try:
            return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        except ValueError:  # Python reads NaN, which JSON does not have
            return None

    def _text(self, text: str) -> Iterator[str]:
        """``text`` without white space at its end, which is kept until more text follows."""
        text = self._space + text
        solid = text.rstrip()
        self._space = text[len(solid) :]
        if solid:
            yield solid


def _beginning(text: str, tag: str) -> int:
    """The length of the longest end of ``text`` with which ``tag`` begins."""
    lengths = range(min(len(text), len(tag) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(tag[:n])), 0)
