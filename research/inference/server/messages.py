"""Checks messages and tools of a chat, and brings them into the form that templates read."""

import json
import re
from collections.abc import Mapping
from typing import Any

from layers.config import ConfigError, check, check_choice
from research.inference.server import tools as calls

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_TOOLS = 128
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
# name → the roles that have it, besides role and content
_FIELDS = {
    "name": _ROLES,
    "tool_calls": ("assistant",),
    "reasoning_content": ("assistant",),
    "tool_call_id": ("tool",),
}


def read_messages(value: Any) -> list[dict[str, Any]]:
    """OpenAI's messages as transformers' templates read them.

    ``developer`` becomes ``system``; text in parts is joined; the arguments of calls, which OpenAI
    writes as text, become objects; null fields are left out.

    Raises:
      ConfigError: a message has another form; names it.
    """
    check(
        isinstance(value, list) and len(value) > 0, "messages", value, "must be a list of messages"
    )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    check(isinstance(message, dict), where, message, "must be an object")
    given = {name: item for name, item in message.items() if item is not None}
    role = given.pop("role", None)
    check_choice(f"{where}.role", role, _ROLES)
    role = str(role)
    content = given.pop("content", None)
    read: dict[str, Any] = {"role": "system" if role == "developer" else role}
    required = not (role == "assistant" and "tool_calls" in given)
    check(content is not None or not required, f"{where}.content", content, "is required")
    if content is not None:
        read["content"] = _content(content, f"{where}.content")
    for name, item in given.items():
        known = role in _FIELDS.get(name, ())
        check(known, f"{where}.{name}", item, f"no such field of a message of role {role!r}")
        if name == "tool_calls":
            check(isinstance(item, list), f"{where}.{name}", item, "must be a list")
            read[name] = [_call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(item)]
        else:
            check(isinstance(item, str), f"{where}.{name}", item, "must be text")
            read[name] = item
    return read


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    check(isinstance(value, list), where, value, "must be text or a list of parts")
    requirement = "must be an object of type 'text' with a text; the model reads no other part"
    for i, part in enumerate(value):
        is_part = isinstance(part, dict) and set(part) == {"type", "text"}
        is_text = is_part and part["type"] == "text" and isinstance(part["text"], str)
        check(is_text, f"{where}[{i}]", part, requirement)
    return "\n".join(part["text"] for part in value)


def _call(value: Any, where: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    check(isinstance(function, dict), where, value, "must be an object with a function")
    assert isinstance(function, dict)
    check(value.get("type", "function") == "function", f"{where}.type", value.get("type"),
          "must be 'function'")  # fmt: skip
    name, arguments = function.get("name"), function.get("arguments")
    check(isinstance(name, str), f"{where}.function.name", name, "must be text")
    field = f"{where}.function.arguments"
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        parsed = None
    check(isinstance(parsed, dict), field, arguments, "must be the text of a JSON object")
    read = {"type": "function", "function": {"name": name, "arguments": parsed}}
    return {"id": value["id"], **read} if isinstance(value.get("id"), str) else read


def read_tools(value: Any, where: str = "tools") -> list[dict[str, Any]]:
    """The checked tools of a request; raises `ConfigError`."""
    check(isinstance(value, list) and 0 < len(value) <= _MOST_TOOLS, where, value,
          f"must be a list of 1 to {_MOST_TOOLS} tools")  # fmt: skip
    names: set[str] = set()
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        is_tool = isinstance(function, dict) and tool.get("type") == "function"
        check(is_tool, f"{where}[{i}]", tool, "must be an object of type 'function'")
        assert isinstance(function, dict)
        name, parameters = function.get("name"), function.get("parameters")
        valid = isinstance(name, str) and _NAME.fullmatch(name) is not None
        requirement = "must have 1 to 64 of A-Z a-z 0-9 _ . -"
        check(valid, f"{where}[{i}].function.name", name, requirement)
        check(name not in names, f"{where}[{i}].function.name", name, "must be given once")
        is_schema = parameters is None or isinstance(parameters, dict)
        field = f"{where}[{i}].function.parameters"
        check(is_schema, field, parameters, "must be a JSON schema")
        names.add(str(name))
    return value


class ToolUse:
    """What a request's ``tools`` and ``tool_choice`` ask for.

    ``shown``: the tools that the template describes. ``form``: of their calls, or None where no
    call is looked for. ``grammar``: in Lark's notation, where the answer must be a call.
    """

    def __init__(self, tools: Any, choice: Any, template: str):
        self.shown: list[dict[str, Any]] | None = None
        self.form: calls.Form | None = None
        self.grammar: str | None = None
        if tools is None or tools == []:
            check(choice in (None, "none"), "tool_choice", choice, "requires tools")
            return
        listed = read_tools(tools)
        choice = "auto" if choice is None else choice
        named = self._named(choice, listed)
        if choice == "none":
            return
        self.form = calls.form_of(template)
        self.shown = listed
        if choice != "auto":
            self.grammar = calls.lark(self.form, named)

    @property
    def names(self) -> list[str]:
        """The names of the tools."""
        return [tool["function"]["name"] for tool in self.shown or ()]

    @staticmethod
    def _named(choice: Any, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The tools of which one must be called, if one must."""
        if isinstance(choice, Mapping):
            function = choice.get("function")
            name = function.get("name") if isinstance(function, Mapping) else None
            chosen = [tool for tool in tools if tool["function"]["name"] == name]
            if choice.get("type") == "function" and chosen:
                return chosen
        elif choice in ("auto", "none", "required"):
            return tools
        raise ConfigError(
            f"tool_choice={choice!r}: must be auto, none, required, or an object of type "
            "'function' with the name of one of the tools"
        )
