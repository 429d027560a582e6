"""Optimiser moments in eight bits (Dettmers 2021, arXiv:2110.02861), as a rewrite of their leaves.

The array of a moment becomes a `Quantized`: a code per number, and a float32 scale per block.
Moments are dequantised for the update and quantised after it. The update of the parameters uses the
moments before they are rounded.

The paper's blocks are 2048 consecutive numbers of a flattened tensor, those of bitsandbytes 256.
Such blocks would cross the boundaries between the shards of a weight. Here a block is up to 256
numbers along one dimension: codes and scales have the dimensions of the weight and the sharding of
its full-precision moments. Along the last dimension of a matrix the blocks are those of
bitsandbytes.
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
SMALLEST_BLOCK = 16  # numbers; a scale has four bytes
SMALLEST_WEIGHT = 4096  # numbers of one layer, as in bitsandbytes
# the largest size of a mesh axis whose shards consist of complete blocks
_WAYS = {None: 1, "tensor": 8, "expert": 8, "fsdp": 64}
# embeddings of tokens or positions: rows that occur rarely have large updates (§2.3)
_TABLES = (("vocab", "embed"), (None, "embed"))
_DECADES = 7


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """``codes`` uint8; ``scales`` float32, the largest magnitude in each block.

    ``scales`` has the dimensions of ``codes``; along one of them it has a number per block.
    ``signed``: which of the two maps of `encode`.
    """

    codes: jax.Array
    scales: jax.Array
    signed: bool = dataclasses.field(metadata=dict(static=True))


def encode(x: jax.Array, signed: bool) -> jax.Array:
    """Per number of ``x``, float32 in [−1, 1], the uint8 code of the nearest of 256 numbers.

    Dynamic tree quantisation (§1.3, Figure 2). The numbers are 0, 1 and, in each of seven decades
    from 10⁻⁶ on, evenly spaced magnitudes of either sign. The first decade has one magnitude
    (without a sign: two), and each further decade has twice as many. Codes are in ascending order,
    as in bitsandbytes.
    """
    magnitude = jnp.abs(x)
    number = jnp.full_like(x, 0 if signed else 1)
    below = 0.0
    for low, step, first in _decades(signed):
        nearer = magnitude >= (below + low + step / 2) / 2
        index = jnp.clip(jnp.floor((magnitude - low) / step), 0, first - 1)
        number = jnp.where(nearer, first + index, number)
        below = low + step * (first - 0.5)
    one = _index_of_one(signed)
    number = jnp.where(magnitude >= (below + 1) / 2, one, number)
    if not signed:
        return (number - 1).astype(jnp.uint8)
    # −1 is not one of the numbers
    return (127 + jnp.where(x < 0, -jnp.minimum(number, one - 1), number)).astype(jnp.uint8)


def decode(codes: jax.Array, signed: bool) -> jax.Array:
    """The float32 numbers of ``codes``; the inverse of `encode`."""
    codes = codes.astype(jnp.float32)
    number = jnp.abs(codes - 127) if signed else codes + 1
    magnitude = jnp.zeros_like(number)
    for low, step, first in _decades(signed):
        magnitude = jnp.where(number >= first, low + step * (number - first + 0.5), magnitude)
    magnitude = jnp.where(number >= _index_of_one(signed), 1.0, magnitude)
    return jnp.where(codes < 127, -magnitude, magnitude) if signed else magnitude


def _decades(signed: bool):
    """For each decade: its lower end, the distance between its numbers, and their count.

    The count is also the index of its first number among the magnitudes.
    """
    for i in range(_DECADES):
        low, count = 10.0 ** (i - _DECADES), 2 ** (i if signed else i + 1)
        yield low, 9 * low / count, count


def _index_of_one(signed: bool) -> int:
    """The index of 1, the largest number, among the magnitudes."""
    return 2 ** (_DECADES if signed else _DECADES + 1)


def quantize(x: jax.Array, axis: int, block: int, signed: bool) -> Quantized:
    """``x`` quantised in blocks of ``block`` numbers along ``axis``, whose size it divides."""
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
    """``(axis, block)`` of a moment, or None if it is not quantised.

    The block is the largest power of two from 16 to 256 such that each shard of the dimension has
    complete blocks: on meshes of up to 8 for ``tensor`` and ``expert``, 64 for ``fsdp``. It does
    not depend on the mesh, so checkpoints do not either. The last dimension is chosen only if no
    other one has blocks: XLA for TPUs keeps a float32 copy of arrays with blocks along it. These
    are not quantised: vectors, embeddings (the paper's stable embedding, §2.3), weights of fewer
    than 4096 numbers, and those without blocks of 16.

    Args:
      shape: leading dimensions beyond ``axes`` are those of stacked layers.
    """
    unstacked = shape[len(shape) - len(axes) :]
    if len(unstacked) < 2 or axes in _TABLES or math.prod(unstacked) < SMALLEST_WEIGHT:
        return None

    def block(size: int, name: str | None) -> int:
        ways = _WAYS[RULES[name][0] if name else None]
        return math.gcd(size // ways, BLOCK) if size % ways == 0 else 0

    sizes = [block(*pair) for pair in zip(unstacked, axes, strict=True)]
    for block_sizes in (sizes[:-1], sizes):
        largest = max(block_sizes)
        if largest >= SMALLEST_BLOCK:
            return len(shape) - len(unstacked) + block_sizes.index(largest), largest
    return None


def with_8bit_moments(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """``optimizer`` with moments that are stored in eight bits between steps; see `layout`.

    Raises:
      ConfigError: on ``init``, if no moment would be quantised.
    """
    packed = between(optimizer, unpack, pack)

    def init(params):
        state = packed.init(params)
        if not any(map(_is_quantized, jax.tree.leaves(state, is_leaf=_is_quantized))):
            raise ConfigError(
                "optimizer.moments='8bit': changes nothing: no weight besides embeddings has "
                f"{SMALLEST_WEIGHT} numbers in blocks of {SMALLEST_BLOCK} or more"
            )
        return state

    return optax.GradientTransformation(init, packed.update)


def pack(state: Any) -> Any:
    """The moments of an optax ``state``, quantised; ``nu`` are second moments, without a sign."""

    def quantize_leaf(path, leaf):
        signed = all(getattr(key, "name", None) != "nu" for key in path)

        def array(a, axes):
            axis_and_block = layout(a.shape, axes or (None,) * a.ndim)
            return a if axis_and_block is None else quantize(a, *axis_and_block, signed)

        return map_named(array, leaf)

    return jax.tree_util.tree_map_with_path(
        quantize_leaf, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def unpack(state: Any) -> Any:
    """The inverse of `pack`, up to rounding."""
    return jax.tree.map(
        lambda a: dequantize(a) if _is_quantized(a) else a, state, is_leaf=_is_quantized
    )


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)
