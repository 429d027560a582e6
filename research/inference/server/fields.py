"""The fields of requests in OpenAI's form, as dataclasses that check themselves.

A field that is not here is an error that names it. ``null`` means that a field is not given.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from layers.config import ConfigError, check, check_choice, check_types, from_mapping
from research.inference.engine.request import MOST_SAMPLES
from research.inference.sampling import MOST_LOGPROBS

MOST_STOPS = 16
_LONGEST_STOP = 256  # characters
_TEMPERATURES = 2.0  # the largest


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """``include_usage``: a last chunk has the counts of tokens."""

    include_usage: bool = False

    def __post_init__(self):
        check_types(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """What completions and chats have in common.

    ``user``, ``metadata``, ``safety_identifier`` and ``prompt_cache_key`` change nothing: they are
    notes of the client, and some clients send them always. ``top_k``, ``min_p`` and
    ``repetition_penalty`` are not OpenAI's; its client sends them as ``extra_body``.
    """

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[str, Any] | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: Mapping[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def __post_init__(self):
        check_types(self)
        self._between("max_tokens", 0, 2**31 - 1)
        self._between("temperature", 0, _TEMPERATURES)
        self._between("n", 1, MOST_SAMPLES)
        self._between("seed", 0, 2**32 - 1)
        stops = self.stops
        check(len(stops) <= MOST_STOPS, "stop", stops, f"must hold at most {MOST_STOPS} texts")
        for i, text in enumerate(stops):
            requirement = f"must have 1 to {_LONGEST_STOP} characters"
            check(0 < len(text) <= _LONGEST_STOP, f"stop[{i}]", text, requirement)
        needless = self.stream_options is not None and not self.stream
        check(not needless, "stream_options", self.stream_options, "requires stream=true")
        for token, bias in (self.logit_bias or {}).items():
            number = isinstance(bias, int | float) and not isinstance(bias, bool)
            check(token.isascii() and token.isdecimal() and len(token) < 12, "logit_bias", token,
                  "its names must be ids of tokens")  # fmt: skip
            check(number and -100 <= bias <= 100, f"logit_bias.{token}", bias,
                  "must be in [-100, 100]")  # fmt: skip

    def _between(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        allowed = value is None or least <= value <= most
        check(allowed, name, value, f"must be in [{least:g}, {most:.10g}]")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    @property
    def samples(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionFields(Fields):
    """The fields of ``/v1/completions``. ``logprobs``: likeliest tokens beside each token."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self._between("logprobs", 0, MOST_LOGPROBS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonSchema:
    """A schema in ``response_format``; answers always follow it, ``strict`` or not."""

    name: str
    schema: Mapping[str, Any]
    description: str | None = None
    strict: bool | None = None

    def __post_init__(self):
        check_types(self)


@dataclasses.dataclass(frozen=True)
class ResponseFormat:
    """``type``: ``text``, ``json_object``, or ``json_schema`` with the schema."""

    type: str
    json_schema: JsonSchema | None = None

    def __post_init__(self):
        check_types(self)
        check_choice("type", self.type, ("text", "json_object", "json_schema"))
        wants = self.type == "json_schema"
        requirement = "is required" if wants else f"is not read with type={self.type!r}"
        check((self.json_schema is not None) == wants, "json_schema", self.json_schema, requirement)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFields(Fields):
    """The fields of ``/v1/chat/completions``.

    ``max_completion_tokens`` is the newer name of ``max_tokens``. ``logprobs``: whether to report
    log-probabilities, with ``top_logprobs`` likeliest tokens beside each.
    """

    messages: Any
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: Any = None
    tool_choice: Any = None

    def __post_init__(self):
        super().__post_init__()
        self._between("max_completion_tokens", 0, 2**31 - 1)
        self._between("top_logprobs", 0, MOST_LOGPROBS)
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        check(not both, "max_completion_tokens", self.max_completion_tokens,
              "cannot be given with max_tokens, which means the same")  # fmt: skip
        needless = self.top_logprobs is not None and not self.logprobs
        check(not needless, "top_logprobs", self.top_logprobs, "requires logprobs=true")

    @property
    def most_tokens(self) -> int | None:
        """``max_completion_tokens`` or ``max_tokens``."""
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeFields:
    """The fields of ``/tokenize``: a prompt, or messages and tools."""

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    tools: Any = None
    add_special_tokens: bool | None = None

    def __post_init__(self):
        check_types(self)
        one = (self.prompt is None) != (self.messages is None)
        check(one, "prompt", self.prompt, "one of prompt and messages is required")
        needless = self.tools is not None and self.messages is None
        check(not needless, "tools", self.tools, "requires messages")
        needless = self.add_special_tokens is not None and self.prompt is None
        check(not needless, "add_special_tokens", self.add_special_tokens, "requires prompt")


# fields of OpenAI's that would change an answer, and that this server does not support
_UNSUPPORTED = {
    "best_of": "give n",
    "suffix": "",
    "functions": "give tools",
    "function_call": "give tool_choice",
    "parallel_tool_calls": "",
    "store": "nothing is stored",
}


def read(cls: type[Any], body: Mapping[str, Any]) -> Any:
    """``body`` as the dataclass ``cls``; raises `ConfigError`."""
    given = {name: value for name, value in body.items() if value is not None}
    known = {field.name for field in dataclasses.fields(cls)}
    for name in given:
        if name in _UNSUPPORTED and name not in known:
            note = f"; {_UNSUPPORTED[name]}" if _UNSUPPORTED[name] else ""
            raise ConfigError(f"{name}={given[name]!r}: is not supported{note}")
    return from_mapping(cls, given)
