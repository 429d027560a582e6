"""Grammars: masks against partial matches of `regex`, samples against `jsonschema`."""

import json
import re
import sys
import threading
import time

import jsonschema
import numpy as np
import pytest
import tokenizers

from layers.config import ConfigError
from research.data import load_tokenizer, train_bpe
from research.inference import PromptTokenizer
from research.inference import grammar as grammars
from research.inference.grammar import Grammar, compile_grammar

pytest.importorskip("llguidance")
V = 300  # more than the tokens
TEXT = [
    '{"name": "Ada", "age": 36, "tags": ["a", "b"], "ok": true}',
    "abc ab ba the cat 2026-11-27",
]


def byte_level():
    return load_tokenizer("byte")


def merged(folder):
    train_bpe(TEXT * 5, 290, folder / "tokenizer.json")
    return load_tokenizer(str(folder / "tokenizer.json"))


def byte_fallback():
    """As of Llama 2: pieces with ▁ for a space, and bytes for what has no piece."""
    pieces = ["▁", "a", "b", "▁a", "ab", "▁ab", '"', '":', "{", "}"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab"), ('"', ":")]
    model = tokenizers.models.BPE(
        {name: i for i, name in enumerate(names)} | {":": len(names)},
        merges, byte_fallback=True, unk_token="<unk>",
    )  # fmt: skip
    tokenizer = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PromptTokenizer(
        lambda text: tokenizer.encode(text).ids, tokenizer.decode, (2,), tokenizer.to_str
    )


@pytest.fixture(scope="module", params=["bytes", "merged", "fallback"])
def tokenizer(request, tmp_path_factory):
    if request.param == "merged":
        return merged(tmp_path_factory.mktemp("merged"))
    return byte_level() if request.param == "bytes" else byte_fallback()


BYTES = byte_level()
END = 257


def walk(matcher, tokenizer, random, steps=200, likely=()):
    """Random allowed tokens until the matcher is done; ``likely`` ones in half of the steps."""
    tokens = []
    while not matcher.is_done and len(tokens) < steps:
        allowed = np.flatnonzero(matcher.mask())
        preferred = np.intersect1d(allowed, likely)
        if len(preferred) and random.random() < 0.5:
            allowed = preferred
        tokens.append(int(random.choice(allowed)))
        assert matcher.accept(tokens[-1])
    return [token for token in tokens if token not in tokenizer.stop_tokens]


@pytest.mark.parametrize(
    "pattern", ["a+b", "(ab|ba){1,3} ?", "[a-c]*(20|ab)[0-9]", "", "the (cat)?"]
)
def test_a_token_is_allowed_exactly_if_the_pattern_can_still_match(tokenizer, pattern):
    regex = pytest.importorskip("regex")
    random = np.random.default_rng(0)
    for _ in range(3):
        matcher, tokens = compile_grammar(Grammar.regex(pattern), tokenizer, V), []
        while not matcher.is_done and len(tokens) < 12:
            text, allowed = tokenizer.decode(tokens), matcher.mask()
            assert allowed.dtype == bool and allowed.shape == (V,)
            complete = re.fullmatch(pattern, text) is not None
            assert matcher.is_complete == complete
            for token in range(V):
                if token in tokenizer.stop_tokens:
                    assert allowed[token] == complete
                    continue
                longer = tokenizer.decode([*tokens, token])
                is_new = len(longer) > len(text)  # special tokens and incomplete bytes add nothing
                fits = is_new and regex.fullmatch(pattern, longer, partial=True) is not None
                assert allowed[token] == fits, (text, token, longer)
            token = int(random.choice(np.flatnonzero(allowed)))
            assert matcher.accept(token)
            tokens.append(token)


SCHEMAS = [
    dict(
        type="object",
        properties=dict(
            name=dict(type="string", maxLength=6),
            age=dict(type="integer", minimum=0, maximum=150),
            tags=dict(type="array", items=dict(enum=["a", "b"]), maxItems=2),
            ok=dict(type="boolean"),
        ),
        required=["name", "age"],
        additionalProperties=False,
    ),
    {
        "$defs": {
            "node": dict(
                type="object",
                properties=dict(
                    value=dict(type="number", exclusiveMinimum=-1, maximum=1),
                    next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                ),
                required=["value", "next"],
                additionalProperties=False,
            )
        },
        "$ref": "#/$defs/node",
    },
    dict(type="string", pattern="^[a-c]{2}-[0-9]+$"),
    dict(type="array", prefixItems=[dict(const=1), dict(type="null")], minItems=2, maxItems=2),
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=["object", "recursive", "pattern", "tuple"])
def test_random_tokens_under_the_mask_are_valid_json(tokenizer, schema):
    random, complete = np.random.default_rng(1), 0
    likely = [token for text in '"}],01' for token in tokenizer.encode(text)]
    for _ in range(8):
        matcher = compile_grammar(Grammar.json_schema(schema), tokenizer, V)
        tokens = walk(matcher, tokenizer, random, likely=[*likely, *tokenizer.stop_tokens])
        if matcher.is_complete:
            complete += 1
            jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)
    assert complete >= 6


def test_a_text_that_the_schema_does_not_allow_is_refused_where_it_errs():
    matcher = compile_grammar(Grammar.json_schema(SCHEMAS[0]), BYTES, V)
    for token in BYTES.encode('{"name":"Ada","age":15'):
        assert matcher.accept(token)
    assert not matcher.accept(ord("1")) and not matcher.accept(END) and matcher.accept(ord("0"))
    assert not matcher.accept(ord("0")) and matcher.accept(ord("}")) and matcher.is_complete


def test_white_space_between_parts_is_bounded():
    matcher = compile_grammar(Grammar.json_schema({"type": "array"}), BYTES, V)
    assert matcher.accept(ord("["))
    assert [matcher.accept(ord(" ")) for _ in range(17)] == [True] * 16 + [False]


LARK = """
start: sum
sum: product | sum "+" product
product: NUMBER | "(" sum ")"
NUMBER: /[0-9]+/
"""


def test_a_context_free_grammar_allows_balanced_texts():
    random = np.random.default_rng(2)
    likely = [*b")1", END]
    for _ in range(10):
        matcher = compile_grammar(Grammar.lark(LARK), BYTES, V)
        text = BYTES.decode(walk(matcher, BYTES, random, likely=likely))
        if matcher.is_complete:
            assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)  # Python's own grammar
    matcher = compile_grammar(Grammar.lark(LARK), BYTES, V)
    assert all(map(matcher.accept, b"((1+2)")) and not matcher.accept(END)
    assert not any(map(matcher.accept, b"(x"))
    assert matcher.accept(ord(")")) and not matcher.accept(ord(")")) and matcher.accept(END)


@pytest.mark.parametrize("pattern", ["a+b?", "a{3}", "(ab)*"])
def test_tokens_are_taken_back(pattern):
    """Also the token that ends a text; masks are those of before, also after a refusal."""
    random, tokens = np.random.default_rng(3), []
    matcher = compile_grammar(Grammar.regex(pattern), BYTES, V)
    masks, done = [matcher.mask()], [matcher.is_done]
    for _ in range(80):
        token = int(random.choice([ord("a"), ord("b"), ord("z"), END]))
        assert matcher.accept(token) == (masks[-1][token] and END not in tokens)
        if masks[-1][token] and END not in tokens:
            tokens.append(token)
            masks.append(matcher.mask())
            done.append(matcher.is_done)
        elif random.random() < 0.5:
            count = int(random.integers(0, len(tokens) + 1))
            matcher.rollback(count)
            for states in (tokens, masks, done):
                del states[len(states) - count :]
        np.testing.assert_array_equal(matcher.mask(), masks[-1])
        assert matcher.is_done == done[-1]


def test_masks_over_drafts_are_those_of_each_beginning():
    drafts = list(b"aab")
    matcher = compile_grammar(Grammar.regex("a+b"), BYTES, V)
    before, got = matcher.mask(), matcher.masks(drafts)
    np.testing.assert_array_equal(matcher.mask(), before)
    for count, row in enumerate(got):
        alone = compile_grammar(Grammar.regex("a+b"), BYTES, V)
        assert all(map(alone.accept, drafts[:count]))
        np.testing.assert_array_equal(row, alone.mask())
    refused = matcher.masks([ord("a"), ord("c"), ord("b"), END])
    np.testing.assert_array_equal(refused[:2], got[:2])
    assert refused.shape == (5, V) and refused[2:].all()
    ended = matcher.masks([*drafts, END])
    assert np.flatnonzero(ended[3]).tolist() == np.flatnonzero(ended[4]).tolist() == [END]
    np.testing.assert_array_equal(matcher.mask(), before)


def test_the_tokens_and_a_grammar_are_prepared_once():
    calls = []
    data = load_tokenizer("byte")
    tokenizer = PromptTokenizer(
        data.encode, data.decode, (END, 999), lambda: calls.append(0) or data.to_json()
    )
    one, other = (compile_grammar(Grammar.regex("ab"), tokenizer, V) for _ in range(2))
    compile_grammar(Grammar.regex("ba"), tokenizer, V)
    assert len(calls) == 1
    assert one.accept(ord("a")) and not other.accept(ord("b"))  # but each has its own text
    assert one.accept(ord("b")) and one.is_done and not other.is_done


def chain(count):
    """Definitions that each refer to the next, and nest 55 deep themselves."""
    bodies = [f'{{"$ref":"#/$defs/{i + 1}"}}' for i in range(count)]
    for _ in range(55):
        bodies = [f'{{"items":{body}}}' for body in bodies]
    bodies = [f'"{i}":{body}' for i, body in enumerate([*bodies, "{}"])]
    return f'{{"$ref":"#/$defs/0","$defs":{{{",".join(bodies)}}}}}'


TERMINALS = "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40))
PRODUCT = [dict(anyOf=[dict(required=[f"{i}{j}"]) for j in range(9)]) for i in range(9)]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "a(", 'cannot be compiled: invalid regex "a("'),
        ("regex", "(?=a)a", "look-ahead"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "a" * 8_193, "must have at most 8192 bytes"),
        ("regex", "\ud800", "must be UTF-8"),
        ("regex", 3, "regex=3: must be a text"),
        ("lark", 'start: "a" rest', 'unknown name: "rest"'),
        ("lark", "start: " + "(" * 2_000 + '"a"' + ")" * 2_000, "too deeply nested"),
        ("lark", f'start: T0\n{TERMINALS}\nT40: "a"', "too big"),
        ("json_schema", '{"type": "object"', "must be JSON: Expecting"),
        ("json_schema", "[" * 9_000, "must be JSON: maximum recursion depth"),
        ("json_schema", "[]", "must be a JSON object"),
        ("json_schema", '{"type": "foo"}', "cannot be compiled: Invalid type: foo"),
        ("json_schema", '{"uniqueItems":true}', 'Unimplemented keys: ["uniqueItems"]'),
        ("json_schema", {"x-guidance": {}}, "json_schema.x-guidance={}: is not supported"),
        ("json_schema", '{"enum":[1],"type":"string"}', "Unsatisfiable"),
        ("json_schema", '{"$ref":"#"}', "cannot be compiled"),
        ("json_schema", '{"items":' * 65 + "{}" + "}" * 65, "must be nested at most 64 deep"),
        ("json_schema", {"pattern": "a" * 8_193}, "must have at most 8192 characters of patterns"),
        ("json_schema", {"patternProperties": {"a" * 8_193: {}}}, "8192 characters of patterns"),
        ("json_schema", {"allOf": PRODUCT}, "cannot be compiled: schema too large"),
        ("json_schema", {"enum": [float("nan")]}, "json_schema: must be JSON: Out of range float"),
        ("json_schema", {"enum": [b"a"]}, "json_schema: must be JSON: Object of type bytes"),
        ("yaml", "a", "kind='yaml': must be one of regex, json_schema, lark"),
    ],
)  # fmt: skip
def test_refuses_in_one_line_that_names_the_field(kind, text, message):
    with pytest.raises(ConfigError) as raised:
        make = getattr(Grammar, kind, lambda text: Grammar(kind, text))
        compile_grammar(make(text), BYTES, V)
    line = str(raised.value)
    assert message in line and "\n" not in line and len(line) < 1_000
    assert line.startswith("kind" if kind == "yaml" else kind)


def test_a_chain_of_definitions_does_not_overflow_the_stack():
    """2,500 levels of recursion: the process would end."""
    compile_grammar(Grammar.json_schema(chain(45)), BYTES, V)


def test_two_compilations_at_once_leave_the_size_of_stacks_as_it_was(monkeypatch):
    set_size, before = threading.stack_size, threading.stack_size()

    def slowly(size):
        old = set_size(size)
        time.sleep(0.02)  # for the other thread to come between
        return old

    monkeypatch.setattr(threading, "stack_size", slowly)
    threads = [threading.Thread(target=grammars._with_large_stack, args=(dict,)) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert set_size() == before


def test_a_fault_of_a_compilation_is_raised_as_it_is():
    with pytest.raises(ZeroDivisionError):
        grammars._with_large_stack(lambda: 1 // 0)


def test_what_takes_too_much_work_later_is_an_error_of_that_text():
    pattern = Grammar.regex("(a|b|ab|ba|[^c]{3,500}){1,500}")
    matcher, random = compile_grammar(pattern, BYTES, V), np.random.default_rng(0)
    with pytest.raises(AssertionError):  # nothing is accepted after it
        walk(matcher, BYTES, random, 300, likely=[*b"ab"])
    assert matcher.error == "lexer error: too many expressions constructed"
    assert np.flatnonzero(matcher.mask()).tolist() == [END] and not matcher.accept(END)
    assert np.flatnonzero(matcher.masks([97])[0]).tolist() == [END] and not matcher.is_done
    other = compile_grammar(pattern, BYTES, V)  # copies share what was computed, but not this one
    assert other.accept(97) and other.accept(98) and other.error is None


def test_refuses_a_tokenizer_without_an_end_or_whose_pieces_are_unknown():
    data = load_tokenizer("byte")
    endless = PromptTokenizer(data.encode, data.decode, (V,), data.to_json)
    with pytest.raises(ConfigError, match=r"^stop_tokens=\(300,\): a grammar requires a token"):
        compile_grammar(Grammar.regex("a"), endless, V)
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
    pieces.decoder = tokenizers.decoders.WordPiece()
    words = PromptTokenizer(data.encode, data.decode, (0,), pieces.to_str)
    with pytest.raises(ConfigError, match="^grammar: does not support this tokenizer: .*WordPiece"):
        compile_grammar(Grammar.regex("a"), words, V)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    grammars._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="^grammar: requires the `serve` extra"):
        compile_grammar(Grammar.regex("a"), BYTES, V)
