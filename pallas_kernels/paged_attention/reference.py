"""The equation of paged attention: attention over a copy of the row's pages."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.spec import Spec
from pallas_kernels.mask import Mask
from pallas_kernels.paged_attention.pages import Pages, gathered


def attention(
    spec: Spec,
    channels: int,
    q_bthc: jax.Array,
    pages: Pages,
    mask: Mask,
    slopes_h: jax.Array | None,
    sinks_h: jax.Array | None,
) -> jax.Array:
    """``softmax(bias(q kᵀ)) v`` over the slots of each row, ``[b, t, h, channels]``.

    Softmax is float32, or float64 if ``q`` is. Slots that no query sees count as zeros.
    """
    t, dtype = q_bthc.shape[1], jnp.promote_types(jnp.float32, q_bthc.dtype)
    mask = pages.key_mask(mask)
    page_bn = jnp.maximum(pages.table_bn, 0)
    k_bksc = gathered(pages.keys, page_bn).load(dtype)
    seen_bs = mask.visible(t, k_bksc.shape[2]).any(1)

    def seen(a_bksc):
        return jnp.swapaxes(jnp.where(seen_bs[:, None, :, None], a_bksc, 0), 1, 2)

    k_bskc = seen(k_bksc)
    v_bskc = k_bskc[..., :channels]
    if pages.values is not None:
        v_bskc = seen(gathered(pages.values, page_bn).load(dtype))
    y_bthc, _ = reference.attention(
        spec, q_bthc.astype(dtype), k_bskc, v_bskc, mask, slopes_h, sinks_h
    )
    return y_bthc.astype(q_bthc.dtype)
