"""Suggestions for unknown names in error messages: the most similar known name."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``did you mean 'tpu'?`` for ``name`` 'tpus'; empty if no name in ``known`` is similar."""
    match = difflib.get_close_matches(str(name), list(known), 1)
    return f"did you mean {match[0]!r}?" if match else ""


def suggest(name: object, known: Iterable[str]) -> str:
    """`did_you_mean`, or all names in ``known`` if none is similar to ``name``."""
    known = list(known)
    return did_you_mean(name, known) or f"known: {', '.join(known) or 'none'}"


def one_of(name: object, known: Iterable[str]) -> str:
    """``one of xla, tpu (did you mean 'tpu'?)``: the allowed values of ``name``."""
    known = list(known)
    near = did_you_mean(name, known)
    return f"one of {', '.join(known)}{f' ({near})' if near else ''}"
