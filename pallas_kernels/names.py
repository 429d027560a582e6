"""A name that is not known: the known one that is most like it, for the error that refuses it."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``did you mean 'tpu'?`` of ``name`` 'tpus'; empty if none of ``known`` is like it."""
    match = difflib.get_close_matches(str(name), list(known), 1)
    return f"did you mean {match[0]!r}?" if match else ""


def suggest(name: object, known: Iterable[str]) -> str:
    """`did_you_mean`, or every name of ``known`` where none is like ``name``."""
    known = list(known)
    return did_you_mean(name, known) or f"known: {', '.join(known) or 'none'}"


def one_of(name: object, known: Iterable[str]) -> str:
    """``one of xla, tpu (did you mean 'tpu'?)``: what ``name`` must be."""
    known = list(known)
    near = did_you_mean(name, known)
    return f"one of {', '.join(known)}{f' ({near})' if near else ''}"
