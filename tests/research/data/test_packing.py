"""Packing: each token once, segments apart, targets from the same document."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import research.data.dataset as dataset_module
from research.data import DataConfig, make_dataset
from research.data.packing import join

BOS, EOS = 256, 257
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def unique_documents(sizes):
    """Documents whose every token is a different id, so that a row tells where it came from."""
    ids = np.arange(300, 300 + sum(sizes), dtype=np.uint16)
    return np.split(ids, np.cumsum(sizes)[:-1])


def batches(monkeypatch, encoded, **options):
    documents = join(encoded, BOS, EOS, 2**16)
    monkeypatch.setattr(dataset_module, "_split_of", lambda config, split: documents)
    seed, epochs = options.pop("seed", 0), options.pop("num_epochs", 1)
    config = DataConfig(**options)
    return list(make_dataset(config, seed=seed, num_epochs=epochs))


def segments(batch_list):
    """Every segment of every row as (tokens, targets), after checking the row's bookkeeping."""
    for batch in batch_list:
        assert {k: v.dtype.name for k, v in batch.items()} == {
            "tokens": "int32",
            "targets": "int32",
            "positions": "int32",
            "segment_ids": "int32",
            "weights": "float32",
        }
        for row in range(len(batch["tokens"])):
            tokens, targets, positions, ids, weights = (
                batch[k][row] for k in ("tokens", "targets", "positions", "segment_ids", "weights")
            )
            np.testing.assert_array_equal(weights, (ids > 0).astype(np.float32))
            assert (positions[ids == 0] == -1).all()
            real = ids[ids > 0]
            # ids are 1, 2, ... in order, so a segment is one contiguous run and padding is last
            assert (ids[: len(real)] > 0).all()
            if len(real):
                assert real[0] == 1 and set(np.diff(real)) <= {0, 1}
            for segment in range(1, real.max(initial=0) + 1):
                here = ids == segment
                np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
                yield tokens[here], targets[here]


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, length=st.integers(2, 24), batch=st.integers(1, 5), seed=st.integers(0, 9))
def test_every_token_once_and_targets_from_the_same_document(packing, sizes, length, batch, seed):
    encoded = unique_documents(sizes)
    follower = {}  # the token after each token of a document
    for document in encoded:
        follower.update(zip(document[:-1], document[1:], strict=True))
        follower[document[-1]] = EOS
    owner = {t: i for i, document in enumerate(encoded) for t in document}
    seen, begun = [], []
    with pytest.MonkeyPatch.context() as patch:
        made = batches(
            patch,
            encoded,
            sequence_length=length,
            batch_size=batch,
            packing=packing,
            packing_bins=3,
            seed=seed,
        )
    for tokens, targets in segments(made):
        inner = tokens[tokens != BOS]
        assert len({owner[t] for t in inner}) <= 1
        assert BOS not in tokens[1:] and EOS not in tokens
        for token, target in zip(tokens, targets, strict=True):
            if token == BOS:
                begun.append(owner[target])
            else:
                assert follower[token] == target
        if tokens[0] == BOS and len(inner):
            assert inner[0] == targets[0]
        seen += inner.tolist()
    assert sorted(seen) == sorted(owner)
    assert sorted(begun) == list(range(len(encoded)))


@settings(deadline=None, max_examples=20)
@given(sizes=SIZES, length=st.integers(2, 24), epochs=st.integers(1, 3))
def test_two_epochs_hold_every_token_twice(sizes, length, epochs):
    for packing in ("concat", "first_fit"):
        with pytest.MonkeyPatch.context() as patch:
            made = batches(
                patch,
                unique_documents(sizes),
                sequence_length=length,
                batch_size=2,
                packing=packing,
                num_epochs=epochs,
            )
        count = np.bincount(np.concatenate([t[t >= 300] for t, _ in segments(made)]))[300:]
        assert (count == epochs).all()


@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, length=st.integers(2, 24))
def test_first_fit_keeps_whole_what_fits(sizes, length):
    with pytest.MonkeyPatch.context() as patch:
        made = batches(
            patch,
            unique_documents(sizes),
            sequence_length=length,
            batch_size=2,
            packing="first_fit",
        )
    found = [tokens for tokens, _ in segments(made)]
    # inputs of a document are bos and its ids; it is cut only as often as it must be
    assert len(found) == sum(-(-(size + 1) // length) for size in sizes)


def test_concat_pads_only_the_last_row(monkeypatch):
    made = batches(monkeypatch, unique_documents([5, 9, 30, 2]), sequence_length=8, batch_size=1)
    fills = sorted(int(b["weights"].sum()) for b in made)
    assert fills == [2] + [8] * 6  # 46 ids and 4 bos


def test_known_rows(monkeypatch):
    encoded = [np.array([1, 2, 3]), np.array([4])]
    (batch,) = batches(monkeypatch, encoded, sequence_length=8, batch_size=1)
    assert batch["tokens"].tolist() == [[BOS, 1, 2, 3, BOS, 4, 0, 0]]
    assert batch["targets"].tolist() == [[1, 2, 3, EOS, 4, EOS, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, -1, -1]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
