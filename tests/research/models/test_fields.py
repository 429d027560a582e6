"""Typed reads of JSON objects: each wrong type, null or value is refused by name."""

import json
import re

import pytest

from layers.config import ConfigError
from research.models.fields import LARGEST, Fields

NUMBERS = ("2", True, [2], {"a": 2}, float("nan"), float("inf"), -float("inf"))


def refused(read, value, *args, **limits):
    """The one line that refuses ``value`` for the field ``x``."""
    with pytest.raises(ConfigError, match="^part.x.*: must ") as raised:
        getattr(Fields({"x": value}, "part."), read)("x", *args, **limits)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "read, wrong",
    [
        ("integer", (*NUMBERS, 2.0, 0, -1, LARGEST + 1, 10**400, None)),
        ("number", (*NUMBERS, 10**400, None)),
        ("flag", (0, 1, 0.0, "true", [], None)),
        ("text", (0, True, ["a"], {}, None)),
        ("texts", ("ab", {"a": "b"}, [1], ["a", None], ["a" * 99], None)),
        ("items", ("ab", {"a": "b"}, 1, None)),
    ],
)
def test_another_type_is_refused(read, wrong):
    for value in wrong:
        # a default is no excuse for a wrong value
        for default in ((), (4,)):
            refused(read, value, *default)


@pytest.mark.parametrize("wrong", [[1, 2], "a", 3, True])
def test_what_is_not_an_object_is_refused(wrong):
    refused("object", wrong)
    with pytest.raises(ConfigError, match="the file=.*: must be an object"):
        Fields(wrong)


def test_values_within_the_limits_are_read():
    fields = Fields(dict(i=3, n=2, f=0.5, b=False, t="a", l=["a", "b"], o={"i": 1}, z=None))
    assert fields.integer("i") == 3 and fields.integer("j", 4) == 4
    assert type(fields.number("n")) is float and fields.number("f", 1.0) == 0.5
    assert fields.flag("b") is False and fields.text("t", choices=("a",)) == "a"
    assert fields.texts("l", count=2) == ["a", "b"] and fields.items("l") == ["a", "b"]
    assert fields.object("o").integer("i") == 1 and not fields.object("z")
    assert fields.integer("z", None) is None and fields.integer("z", 4, null=5) == 5
    assert "i" in fields and "z" not in fields and "j" not in fields


def test_limits_are_named():
    assert refused("integer", 3, at_least=4).endswith("x=3: must be ≥ 4")
    assert refused("integer", 3, at_most=2).endswith("x=3: must be ≤ 2")
    assert refused("number", 0, above=0).endswith("x=0: must be > 0")
    assert refused("number", -0.5, at_least=0).endswith("x=-0.5: must be ≥ 0")
    assert refused("number", 1.0, below=1).endswith("x=1.0: must be < 1")
    assert "must be one of on, off (did you mean 'off'?)" in refused(
        "text", "of", choices=("on", "off")
    )
    assert refused("texts", ["a"], count=2).endswith("must have 2 elements, not 1")
    with pytest.raises(ConfigError, match="^part.y: is missing$"):
        Fields({}, "part.").integer("y")


def test_only_accepts_one_value_of_one_type():
    fields = Fields(dict(a=1, b=True, c=None, d=8.0))
    fields.only(a=1, b=True, c=None, d=8, absent=3)
    for name, other in (("a", True), ("b", 1), ("c", 0), ("a", None), ("d", 9)):
        with pytest.raises(ConfigError, match=f"^{name}=.*: must be "):
            fields.only(**{name: other})
    fields.same("a", "absent")
    with pytest.raises(ConfigError, match="^a=1: must be d=8.0"):
        fields.same("a", "d")


def test_what_was_not_read_is_remembered():
    fields = Fields({"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": {}, "g": {"h": 4}})
    fields.integer("a")
    fields.object("b").object("d")
    assert dict(fields.unread()) == {"b.c": 2, "b.d.e": 3, "f": {}, "g": {"h": 4}}
    fields.object("g").read_all()
    fields.unused("f")
    fields.object("b").only(c=2)
    assert dict(fields.unread()) == {"b.d.e": 3}


def test_a_long_value_is_cut():
    deep = json.loads("[" * 900 + "]" * 900)
    for value in ("a" * 10**6, list(range(10**5)), dict.fromkeys(map(str, range(1000))), deep):
        assert len(refused("integer", value)) < 300
    assert not re.search("did you mean", refused("text", "on" * 10**6, choices=("on", "off")))
