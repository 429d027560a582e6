"""Seeded generators of tasks that isolate one ability: copying, recall, induction, tracking.

A task is a function ``task(rng, length, vocab_size, **parameters) -> (tokens, weights)``:
``tokens`` int32 ``[length]`` and ``weights`` float32 ``[length]``, 1 exactly where the token is an
answer that the tokens before it determine. If later tokens must not see the answers, the task
returns ``(tokens, weights, answers)``: the answers are predicted in place of the tokens. ``TASKS``
maps names to tasks.

The ``distance`` of a task is (index of the query) - (index of the answer's first appearance). A
causal window of W positions (the query sees itself and W - 1 positions before it) reaches the
answer in one layer if and only if ``distance < W``; n layers reach n * (W - 1).
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from layers.config import ConfigError, check, check_choice


def copy(
    rng: np.random.Generator, length: int, vocab_size: int, *, symbols: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``symbols`` random tokens, a delimiter, the same tokens again (Graves et al., 2014).

    Token 0 fills the beginning, 1 is the delimiter, symbols are 2 .. vocab_size - 1. The answer is
    the second copy; each of its tokens is ``symbols`` + 1 positions after its original.
    ``symbols`` defaults to the largest number that fits: (length - 1) // 2.
    """
    most = (length - 1) // 2
    count = most if symbols is None else symbols
    check(1 <= count <= most, "symbols", count, f"must be in [1, {most}] for length {length}")
    body = rng.integers(2, vocab_size, count)
    filler = np.zeros(length - 2 * count - 1, np.int64)
    tokens = np.concatenate([filler, body, [1], body])
    return tokens.astype(np.int32), _last(length, count)


def selective_copy(
    rng: np.random.Generator, length: int, vocab_size: int, *, symbols: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """As `copy`, with filler at random positions between the symbols (Gu & Dao 2023, §3.1).

    The positions of the symbols differ between examples, so that no fixed delay copies them.
    """
    most = (length - 1) // 2
    check(1 <= symbols <= most, "symbols", symbols, f"must be in [1, {most}] for length {length}")
    start = length - symbols  # of the answer
    body = rng.integers(2, vocab_size, symbols)
    tokens = np.zeros(length, np.int32)
    tokens[np.sort(rng.permutation(start - 1)[:symbols])] = body
    tokens[start - 1] = 1
    tokens[start:] = body
    return tokens, _last(length, symbols)


def word_problem(
    rng: np.random.Generator,
    length: int,
    vocab_size: int,
    *,
    symbols: int = 3,
    swaps: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Permutations of ``symbols`` elements, and after each the product of those before it.

    The task requires a state (Merrill 2024, arXiv:2404.08819, §5).

    Token ``i`` is the ``i``-th permutation in lexicographic order. With ``swaps=1`` only swaps of
    neighbours are drawn, which generate all others. The model does not see the answers: the answer
    at ``i`` is the product of the tokens before ``i``, the latest applied last.
    """
    check(2 <= symbols <= 6, "symbols", symbols, "must be in [2, 6]")
    check(swaps in (0, 1), "swaps", swaps, "must be 0 or 1")
    elements, table = _symmetric_group(symbols)
    count = len(elements)
    check(count <= vocab_size, "symbols", symbols, f"{count} permutations require as many tokens")
    drawn = np.arange(count)
    if swaps:
        # a swap of neighbours differs from the identity by 1 in two entries
        drawn = np.flatnonzero(np.abs(elements - np.arange(symbols)).sum(axis=1) == 2)
    tokens = rng.choice(drawn, length)
    answers = np.zeros(length, np.int32)  # the identity comes first
    for i in range(1, length):
        answers[i] = table[tokens[i - 1], answers[i - 1]]
    return tokens.astype(np.int32), (np.arange(length) >= 1).astype(np.float32), answers


@functools.cache
def _symmetric_group(symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """All permutations, and the index of ``a ∘ b`` for each pair of them."""
    elements = np.array(list(itertools.permutations(range(symbols))))
    index = {tuple(e): i for i, e in enumerate(elements)}
    table = np.array([[index[tuple(a[b])] for b in elements] for a in elements])
    return elements, table


def associative_recall(
    rng: np.random.Generator,
    length: int,
    vocab_size: int,
    *,
    pairs: int = 4,
    distance: int | None = None,
    queries: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Key-value pairs among filler, then some keys again, with their values (Ba et al., 2016).

    Token 0 is filler. The lower half of the others are keys (each used once), the upper half
    values. The last 2 * ``queries`` tokens are ``key value`` again; the answers are those values.

    Args:
      pairs: number of pairs shown, at least ``queries``.
      distance: exact distance of every query from its pair's value; None: pairs are anywhere.
        Pairs without a query are always anywhere.
      queries: number of pairs that are queried.
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
        offset, queried = start % 2, None
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
        # pairs do not overlap the queried block partly: slots have its parity
        offset, queried = first % 2, first // 2 + np.arange(queries)
    slots = (start - offset) // 2
    check(
        queries <= pairs <= min(slots, keys),
        "pairs",
        pairs,
        f"must be in [{queries}, {min(slots, keys)}] for length {length}, vocab_size "
        f"{vocab_size} and queries {queries}",
    )
    if queried is None:
        chosen = rng.permutation(slots)[:pairs]
    else:
        others = np.delete(np.arange(slots), queried)
        check(pairs - queries <= len(others), "pairs", pairs, f"must be at most {slots}")
        chosen = np.concatenate([queried, rng.permutation(others)[: pairs - queries]])
    pair_kv = np.stack(
        [1 + rng.permutation(keys)[:pairs], rng.integers(1 + keys, vocab_size, pairs)], axis=1
    )
    tokens = np.zeros(length, np.int32)
    positions = offset + 2 * chosen
    tokens[positions], tokens[positions + 1] = pair_kv[:, 0], pair_kv[:, 1]
    tokens[start:] = pair_kv[:queries].reshape(-1)
    weights = np.zeros(length, np.float32)
    weights[start + 1 :: 2] = 1
    return tokens, weights


def induction(
    rng: np.random.Generator,
    length: int,
    vocab_size: int,
    *,
    distance: int | None = None,
    queries: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one ``trigger x``; the last two tokens are ``trigger x`` (Fu et al., 2023).

    Token 0 is the trigger, all others are noise. The answers are the tokens after all triggers but
    the first.

    Args:
      distance: from the last trigger to the first x; None: drawn for each example.
      queries: how often the trigger is repeated; more repetitions teach faster. With more than one,
        their positions are random, and ``distance`` must be None.
    """
    query = length - 2
    if queries != 1:
        most = query // 2
        check(1 <= queries <= most, "queries", queries, f"must be in [1, {most}]")
        check(distance is None, "distance", distance, "must be None with more than one query")
        tokens = rng.integers(1, vocab_size, length).astype(np.int32)
        positions = np.append(2 * np.sort(rng.permutation(most)[:queries]), query)
        tokens[positions], tokens[positions + 1] = 0, tokens[positions[0] + 1]
        weights = np.zeros(length, np.float32)
        weights[positions[1:] + 1] = 1
        return tokens, weights
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
    """float32 ``[length]``: 1 at the last ``count`` positions, 0 before."""
    return (np.arange(length) >= length - count).astype(np.float32)


Task = Callable[..., tuple[np.ndarray, ...]]
TASKS: dict[str, Task] = {
    "copy": copy,
    "selective_copy": selective_copy,
    "associative_recall": associative_recall,
    "induction": induction,
    "word_problem": word_problem,
}


def generate(
    task: str, seed: Sequence[int], length: int, vocab_size: int, parameters: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One example ``(tokens, weights, answers)``: equal arguments give equal examples everywhere.

    Raises:
      ConfigError: an unknown task or parameter, or a value that is invalid at this length.
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
        example = function(np.random.default_rng(tuple(seed)), length, vocab_size, **parameters)
    except ConfigError as error:
        raise ConfigError(f"parameters.{error}") from None
    tokens, weights, *answers = example
    return tokens, weights, answers[0] if answers else tokens
