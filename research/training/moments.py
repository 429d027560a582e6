"""Optimiser moments in eight bits (Dettmers 2021, arXiv:2110.02861): a rewrite of their leaves.

A moment's array becomes a `Quantized`: a code for each number, and a float32 scale for each block.
They are dequantised for the update and quantised after it; what the update makes of the parameters
is computed with the moments before they are rounded.

The paper's blocks are 2048 successive numbers of a flattened tensor, bitsandbytes' 256. Those would
cross the pieces that a mesh splits a weight into. Here a block is up to 256 numbers along one
dimension, so that codes and scales have the weight's dimensions and lie where its own moments
would; along the last one of a matrix it is bitsandbytes' block.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from layers.config import ConfigError
from layers.weights import map_named
from research.parallel.rules import RULES
from research.training.layerwise import between

BLOCK = 256
SMALLEST_BLOCK = 16  # numbers; a scale is four bytes
SMALLEST_WEIGHT = 4096  # numbers of one layer, as in bitsandbytes
# how many ways a mesh can split a dimension with whole blocks in each
_WAYS = {None: 1, "tensor": 8, "expert": 8, "fsdp": 64}
# of a map from words or places to vectors: rare rows have large steps (§2.3)
_TABLES = (("vocab", "embed"), (None, "embed"))
_DECADES = 7


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """``codes`` uint8; ``scales`` float32, the largest magnitude in each block.

    ``scales`` has the dimensions of ``codes``, and along one of them a number a block. ``signed``:
    which of the two maps of `encode`.
    """

    codes: jax.Array
    scales: jax.Array
    signed: bool = dataclasses.field(metadata=dict(static=True))


def encode(x: jax.Array, signed: bool) -> jax.Array:
    """The uint8 codes of the nearest of 256 numbers to each of ``x`` float32 in [−1, 1].

    Dynamic tree quantisation (§1.3, Figure 2): 0, 1 and, in each of seven decades from 10⁻⁶ on,
    evenly spaced magnitudes that double from decade to decade, beginning with one, of either sign;
    without a sign with two. In ascending order, as bitsandbytes numbers them.
    """
    magnitude = jnp.abs(x)
    number = jnp.full_like(x, 0 if signed else 1)
    below = 0.0
    for low, step, first in _decades(signed):
        nearer = magnitude >= (below + low + step / 2) / 2
        place = jnp.clip(jnp.floor((magnitude - low) / step), 0, first - 1)
        number = jnp.where(nearer, first + place, number)
        below = low + step * (first - 0.5)
    last = 2 * first
    number = jnp.where(magnitude >= (below + 1) / 2, last, number)
    if not signed:
        return (number - 1).astype(jnp.uint8)
    # there is no −1
    return (127 + jnp.where(x < 0, -jnp.minimum(number, last - 1), number)).astype(jnp.uint8)


def decode(codes: jax.Array, signed: bool) -> jax.Array:
    """The float32 numbers of ``codes``; see `encode`."""
    codes = codes.astype(jnp.float32)
    number = jnp.abs(codes - 127) if signed else codes + 1
    magnitude = jnp.zeros_like(number)
    for low, step, first in _decades(signed):
        magnitude = jnp.where(number >= first, low + step * (number - first + 0.5), magnitude)
    magnitude = jnp.where(number >= 2 * first, 1.0, magnitude)
    return jnp.where(codes < 127, -magnitude, magnitude) if signed else magnitude


def _decades(signed: bool):
    """Of each decade its lower end, the distance of its numbers, and how many there are."""
    for i in range(_DECADES):
        low, count = 10.0 ** (i - _DECADES), 2 ** (i if signed else i + 1)
        yield low, 9 * low / count, count


def quantize(x: jax.Array, axis: int, block: int, signed: bool) -> Quantized:
    """``x`` in blocks of ``block`` numbers along ``axis``, which it must divide."""
    blocks = _blocks(x.astype(jnp.float32), axis, x.shape[axis] // block)
    scales = jnp.max(jnp.abs(blocks), axis=axis + 1, keepdims=True)
    codes = encode(blocks / jnp.where(scales > 0, scales, 1), signed)
    return Quantized(codes.reshape(x.shape), jnp.squeeze(scales, axis + 1), signed)


def dequantize(q: Quantized) -> jax.Array:
    """The float32 numbers of ``q``."""
    shapes = zip(q.codes.shape, q.scales.shape, strict=True)
    axis = next(i for i, (numbers, blocks) in enumerate(shapes) if numbers != blocks)
    numbers = decode(_blocks(q.codes, axis, q.scales.shape[axis]), q.signed)
    return (numbers * jnp.expand_dims(q.scales, axis + 1)).reshape(q.codes.shape)


def _blocks(x: jax.Array, axis: int, number: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], number, -1, *x.shape[axis + 1 :])


def layout(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> tuple[int, int] | None:
    """``(axis, block)`` of a moment, or None where it stays as it is.

    Of the powers of two from 16 to 256 the largest that a dimension holds often enough for a mesh
    to split it: 8 times for ``tensor`` and ``expert``, 64 for ``fsdp``. It does not depend on the
    mesh, so that a checkpoint does not. The last dimension is the last choice: XLA for TPUs keeps
    a float32 copy of what is cut along it. Vectors, tables of embeddings (the paper's stable
    embedding, §2.3), weights of fewer than 4096 numbers and those without blocks of 16 stay.

    Args:
      shape: leading dimensions beyond ``axes`` are of stacked layers.
    """
    own = shape[len(shape) - len(axes) :]
    if len(own) < 2 or axes in _TABLES or math.prod(own) < SMALLEST_WEIGHT:
        return None

    def block(size: int, name: str | None) -> int:
        ways = _WAYS[RULES[name][0] if name else None]
        return math.gcd(size // ways, BLOCK) if size % ways == 0 else 0

    sizes = [block(*pair) for pair in zip(own, axes, strict=True)]
    for among in (sizes[:-1], sizes):
        largest = max(among)
        if largest >= SMALLEST_BLOCK:
            return len(shape) - len(own) + among.index(largest), largest
    return None


def with_8bit_moments(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """``optimizer`` with its moments kept in eight bits between steps; see `layout`.

    Raises:
      ConfigError: on ``init``, if every moment would stay as it is.
    """
    packed = between(optimizer, unpack, pack)

    def init(params):
        state = packed.init(params)
        if not any(map(_is, jax.tree.leaves(state, is_leaf=_is))):
            raise ConfigError(
                "optimizer.moments='8bit': changes nothing: no weight besides embeddings has "
                f"{SMALLEST_WEIGHT} numbers in blocks of {SMALLEST_BLOCK} or more"
            )
        return state

    return optax.GradientTransformation(init, packed.update)


def pack(state: Any) -> Any:
    """The moments of an optax ``state``, quantised; ``nu`` are second moments, without a sign."""

    def of(path, leaf):
        signed = all(getattr(key, "name", None) != "nu" for key in path)

        def array(a, axes):
            found = layout(a.shape, axes or (None,) * a.ndim)
            return a if found is None else quantize(a, *found, signed)

        return map_named(array, leaf)

    return jax.tree_util.tree_map_with_path(
        of, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def unpack(state: Any) -> Any:
    """The inverse of `pack`, but for what was rounded."""
    return jax.tree.map(lambda a: dequantize(a) if _is(a) else a, state, is_leaf=_is)


def _is(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)
