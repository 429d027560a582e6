"""Constrained decoding: which tokens keep a text within a regular expression, schema or grammar.

The parsing is by llguidance (https://github.com/guidance-ai/llguidance), which the extra ``serve``
installs.
"""

import dataclasses
import functools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import numpy as np

from layers.config import ConfigError, check, check_choice

T = TypeVar("T")

# Bounds of what a client may send. They keep a compilation below about two seconds and 300 MB.
MOST_BYTES = {"regex": 8_192, "json_schema": 65_536, "lark": 16_384}
MOST_NESTED = 64  # levels of objects and lists in a schema
_LIMITS = dict(initial_lexer_fuel=200_000, step_lexer_fuel=100_000, max_lexer_states=50_000)
# The compiler is recursive: a chain of as many definitions as fit overflows a usual stack.
_STACK = 256 << 20
_stack_size = threading.Lock()  # it is that of all threads that start
# Without a bound on white space between its parts, a model may generate nothing else.
_JSON_OPTIONS = dict(lenient=False, whitespace_pattern=r"[\x20\x0A\x0D\x09]{0,16}")


class GrammarTokenizer(Protocol):
    """What of a tokenizer `compile_grammar` requires, e.g. of a `PromptTokenizer`.

    ``stop_tokens``: the tokens that end a text. ``to_json``: a ``tokenizer.json`` with its tokens.
    """

    @property
    def stop_tokens(self) -> tuple[int, ...]: ...

    @property
    def to_json(self) -> Callable[[], str]: ...


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The texts that a generation may have, as a whole.

    ``kind``: ``regex``, ``json_schema`` or ``lark``; see the functions of these names.

    Raises:
      ConfigError: ``text`` is too large, or nested too deeply, or is no JSON; names ``kind``.
    """

    kind: str
    text: str

    def __post_init__(self):
        check_choice("kind", self.kind, MOST_BYTES)
        check(isinstance(self.text, str), self.kind, self.text, "must be a text")
        _check_size(self.kind, self.text, MOST_BYTES[self.kind])
        if self.kind == "json_schema":
            _check_schema(self.text)

    @classmethod
    def regex(cls, text: str) -> "Grammar":
        """Texts that match a regular expression, of Rust's syntax, from beginning to end."""
        return cls("regex", text)

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> "Grammar":
        """JSON that a schema allows, with its properties in the schema's order."""
        return cls("json_schema", schema if isinstance(schema, str) else _to_json(schema))

    @classmethod
    def lark(cls, text: str) -> "Grammar":
        """Texts of a context-free grammar in llguidance's variant of the syntax of Lark."""
        return cls("lark", text)


class Matcher:
    """A text of a grammar token by token: which tokens may follow.

    A token may follow if a text of the grammar begins with what there is then. A token that ends
    a text may follow exactly if what there is already is a text of the grammar.

    ``error``: why the tokens that may follow cannot be computed, such as a limit on time or memory
    that they exceed, or None. After an error only an end may follow, and nothing is accepted.
    """

    def __init__(self, matcher: Any, ends: Sequence[int], vocab_size: int):
        self._matcher, self._ends, self._vocab_size = matcher, list(ends), vocab_size
        self._ended = False
        self._following_v: np.ndarray | None = None  # `mask`, if it is known
        self.error: str | None = None

    def mask(self) -> np.ndarray:
        """The tokens that may follow, bool ``[v]``; after the end only those that end a text."""
        if self._following_v is None:
            self._following_v = self._mask()
        return self._following_v.copy()

    def _mask(self) -> np.ndarray:
        allowed_v = np.zeros(self._vocab_size, bool)
        if not self._ended:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._check()
            known_v = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
            allowed_v[: len(known_v)] = known_v
        allowed_v[self._ends] = self.is_complete or self.error is not None
        return allowed_v

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        """`mask` after no, one, … all of ``drafts``, bool ``[len(drafts) + 1, v]``.

        All tokens are allowed after a draft that is not; the matcher is as before.
        """
        allowed_tv = np.ones((len(drafts) + 1, self._vocab_size), bool)
        accepted = 0
        for row, draft in enumerate([*drafts, None]):
            allowed_tv[row] = self.mask()
            if draft is None or not self.accept(draft):
                break
            accepted += 1
        self.rollback(accepted)
        return allowed_tv

    def accept(self, token: int) -> bool:
        """Add ``token`` and return True; if it may not follow, change nothing and return False."""
        if self._ended or self.error is not None:
            return False
        if not 0 <= token < self._vocab_size or not self.mask()[token]:
            return False
        self._following_v = None
        if token in self._ends:
            self._ended = True
            return True
        self._matcher.consume_token(token)
        self._check()
        self.mask()  # an error is known at once
        return self.error is None

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens that were accepted."""
        self._following_v = None if count > 0 else self._following_v
        if count > 0 and self._ended:
            self._ended, count = False, count - 1
        if count > 0:
            self._matcher.rollback(count)
            self._check()

    @property
    def is_complete(self) -> bool:
        """Whether what there is already is a text of the grammar."""
        return self.error is None and self._matcher.is_accepting()

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow: the text was ended, or is complete and cannot continue."""
        return self._ended or (self.is_complete and self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            self.error = _first_line(self._matcher.get_error())
            _compiled.cache_clear()  # copies share a lexer: those to come would find its limit too


def compile_grammar(grammar: Grammar, tokenizer: GrammarTokenizer, vocab_size: int) -> Matcher:
    """A matcher at the beginning of a text of ``grammar``.

    The tokens of a tokenizer are prepared once; a grammar that was compiled recently is not
    compiled again.

    Args:
      vocab_size: of the model; at least that of the tokenizer.

    Raises:
      ConfigError: llguidance is not installed, does not support the grammar or the tokenizer, or
        the grammar is too large to be compiled.
    """
    ends = tuple(token for token in tokenizer.stop_tokens if token < vocab_size)
    check(len(ends) > 0, "stop_tokens", tokenizer.stop_tokens,
          "a grammar requires a token that ends a text")  # fmt: skip
    return Matcher(_compiled(grammar, tokenizer, ends).deep_copy(), ends, vocab_size)


@functools.lru_cache(maxsize=16)
def _compiled(grammar: Grammar, tokenizer: GrammarTokenizer, ends: tuple[int, ...]) -> Any:
    llguidance, tokens = _import(), _tokens(tokenizer, ends)
    limits = llguidance.LLParserLimits(**_LIMITS, verbose_errors=False)

    def compiled():
        described = llguidance.LLMatcher.grammar_from_lark(_lark(grammar))
        matcher = llguidance.LLMatcher(tokens, described, log_level=0, limits=limits)
        matcher.compute_bitmask()  # part of the work is done when it is first required
        return matcher

    matcher = _with_large_stack(compiled)
    if matcher.is_error():
        reason = _first_line(matcher.get_error())
        if grammar.kind != "lark":  # it has a position in `_lark(grammar)`
            reason = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", reason)
        raise ConfigError(f"{grammar.kind}={grammar.text[:200]!r}: cannot be compiled: {reason}")
    return matcher


def _lark(grammar: Grammar) -> str:
    """``grammar`` in the syntax of Lark.

    Where only one text may follow, llguidance allows only the tokens by which its tokenizer would
    encode that, unless there is no forcing.
    """
    text = grammar.text
    if grammar.kind == "regex":
        text = f"start: /{_import().regex_to_lark(text, '')}/"
    elif grammar.kind == "json_schema":
        schema = json.loads(text)
        schema["x-guidance"] = _JSON_OPTIONS
        text = f"start: %json {json.dumps(schema)}"
    return f'{text}\n%llguidance {{"no_forcing": true}}\n'


@functools.lru_cache(maxsize=4)
def _tokens(tokenizer: GrammarTokenizer, ends: tuple[int, ...]) -> Any:
    """The tokens of ``tokenizer`` as llguidance has them."""
    try:
        return _import().LLTokenizer(tokenizer.to_json(), eos_token=list(ends))
    except ValueError as error:
        reason = _first_line(str(error))
        raise ConfigError(f"grammar: does not support this tokenizer: {reason}") from None


def _import() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "grammar: requires the `serve` extra (pip install -e '.[serve]')"
        ) from None
    return llguidance


def _with_large_stack(compute: Callable[[], T]) -> T:
    """``compute()`` in a thread of its own; raises what it raises."""
    future: Future[T] = Future()

    def run():
        try:
            future.set_result(compute())
        except BaseException as error:
            future.set_exception(error)

    with _stack_size:
        before = threading.stack_size(_STACK)
        try:
            threading.Thread(target=run).start()
        finally:
            threading.stack_size(before)
    return future.result()


def _to_json(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema: must be JSON: {_first_line(str(error))}") from None


def _check_size(field: str, text: str, most: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"{field}={text[:200]!r}: must be UTF-8") from None
    check(size <= most, field, f"{text[:50]}…", f"must have at most {most} bytes")


def _check_schema(text: str) -> None:
    """Raise `ConfigError` unless ``text`` is a JSON object within the bounds."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = f"json_schema={text[:200]!r}"
        raise ConfigError(f"{shown}: must be JSON: {_first_line(str(error))}") from None
    check(isinstance(schema, dict), "json_schema", text[:200], "must be a JSON object")
    ours = "x-guidance"
    check(ours not in schema, f"json_schema.{ours}", schema.get(ours), "is not supported")
    patterns = 0
    for depth, name, value in _values(schema):
        check(depth <= MOST_NESTED, "json_schema", f"{text[:50]}…",
              f"must be nested at most {MOST_NESTED} deep")  # fmt: skip
        if name == "pattern" and isinstance(value, str):
            patterns += len(value)
        elif name == "patternProperties" and isinstance(value, dict):
            patterns += sum(map(len, value))
    most = MOST_BYTES["regex"]
    check(patterns <= most, "json_schema", f"{text[:50]}…",
          f"must have at most {most} characters of patterns")  # fmt: skip


def _values(schema: Any) -> Iterator[tuple[int, str, Any]]:
    """(depth, name, value) of every member of the objects in ``schema``, at any depth."""
    level, depth = [schema], 0
    while level:
        depth += 1
        members = [m for value in level for m in _members(value)]
        yield from ((depth, name, value) for name, value in members)
        level = [value for _, value in members]


def _members(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return [("", item) for item in value] if isinstance(value, list) else []


def _first_line(text: str) -> str:
    """``text`` without the state of the library and the grammar that it may quote."""
    return " ".join(re.split(r"<state>|<non-verbose|\n +1 \| ", text)[0].split())[:300]
