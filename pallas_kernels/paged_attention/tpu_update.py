"""New tokens written into pages on a TPU, in place: a Pallas kernel, compiled by Mosaic.

A copy moves full tiles of the hardware, which hold several slots. So the kernel copies each tile of
a row that new tokens are in from HBM to VMEM, replaces their slots and copies it back. Copies of
several tiles are in flight at once. No tile is shared by two rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.pages import new_slots, page_of
from pallas_kernels.paged_attention.tpu import LANES, VMEM, tile_of, up


def written(old, new_btkc, positions_bt, table_bn, written_b) -> jax.Array:
    """Codes ``old`` ``[p, k, page, c]`` with those of new tokens; as `pages.scattered`."""
    (b, t), (_, k, page, c), tile = positions_bt.shape, old.shape, tile_of(old.dtype)
    slots_bt = new_slots(positions_bt, written_b)
    first_b = written_b // tile * tile
    tiles = pl.cdiv(t + tile - 1, tile)
    # the token of each slot in the row's tiles, −1 if the slot stays
    index = jnp.where(slots_bt >= 0, slots_bt - first_b[:, None], tiles * tile)
    token = jnp.full((b, tiles * tile), -1, jnp.int32)
    token = token.at[jnp.arange(b)[:, None], index].set(jnp.arange(t), mode="drop")
    incoming = jnp.take_along_axis(new_btkc, jnp.maximum(token, 0)[:, :, None, None], axis=1)
    incoming = incoming.reshape(b * tiles, tile, k, c).swapaxes(1, 2)
    is_new = (token >= 0).reshape(b * tiles, 1, tile, 1)
    starts = first_b[:, None] + jnp.arange(tiles) * tile
    offset = (starts % page).reshape(-1)
    pages = page_of(starts, table_bn, page).reshape(-1)
    pages = jnp.where(is_new.any((1, 2, 3)), pages, -1)

    one = k * tile * up(c, LANES) * old.dtype.itemsize
    count = max(1, min(b * tiles, VMEM // (4 * one)))
    padding = -(b * tiles) % count
    incoming, is_new = (
        jnp.pad(a, ((0, padding), *[(0, 0)] * 3)) for a in (incoming, is_new.astype(jnp.int32))
    )
    pages = jnp.pad(pages, (0, padding), constant_values=-1)
    offset = jnp.pad(offset, (0, padding))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_kernel, count, tile),
        out_shape=jax.ShapeDtypeStruct(old.shape, old.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(incoming.shape[0] // count,),
            in_specs=[
                pl.BlockSpec((count, k, tile, c), lambda i, *_: (i, 0, 0, 0)),
                pl.BlockSpec((count, 1, tile, 1), lambda i, *_: (i, 0, 0, 0)),
                in_hbm,
            ],
            out_specs=in_hbm,
            scratch_shapes=[
                pltpu.VMEM((count, k, tile, c), old.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="update_pages",
    )(pages.astype(jnp.int32), offset.astype(jnp.int32), incoming, is_new, old)


def _kernel(count, tile, pages, offset, incoming, is_new, old, new, buffer, semaphores):
    del old  # the same memory as `new`
    first = pl.program_id(0) * count

    def each(act):
        def one(n, _):
            page = pages[first + n]

            @pl.when(page >= 0)
            def _():
                start = pl.multiple_of(offset[first + n], tile)
                act(n, new.at[page, :, pl.ds(start, tile), :])

            return 0

        jax.lax.fori_loop(0, count, one, 0)

    def read(n, tiles):
        return pltpu.make_async_copy(tiles, buffer.at[n], semaphores.at[0])

    def write(n, tiles):
        return pltpu.make_async_copy(buffer.at[n], tiles, semaphores.at[1])

    def replace(n, tiles):
        slot_is_new = jnp.broadcast_to(is_new[n] > 0, incoming.shape[1:])
        wide = jnp.float32 if jnp.issubdtype(buffer.dtype, jnp.floating) else jnp.int32
        codes = jnp.where(slot_is_new, incoming[n].astype(wide), buffer[n].astype(wide))
        buffer[n] = codes.astype(buffer.dtype)
        write(n, tiles).start()

    each(lambda n, tiles: read(n, tiles).start())
    # all have the same semaphore, so that one of them may end the wait for another
    each(lambda n, tiles: read(n, tiles).wait())
    each(replace)
    each(lambda n, tiles: write(n, tiles).wait())
