"""Attention with linear biases: ALiBi (Press 2022, arXiv:2108.12409), §3.

Instead of position embeddings, each head ``h`` adds ``−m_h · (i − j)`` to the score of query ``i``
and key ``j``; the slopes ``m_h`` are fixed.
"""

import math

import numpy as np


def slopes(num_heads: int, largest: float = 8.0) -> np.ndarray:
    """The slopes ``m_h``, float32 ``[h]``: ``2^(−8(h+1)/n)`` if ``n`` is a power of two (§3).

    For other ``n``: the slopes of the next lower power of two, then every other slope of the next
    higher one, as in the authors' code, BLOOM and MPT. ``largest``: replaces the exponent 8 (MPT).
    """
    power = 2 ** math.floor(math.log2(num_heads))
    values = [2.0 ** (-largest * (h + 1) / power) for h in range(power)]
    values += [2.0 ** (-largest / 2 * (2 * h + 1) / power) for h in range(num_heads - power)]
    return np.asarray(values, np.float32)
