"""From the fields of a request to the engine's requests."""

import dataclasses
import secrets
from typing import Any

from layers.config import ConfigError, check
from research.inference.engine import Request
from research.inference.grammar import Grammar, compile_grammar
from research.inference.sampling import SamplingConfig
from research.inference.server.chat import ChatTemplate
from research.inference.server.fields import ChatFields, CompletionFields, Fields
from research.inference.server.messages import ToolUse, read_messages
from research.inference.server.text import ServedTokenizer

_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the engine serves: ``max_length`` tokens, ``prompts`` in one request."""

    max_length: int
    vocab_size: int
    prompts: int


@dataclasses.dataclass(frozen=True)
class Call:
    """One HTTP request.

    ``requests``: one for each prompt. ``new_tokens``: whether new tokens were asked for; otherwise
    the one that is generated is not shown. ``logprobs``: the number of likeliest tokens beside each
    token, or None. ``tool_use``: of a chat.
    """

    requests: tuple[Request, ...]
    fields: Fields
    new_tokens: bool
    logprobs: int | None
    echo: bool = False
    tool_use: ToolUse | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.tokens) for request in self.requests)


class ContextError(ConfigError):
    """A prompt is too long."""


def completion(
    fields: CompletionFields, tokenizer: ServedTokenizer, limits: Limits, salt: str
) -> Call:
    """Raises `ConfigError`."""
    echo = bool(fields.echo)
    requests = []
    for name, tokens in _prompts(fields.prompt, tokenizer, limits):
        length = _new_tokens(fields.max_tokens, _COMPLETION_TOKENS, len(tokens), name, limits)
        sampling = _sampling(fields, tokenizer, limits, length, fields.logprobs)
        requests.append(
            Request(
                tokens,
                sampling,
                n=fields.samples,
                stop=fields.stops,
                echo=echo and fields.logprobs is not None,
                salt=salt,
            )
        )
    return Call(tuple(requests), fields, fields.max_tokens != 0, fields.logprobs, echo)


def chat(fields: ChatFields, tokenizer: ServedTokenizer, limits: Limits, salt: str) -> Call:
    """Raises `ConfigError`."""
    messages = read_messages(fields.messages)
    template = template_of(tokenizer)
    use = ToolUse(fields.tools, fields.tool_choice, template.source(bool(fields.tools)))
    grammar = _grammar(fields, use, tokenizer, limits)
    tokens = tokenizer.chat(messages, use.shown)
    most = fields.most_tokens
    length = _new_tokens(most, limits.max_length, len(tokens), "messages", limits)
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    sampling = _sampling(fields, tokenizer, limits, length, logprobs)
    request = Request(
        tokens,
        sampling,
        n=fields.samples,
        stop=fields.stops,
        grammar=grammar,
        salt=salt,
    )
    return Call((request,), fields, most != 0, logprobs, tool_use=use)


def template_of(tokenizer: ServedTokenizer) -> ChatTemplate:
    """The chat template; raises `ConfigError` if the model has none."""
    template = tokenizer.template
    requirement = "the model has no chat template; use /v1/completions"
    check(template is not None, "messages", [...], requirement)
    assert template is not None
    return template


def _prompts(value: Any, tokenizer: ServedTokenizer, limits: Limits) -> list[tuple[str, list[int]]]:
    """The field and the tokens of each prompt: a text, tokens, or a list of texts or tokens."""
    if isinstance(value, str):
        return [("prompt", tokenizer.prompt(value))]
    requirement = "must be a text, a list of tokens, or a list of such prompts"
    check(isinstance(value, list) and len(value) > 0, "prompt", value, requirement)
    if not isinstance(value[0], str | list):
        return [("prompt", _tokens("prompt", value, limits))]
    check(len(value) <= limits.prompts, "prompt", f"{len(value)} prompts",
          f"must hold at most {limits.prompts}, which the queue holds")  # fmt: skip
    prompts = []
    for i, item in enumerate(value):
        name = f"prompt[{i}]"
        check(isinstance(item, type(value[0])), name, item, requirement)
        tokens = tokenizer.prompt(item) if isinstance(item, str) else _tokens(name, item, limits)
        prompts.append((name, tokens))
    return prompts


def _tokens(name: str, value: list[Any], limits: Limits) -> list[int]:
    check(len(value) > 0, name, value, "must hold at least one token")
    for i, token in enumerate(value):
        allowed = type(token) is int and 0 <= token < limits.vocab_size
        check(allowed, f"{name}[{i}]", token,
              f"must be an integer in [0, vocab_size={limits.vocab_size})")  # fmt: skip
    return value


def _new_tokens(given: int | None, default: int, prompt: int, name: str, limits: Limits) -> int:
    """How many tokens the engine generates; by default no more than there is room for.

    At least one: the engine computes no log-probabilities of a prompt without a token after it.
    """
    room = limits.max_length - prompt
    wanted = max(1, min(default, room) if given is None else given)
    if wanted > room:
        what = "" if given is None else f" with {max(1, given)} new ones"
        raise ContextError(
            f"{name}={prompt} tokens: must have{what} at most max_length={limits.max_length} tokens"
        )
    return wanted


def _sampling(
    fields: Fields, tokenizer: ServedTokenizer, limits: Limits, length: int, logprobs: int | None
) -> SamplingConfig:
    names = (
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "seed",
    )  # fmt: skip
    given = {name: getattr(fields, name) for name in names if getattr(fields, name) is not None}
    biases = []
    for name, bias in (fields.logit_bias or {}).items():
        check(int(name) < limits.vocab_size, "logit_bias", name,
              f"must be the id of a token, below vocab_size={limits.vocab_size}")  # fmt: skip
        biases.append((int(name), float(bias)))
    seed = {"seed": secrets.randbits(32)}
    return SamplingConfig(
        max_new_tokens=length,
        stop_tokens=tuple(t for t in tokenizer.stop_tokens if t < limits.vocab_size),
        logit_bias=tuple(biases),
        logprobs=logprobs,
        **{**seed, **given},
    )


def _grammar(
    fields: ChatFields, use: ToolUse, tokenizer: ServedTokenizer, limits: Limits
) -> Grammar | None:
    """The grammar of the answer: of a call that is required, or of ``response_format``.

    It is compiled here, so that the engine, which compiles it again, finds it kept.
    """
    form = fields.response_format
    wanted = None if form is None or form.type == "text" else form
    if use.grammar is None and wanted is None:
        return None
    if wanted is not None:
        field, kind = "response_format", wanted.type
        allowed = use.grammar is None
        check(allowed, field, kind, f"cannot be given with tool_choice={fields.tool_choice!r}")
        check(use.form is None, field, kind, "cannot be given with tools")
    else:
        field = "tools"
    try:
        if wanted is None:
            grammar = Grammar.lark(str(use.grammar))
        else:
            described = wanted.json_schema
            schema = {"type": "object"} if described is None else described.schema
            grammar = Grammar.json_schema(schema)
        compile_grammar(grammar, tokenizer.plain, limits.vocab_size)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from None
    return grammar
