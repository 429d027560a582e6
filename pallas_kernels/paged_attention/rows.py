"""Queries as rows of blocks, as the kernels multiply them with keys.

The queries of all ``g`` query heads of a key head share its keys. So a block of ``tokens`` queries
is ``tokens · g`` rows, in the order of tokens, padded to ``rows``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """How queries ``[b, t, h, c]`` become blocks of rows."""

    b: int
    t: int
    k: int  # key heads
    g: int  # query heads of a key head
    tokens: int  # of a block
    rows: int  # of a block, at least tokens · g

    @property
    def blocks(self) -> int:
        return -(-self.t // self.tokens)

    @property
    def length(self) -> int:
        """The tokens of all blocks."""
        return self.blocks * self.tokens

    def queries(self, q_bthc: jax.Array, parts: int) -> jax.Array:
        """``[b, k, blocks, parts, rows, c / parts]``: consecutive parts of the channels."""
        q = jnp.pad(q_bthc, ((0, 0), (0, self.length - self.t), (0, 0), (0, 0)))
        q = q.reshape(self.b, self.blocks, self.tokens, self.k, self.g, parts, -1)
        q = jnp.transpose(q, (0, 3, 1, 5, 2, 4, 6)).reshape(
            self.b, self.k, self.blocks, parts, self.tokens * self.g, -1
        )
        return jnp.pad(q, (*[(0, 0)] * 4, (0, self.rows - self.tokens * self.g), (0, 0)))

    def results(self, y: jax.Array) -> jax.Array:
        """The inverse of `queries`."""
        parts, width = y.shape[3], y.shape[-1]
        y = y[..., : self.tokens * self.g, :]
        y = y.reshape(self.b, self.k, self.blocks, parts, self.tokens, self.g, width)
        y = jnp.transpose(y, (0, 2, 4, 1, 5, 3, 6))
        return y.reshape(self.b, self.length, self.k * self.g, parts * width)[:, : self.t]

    def by_token(self, a_bt: jax.Array, value: int) -> jax.Array:
        """``[b, blocks, rows]``: the number of a row's token, of all tokens of all blocks."""
        a = jnp.repeat(a_bt.reshape(self.b, self.blocks, self.tokens), self.g, axis=2)
        width = ((0, 0), (0, 0), (0, self.rows - a.shape[2]))
        return jnp.pad(a, width, constant_values=value)

    def by_head(self, a_h: jax.Array | None) -> jax.Array:
        """``[k, rows]``, float32: the number of a row's head; 0 if there are none."""
        if a_h is None:
            return jnp.zeros((self.k, self.rows), jnp.float32)
        a = jnp.tile(a_h.astype(jnp.float32).reshape(self.k, self.g), (1, self.tokens))
        return jnp.pad(a, ((0, 0), (0, self.rows - a.shape[1])))
