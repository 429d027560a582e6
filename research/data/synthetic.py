"""Seeded generators of tasks that isolate one ability: copying, recall, induction.

A task is a function ``task(rng, length, vocab_size, **parameters) -> (tokens, weights)``:
``tokens`` int32 ``[length]`` and ``weights`` float32 ``[length]``, 1 exactly where the token is an
answer that the tokens before it determine. ``TASKS`` is the registry: a plain dict.

Where a task has a ``distance``, it is (index of the query) - (index of the answer's first
appearance). A causal window of W positions (the query sees itself and W - 1 before it) reaches
the answer in one layer if and only if ``distance < W``; n layers reach n * (W - 1).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from layers.config import ConfigError, check, check_choice


def copy(
    rng: np.random.Generator, length: int, vocab_size: int, *, symbols: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``symbols`` random tokens, a delimiter, the same tokens again (Graves et al., 2014).

    Token 0 fills the front, 1 is the delimiter, symbols are 2 .. vocab_size - 1. The answer is
    the second copy; each of its tokens lies ``symbols`` + 1 after its original.
    ``symbols`` defaults to the most that fit: (length - 1) // 2.
    """
    most = (length - 1) // 2
    count = most if symbols is None else symbols
    check(1 <= count <= most, "symbols", count, f"must be in [1, {most}] for length {length}")
    body = rng.integers(2, vocab_size, count)
    filler = np.zeros(length - 2 * count - 1, np.int64)
    tokens = np.concatenate([filler, body, [1], body])
    return tokens.astype(np.int32), _last(length, count)


def associative_recall(
    rng: np.random.Generator,
    length: int,
    vocab_size: int,
    *,
    pairs: int = 4,
    distance: int | None = None,
    queries: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Key-value pairs among filler, then keys asked again for their values (Ba et al., 2016).

    Token 0 is filler; the lower half of the rest are keys (each used once), the upper half
    values. The last 2 * ``queries`` tokens are ``key value`` again; the answers are those values.

    Args:
      pairs: number of pairs shown, at least ``queries``.
      distance: exact distance of every query from its pair's value, or None for pairs placed
        anywhere. The other pairs are placed anywhere.
      queries: number of pairs asked for.
    """
    keys = (vocab_size - 1) // 2
    start = length - 2 * queries  # the first query
    check(
        queries >= 1 and start >= 2 * queries,
        "queries",
        queries,
        f"must be in [1, {length // 4}] for length {length}",
    )
    if distance is None:
        offset, asked = start % 2, None
    else:
        # queries and their pairs are two blocks of the same shape, `distance` + 1 apart
        low, high = 2 * queries - 1, start - 1
        check(
            low <= distance <= high,
            "distance",
            distance,
            f"must be in [{low}, {high}] for length {length} and queries {queries}",
        )
        first = start - distance - 1
        # a pair never straddles the queried block, so slots share its parity
        offset, asked = first % 2, first // 2 + np.arange(queries)
    slots = (start - offset) // 2
    check(
        queries <= pairs <= min(slots, keys),
        "pairs",
        pairs,
        f"must be in [{queries}, {min(slots, keys)}] for length {length}, vocab_size "
        f"{vocab_size} and queries {queries}",
    )
    if asked is None:
        chosen = rng.permutation(slots)[:pairs]
    else:
        others = np.delete(np.arange(slots), asked)
        check(pairs - queries <= len(others), "pairs", pairs, f"must be at most {slots}")
        chosen = np.concatenate([asked, rng.permutation(others)[: pairs - queries]])
    pair_kv = np.stack(
        [1 + rng.permutation(keys)[:pairs], rng.integers(1 + keys, vocab_size, pairs)], axis=1
    )
    tokens = np.zeros(length, np.int32)
    at = offset + 2 * chosen
    tokens[at], tokens[at + 1] = pair_kv[:, 0], pair_kv[:, 1]
    tokens[start:] = pair_kv[:queries].reshape(-1)
    weights = np.zeros(length, np.float32)
    weights[start + 1 :: 2] = 1
    return tokens, weights


def induction(
    rng: np.random.Generator, length: int, vocab_size: int, *, distance: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Noise holding one ``trigger x``; the last two tokens are ``trigger x`` (Fu et al., 2023).

    Token 0 is the trigger, the rest is noise. The answer is the last token. ``distance`` is from
    the second trigger to the first x; None draws it for each example.
    """
    query = length - 2
    if distance is None:
        distance = int(rng.integers(1, query)) if query > 1 else 0
    check(
        1 <= distance < query,
        "distance",
        distance,
        f"must be in [1, {query - 1}] for length {length}, which must be at least 4",
    )
    tokens = rng.integers(1, vocab_size, length).astype(np.int32)
    tokens[query - distance - 1] = tokens[query] = 0
    tokens[-1] = tokens[query - distance]
    return tokens, _last(length, 1)


def _last(length: int, count: int) -> np.ndarray:
    """float32 ``[length]``: 1 on the last ``count``."""
    return (np.arange(length) >= length - count).astype(np.float32)


Task = Callable[..., tuple[np.ndarray, np.ndarray]]
TASKS: dict[str, Task] = {
    "copy": copy,
    "associative_recall": associative_recall,
    "induction": induction,
}


def generate(
    task: str, seed: Sequence[int], length: int, vocab_size: int, parameters: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """One example: the same for the same arguments, on every machine and process.

    Raises:
      ConfigError: unknown task or parameter, or a value the task cannot use at this length.
    """
    check_choice("task", task, TASKS)
    function = TASKS[task]
    known = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for name, value in parameters.items():
        check(
            name in known,
            f"parameters.{name}",
            value,
            f"task {task!r} takes {', '.join(known) or 'no parameters'}",
        )
        check(
            value is None or (isinstance(value, int) and not isinstance(value, bool)),
            f"parameters.{name}",
            value,
            "must be an integer or None",
        )
    try:
        return function(np.random.default_rng(tuple(seed)), length, vocab_size, **parameters)
    except ConfigError as error:
        raise ConfigError(f"parameters.{error}") from None
