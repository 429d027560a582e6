"""What differs between the fingerprints of two data sets, in words."""

import collections
import itertools
from collections.abc import Mapping
from typing import Any

_NAMED = 4  # differences that are named one by one


def what_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two results of `research.data.fingerprint`; empty if the data is equal.

    A phrase for each file that was changed, removed or added, for the order of the files, and for
    the tokenizer; sizes and hashes are given then and now. A file that has only another name is no
    difference.
    """
    found = []
    if before.get("sha256") != now["sha256"]:
        if "parts" in before and "parts" in now:
            found += _parts(before["parts"], now["parts"])
        else:
            name = f"task {now['task']!r}" if "task" in now else "content"
            found.append(f"{name}: {_size(before)} then, {_size(now)} now")
    if before.get("tokenizer_sha256") != now.get("tokenizer_sha256"):
        hashes = (str(r.get("tokenizer_sha256"))[:12] for r in (before, now))
        found.append("tokenizer {!r}: sha256 {} then, {} now".format(now.get("tokenizer"), *hashes))
    if not found:  # another version of what reads or tokenises the same bytes
        found += [
            f"{name}: {before.get(name)} then, {now.get(name)} now"
            for name in ("documents", "tokens", "vocab_size")
            if before.get(name) != now.get(name)
        ]
    more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
    return found[:_NAMED] + more


def _parts(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """A phrase for each part that is not in both lists, or for their order."""
    sides = [collections.defaultdict(list) for _ in range(2)]
    for parts, other, by_name in zip((before, now), (now, before), sides, strict=True):
        unmatched = [part["split"] + part["sha256"] for part in other]
        for part in parts:
            if (key := part["split"] + part["sha256"]) in unmatched:
                unmatched.remove(key)
            else:
                by_name[part["name"]].append(part)
    found = [
        f"{name}: {_size(old)} then, {_size(new)} now"
        for name in {**sides[0], **sides[1]}
        for old, new in itertools.zip_longest(*(side[name] for side in sides))
    ]
    return found or ["the order of the files"]


def _size(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return "absent"
    size = f"{part['bytes']:,} bytes, " if "bytes" in part else ""
    return f"{size}sha256 {part['sha256'][:12]}"
