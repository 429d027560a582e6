"""Kept prefixes: their keys, their order, and the pages that they hold."""

import numpy as np
import pytest

from research.inference.engine.pages import Pages
from research.inference.engine.prefixes import Prefixes, chain, root


def test_keys_differ_with_every_name_and_every_earlier_token():
    names = ["", "a", "b", "ab"]
    roots = {root(model, adapter, salt) for model in names for adapter in names for salt in names}
    assert len(roots) == len(names) ** 3  # ("a", "b", "") is not ("ab", "", "")
    tokens = list(range(12))
    keys = chain(b"r", tokens, 4)
    assert len(keys) == 3 and chain(b"r", tokens[:11], 4) == keys[:2]
    for at in range(12):
        changed = chain(b"r", [*tokens[:at], 99, *tokens[at + 1 :]], 4)
        same = [a == b for a, b in zip(keys, changed, strict=True)]
        assert same == [i < at // 4 for i in range(3)]
    assert chain(b"s", tokens, 4)[0] != keys[0]
    # ids are whole: 256 is not the bytes of 0 and 1
    assert chain(b"r", [256, 0], 2) != chain(b"r", [0, 1], 2)


def kept_in(pages, *, limit=100):
    """Prefixes of two branches: 0 → 1 → 2 and 0 → 3, each with one page and 10 bytes."""
    prefixes = Prefixes(pages, limit)
    for key, parent in ((b"0", None), (b"1", b"0"), (b"2", b"1"), (b"3", b"0")):
        page = pages.allocate(1)
        prefixes.keep(key, parent, page, "snapshot", 10)
        pages.release(page)  # by the sequence that computed it
    return prefixes


def test_the_longest_prefix_that_is_kept():
    prefixes = kept_in(Pages(8, 2))
    found = prefixes.longest([b"0", b"1", b"9", b"2"])
    assert [prefix.key for prefix in found] == [b"0", b"1"]
    assert prefixes.longest([b"1"]) != [] and prefixes.longest([b"9", b"0"]) == []


def test_the_least_recently_used_end_is_dropped_first():
    pages = Pages(4, 2)
    prefixes = kept_in(pages)
    prefixes.longest([b"0", b"1", b"2"])
    assert pages.free == 0 and prefixes.make_room(1)
    assert b"3" not in prefixes and len(prefixes) == 3
    assert prefixes.make_room(3) and len(prefixes) == 1 and b"0" in prefixes
    assert prefixes.make_room(4) and not prefixes.make_room(5)


def test_pages_in_use_are_not_dropped():
    pages = Pages(4, 2)
    prefixes = kept_in(pages)
    used = [prefix.pages[0] for prefix in prefixes.longest([b"0", b"1", b"2"])]
    pages.share(used)
    assert not prefixes.make_room(2) and len(prefixes) == 4  # nothing is dropped in vain
    assert prefixes.make_room(1) and not prefixes.make_room(2)
    assert len(prefixes) == 3
    pages.release(used)
    assert prefixes.make_room(4)


def test_snapshots_have_a_limit_of_bytes():
    pages = Pages(8, 2)
    prefixes = kept_in(pages, limit=40)
    page = pages.allocate(1)
    prefixes.keep(b"4", b"3", page, "snapshot", 10)
    assert b"2" not in prefixes and b"4" in prefixes and pages.free == 4
    prefixes.keep(b"5", b"2", page, "snapshot", 10)  # the one before it is not kept
    prefixes.keep(b"6", b"4", page, "snapshot", 41)  # too large
    assert b"5" not in prefixes and b"6" not in prefixes
    prefixes.clear()
    pages.release(page)
    assert pages.free == 8 and len(prefixes) == 0


def test_a_page_is_free_when_nothing_holds_it():
    pages, random, held = Pages(16, 4), np.random.default_rng(0), []
    for _ in range(500):
        if random.random() < 0.5:
            new = pages.allocate(int(random.integers(1, 5)))
            held += [] if new is None else [new]
        elif held and random.random() < 0.5:
            again = held[random.integers(len(held))]
            pages.share(again)
            held.append(again)
        elif held:
            pages.release(held.pop(random.integers(len(held))))
        counts = np.zeros(16, int)
        for group in held:
            np.add.at(counts, group, 1)
        assert [pages.holders(page) for page in range(16)] == counts.tolist()
        assert pages.free == np.sum(counts == 0)
    assert pages.allocate(17) is None and pages.needed(9) == 3
    with pytest.raises(AssertionError):
        Pages(2, 4).release([0])
