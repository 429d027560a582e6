"""Packs documents into rows of fixed length, in which no document sees another.

A document is ``bos ids eos``, or ``ids eos`` if its tokenizer has no bos. Its inputs are all tokens
but the last, its targets all but the first. So every input has a target in its own document, and
the last target is ``eos``.

A document longer than a row is cut. The piece after the cut is a segment of its own: it begins at
position 0 and does not see the piece before. The last target before the cut is the first input
after it, so every transition of the corpus is learned once per epoch.

A row is a dict: ``pairs`` ``[length, 2]`` (input, target), ``pairs_segment_ids`` and
``pairs_positions`` int32 ``[length]`` (segments count from 1; 0 is padding). Grain's packing uses
these names.
"""

import dataclasses

import numpy as np

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TokenizedDocuments:
    """All documents, concatenated in memory.

    Attributes:
      tokens: ``[n]``, unsigned, the documents in turn.
      starts: int64 ``[documents + 1]``: the index in ``tokens`` of each beginning; the last is n.
    """

    tokens: np.ndarray
    starts: np.ndarray

    @property
    def inputs(self) -> int:
        """Number of (input, target) pairs: in each document one less than its tokens."""
        return len(self.tokens) - (len(self.starts) - 1)


def join(
    encoded: list[np.ndarray], bos: int | None, eos: int, vocab_size: int
) -> TokenizedDocuments:
    """Concatenate documents (each an array of ids), with ``bos`` (if any) and ``eos`` around each.

    ``vocab_size``: the largest id + 1.
    """
    begin = [] if bos is None else [bos]
    starts = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(begin) + len(ids) + 1 for ids in encoded], out=starts[1:])
    tokens = np.empty(starts[-1], np.uint16 if vocab_size <= 2**16 else np.uint32)
    for ids, start, stop in zip(encoded, starts[:-1], starts[1:], strict=True):
        tokens[start : start + len(begin)] = begin
        tokens[start + len(begin) : stop - 1] = ids
    tokens[starts[1:] - 1] = eos
    return TokenizedDocuments(tokens, starts)


class Chunks:
    """Random access to the pieces of all documents, each of at most ``length`` inputs.

    The source of first-fit packing. An element is ``{"pairs": [<= length, 2]}``, a view.
    """

    def __init__(self, documents: TokenizedDocuments, length: int):
        self._pairs = np.lib.stride_tricks.sliding_window_view(documents.tokens, 2)
        inputs = np.diff(documents.starts) - 1
        pieces = -(-inputs // length)
        document = np.repeat(np.arange(len(inputs)), pieces)
        piece = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._start = documents.starts[document] + piece * length
        self._stop = np.minimum(self._start + length, documents.starts[document + 1] - 1)

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> Row:
        return {"pairs": self._pairs[self._start[index] : self._stop[index]]}


class ConcatenatedRows:
    """Random access to the rows of the concatenated documents, cut every ``length`` inputs.

    Only the last row is padded.
    """

    def __init__(self, documents: TokenizedDocuments, length: int):
        self._tokens, self._length, self._total = documents.tokens, length, documents.inputs
        # index of each document's first input, counting inputs only (an eos is not an input)
        self._begin = documents.starts - np.arange(len(documents.starts))
        first = np.arange(0, self._total, length)
        last = np.minimum(first + length, self._total) - 1
        # the first and last document of each row
        self._range = np.searchsorted(self._begin, np.stack([first, last], 1), side="right") - 1

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Row:
        row = empty_row(self._length, self._tokens.dtype)
        start = index * self._length
        stop = min(start + self._length, self._total)
        first, last = self._range[index].tolist()
        for segment, document in enumerate(range(first, last + 1), 1):
            low = max(start, int(self._begin[document]))
            high = min(stop, int(self._begin[document + 1]))
            span, size = slice(low - start, high - start), high - low
            token = low + document  # each earlier document has one eos, which is not an input
            row["pairs"][span, 0] = self._tokens[token : token + size]
            row["pairs"][span, 1] = self._tokens[token + 1 : token + 1 + size]
            row["pairs_segment_ids"][span] = segment
            row["pairs_positions"][span] = np.arange(size)
        return row


def empty_row(length: int, dtype: np.dtype) -> Row:
    """A row of padding only."""
    return {
        "pairs": np.zeros((length, 2), dtype),
        "pairs_segment_ids": np.zeros(length, np.int32),
        "pairs_positions": np.zeros(length, np.int32),
    }


def finish(rows: Row) -> dict[str, np.ndarray]:
    """Batched rows ``[b, length, ...]`` → the five arrays ``[b, length]`` of a batch.

    tokens, targets, segment_ids int32; positions int32, -1 on padding; weights float32, 1 on
    every token and 0 on padding.
    """
    segment_ids = rows["pairs_segment_ids"]
    return {
        "tokens": rows["pairs"][..., 0].astype(np.int32),
        "targets": rows["pairs"][..., 1].astype(np.int32),
        "positions": np.where(segment_ids > 0, rows["pairs_positions"], -1).astype(np.int32),
        "segment_ids": segment_ids.astype(np.int32),
        "weights": (segment_ids > 0).astype(np.float32),
    }
