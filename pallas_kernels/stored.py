"""`Stored`: vectors as caches store them, in floating point or in codes with a scale for each.

A vector ``x`` of ``c`` channels (the key or the value of one token and one head) has its own scale,
so that no calibration is required and a new token changes no earlier one:

- int8: ``codes = round(x / scale)`` with ``scale = max |x| / 127`` (Dettmers 2022, 2208.07339, §2);
- float8_e4m3fn: ``codes = x / scale`` with ``scale = max |x| / 448``;
- int4: ``codes = round((x − minimum) / scale)`` with ``scale = (max x − min x) / 15``. A byte holds
  two codes: that of channel ``i`` in its low half and that of channel ``i + c/2`` in its high half.

Other dtypes store ``x`` itself, without a scale.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import check
from pallas_kernels.names import one_of

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4")
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """Vectors ``[…, c]`` in storage.

    ``codes``: ``[…, c]`` of ``dtype``, or uint8 ``[…, c/2]`` for int4. ``scale``: float32 ``[…]``,
    None for dtypes without codes. ``minimum``: float32 ``[…]``, for int4 only.
    """

    codes: jax.Array
    scale: jax.Array | None
    minimum: jax.Array | None
    dtype: str = dataclasses.field(metadata=dict(static=True))

    @property
    def channels(self) -> int:
        return self.codes.shape[-1] * (2 if self.dtype == "int4" else 1)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> "Stored":
        """Zeros of ``shape``, whose last size is the channels.

        Raises:
          ValueError: ``dtype`` is not one of `DTYPES`, or channels are odd for int4.
        """
        check(dtype in DTYPES, "dtype", dtype, f"must be {one_of(dtype, DTYPES)}")
        *vectors, c = shape
        codes = jnp.uint8 if dtype == "int4" else jnp.dtype(dtype)
        if dtype == "int4":
            check(c % 2 == 0, "channels", c, "must be even for int4")
            c //= 2
        scaled = dtype in (*_LARGEST, "int4")
        return cls(
            codes=jnp.zeros((*vectors, c), codes),
            scale=jnp.zeros(vectors, jnp.float32) if scaled else None,
            minimum=jnp.zeros(vectors, jnp.float32) if dtype == "int4" else None,
            dtype=dtype,
        )

    @classmethod
    def of(cls, x: jax.Array, dtype: str) -> "Stored":
        """``x`` ``[…, c]`` in storage; the same errors as `empty`."""
        check(dtype in DTYPES, "dtype", dtype, f"must be {one_of(dtype, DTYPES)}")
        if dtype == "int4":
            check(x.shape[-1] % 2 == 0, "channels", x.shape[-1], "must be even for int4")
            x = x.astype(jnp.float32)
            minimum = jnp.min(x, axis=-1, initial=jnp.inf)
            scale = (jnp.max(x, axis=-1, initial=-jnp.inf) - minimum) * (1 / 15)
            codes = jnp.round((x - minimum[..., None]) / _nonzero(scale)[..., None])
            low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=-1)
            return cls(low | high << 4, scale, minimum, dtype)
        if dtype not in _LARGEST:
            return cls(x.astype(dtype), None, None, dtype)
        x = x.astype(jnp.float32)
        # a product: XLA:CPU rounds the division by a constant in one of two ways, by shape
        scale = jnp.max(jnp.abs(x), axis=-1, initial=0) * (1 / _LARGEST[dtype])
        codes = x / _nonzero(scale)[..., None]
        if dtype == "int8":
            codes = jnp.round(codes)
        return cls(codes.astype(dtype), scale, None, dtype)

    def load(self, dtype=jnp.float32) -> jax.Array:
        """The vectors ``[…, c]`` as an array of ``dtype``."""
        if self.scale is None:
            return self.codes.astype(dtype)
        codes = self.codes
        if self.dtype == "int4":
            codes = jnp.concatenate((codes & 15, codes >> 4), axis=-1)
        x = codes.astype(jnp.float32) * self.scale[..., None]
        if self.minimum is not None:
            x = x + self.minimum[..., None]
        return x.astype(dtype)


def write_rows(rows: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """``rows`` ``[n, …]`` with ``new`` ``[m, …]`` at ``index`` ``[m]``, which may be n: dropped.

    The rows are written in place if the program may overwrite ``rows``.
    """
    new = new.astype(rows.dtype)
    if index.size == 1:
        # XLA:CPU copies all rows to write a single one. A second one, which is dropped, avoids it.
        index = jnp.pad(index, (0, 1), constant_values=rows.shape[0])
        new = jnp.repeat(new, 2, axis=0)
    return rows.at[index].set(new, mode="drop")


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale > 0, scale, 1)
