"""Flash attention's blocks without a mask on an NVIDIA H100 or H200: a Pallas kernel by Mosaic GPU.

In a long sequence nearly all blocks require no mask (the consecutive blocks of `ranges.Visit`).
This kernel computes these only; it has no positions, no segments and no branches. Its results for
each row are the maximum, the sum and the weighted values, with which `gpu`'s kernel continues over
the remaining blocks, which require a mask.

A program has three warpgroups, as in FlashAttention-3 (2407.08608, §3.1): one starts copies of
blocks of keys and values (TMA), a few blocks ahead; two multiply 64 queries each (wgmma), so that
one can use the tensor cores while the other computes exponentials. Barriers signal that a block has
arrived (``full``) and that both have read it (``free``).

Two choices allow the interpreter, which detects races and barriers without a wait, to run this same
kernel: keys have channels first, and weights pass to the second product through shared memory
instead of registers, which is slower.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from pallas_kernels.exp2 import LOG2E
from pallas_kernels.flash_attention.spec import MASKED, Spec

# queries of a program: 64, the rows of a wgmma, for each of two warpgroups
ROWS, GROUPS = 64, 2
QUERY = ROWS * GROUPS
# keys of a block, and the number of blocks in shared memory
KEY, STAGES = 128, 2


def supports(q_bthc, k_bskc, slopes) -> bool:
    """Whether the kernel supports this call, and the call is long enough for full blocks."""
    long_enough = q_bthc.shape[1] >= QUERY and k_bskc.shape[1] >= KEY
    is_16_bit = q_bthc.dtype in (jnp.bfloat16, jnp.float16)
    return slopes is None and long_enough and is_16_bit and q_bthc.shape[3] in (64, 128)


def _kernel(spec: Spec, group: int, refs, scratch):
    visits, q_ref, k_ref, v_ref, top_ref, total_ref, y_ref = refs
    (
        q_smem, k_smem, v_smem, weights_smem,
        q_full, k_full, v_full, k_free, v_free,
    ) = scratch  # fmt: skip
    b, h, i, wg = (jax.lax.axis_index(name) for name in ("b", "h", "i", "wg"))
    row = b * (y_ref.shape[1] // QUERY) + i
    first = visits[row * 4 + 1]
    steps = visits[row * 4 + 2] - first
    c = q_ref.shape[3]

    @pl.when(wg < GROUPS)
    def _():
        mosaic.set_max_registers(232, action="increase")
        rows = pl.ds(i * QUERY + wg * ROWS, ROWS)
        q, full = q_smem.at[wg], q_full.at[wg]
        mosaic.copy_gmem_to_smem(q_ref.at[b, rows, h], q, full)
        mosaic.barrier_wait(full)

        def product(left, right, shape):
            def run(total):
                mosaic.wgmma(total, left, right)
                return total[...]

            return pl.run_scoped(run, mosaic.ACC(shape, jnp.float32))

        def step(n, carry):
            top, total, y = carry
            slot = jax.lax.rem(n, STAGES)
            mosaic.barrier_wait(k_full.at[slot])
            s = product(q, k_smem.at[slot], (ROWS, KEY))
            mosaic.barrier_arrive(k_free.at[slot])
            # powers of 2, for which the chip has an instruction
            s *= spec.scale * LOG2E
            if spec.soft_cap is not None:
                cap = spec.soft_cap * LOG2E
                s = cap * jnp.tanh(s / cap)
            new_top = jnp.maximum(top, s.max(1))
            weights = jnp.exp2(s - jax.lax.broadcast_in_dim(new_top, s.shape, [0]))
            shrink = jnp.exp2(top - new_top)
            total = total * shrink + weights.sum(1)
            weights_smem[wg] = weights.astype(q.dtype)
            mosaic.commit_smem()
            mosaic.barrier_wait(v_full.at[slot])
            new_y = product(weights_smem.at[wg], v_smem.at[slot], (ROWS, c))
            mosaic.barrier_arrive(v_free.at[slot])
            return new_top, total, y * jax.lax.broadcast_in_dim(shrink, y.shape, [0]) + new_y

        # an accumulator is initially 0, and has the register layout of the products
        zeros = pl.run_scoped(lambda total: total[...], mosaic.ACC((ROWS, c), jnp.float32))
        zero_row = zeros.max(1)
        start = (zero_row + MASKED, zero_row, zeros)
        top, total, y = jax.lax.fori_loop(0, steps, step, start)
        top_ref[b, h, rows], total_ref[b, h, rows], y_ref[b, rows, h] = top, total, y

    @pl.when(wg == GROUPS)
    def _():
        mosaic.set_max_registers(40, action="decrease")
        k = jax.lax.div(h, group)

        def wait_until_free(n, free):
            # the first blocks have no earlier reader
            pl.when(n >= STAGES)(
                functools.partial(mosaic.barrier_wait, free.at[jax.lax.rem(n, STAGES)])
            )

        def copy_block(n, _):
            slot = jax.lax.rem(n, STAGES)
            keys = pl.ds((first + n) * KEY, KEY)
            for block, smem, full, free in (
                (k_ref.at[b, k, :, keys], k_smem, k_full, k_free),
                (v_ref.at[b, keys, k], v_smem, v_full, v_free),
            ):
                wait_until_free(n, free)
                mosaic.copy_gmem_to_smem(block, smem.at[slot], full.at[slot])
            return None

        def wait_for_readers(n, _):
            wait_until_free(n, k_free)
            wait_until_free(n, v_free)
            return None

        jax.lax.fori_loop(0, steps, copy_block, None)
        # wait until the last blocks have been read too
        jax.lax.fori_loop(steps, steps + STAGES, wait_for_readers, None)


def clear_blocks(spec: Spec, visits_bi4, q_bthc, k_bskc, v_bskc):
    """Attention over the blocks of keys ``[visit.first_clear, visit.end_clear)``, unnormalised.

    Args:
      visits_bi4: a `ranges.Visit` for each block of `QUERY` queries, ``[b, blocks, 4]``.
      q_bthc, k_bskc, v_bskc: lengths are multiples of `QUERY` and `KEY`.

    Returns:
      ``top_bht``, the greatest score; ``total_bht``, the sum of exponentials relative to it;
      ``y_bthc``, the values weighted by these; all float32. For a query without such blocks the
      greatest score is below ``MASKED / 2`` and the others are 0.
    """
    b, t, h, c = q_bthc.shape
    transforms = (mosaic.TilingTransform((8, 64)), mosaic.SwizzleTransform(128))

    def blocks(*shape):
        return mosaic.SMEM(shape, q_bthc.dtype, transforms=transforms)

    def body(*refs):
        pl.run_scoped(
            lambda *scratch: _kernel(spec, h // k_bskc.shape[2], refs, scratch),
            blocks(GROUPS, ROWS, c),
            blocks(STAGES, c, KEY),
            blocks(STAGES, KEY, c),
            blocks(GROUPS, ROWS, KEY),
            mosaic.Barrier(num_barriers=GROUPS),
            mosaic.Barrier(num_barriers=STAGES),
            mosaic.Barrier(num_barriers=STAGES),
            mosaic.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
            mosaic.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
            collective_axes="wg",
        )

    body.__name__ = "flash_attention_clear"
    numbers = jax.ShapeDtypeStruct((b, h, t), jnp.float32)
    top_bht, total_bht, y_bthc = mosaic.kernel(
        body,
        out_type=(numbers, numbers, jax.ShapeDtypeStruct(q_bthc.shape, jnp.float32)),
        grid=(t // QUERY, h, b),
        grid_names=("i", "h", "b"),
        num_threads=GROUPS + 1,
        thread_name="wg",
        compiler_params=mosaic.CompilerParams(approx_math=True),
        # channels first: a block of keys is then the right factor of a product
    )(visits_bi4.reshape(-1), q_bthc, jnp.transpose(k_bskc, (0, 2, 3, 1)), v_bskc)
    return top_bht / LOG2E, total_bht, y_bthc
