"""Multi-head latent attention: keys and values of low rank (DeepSeek-V2, arXiv:2405.04434, §2.1).

Each token has one latent vector, from which the keys and values of all heads are computed, and one
rotated key that all heads share. Without a state, attention uses these keys and values. With a
state, only latents and rotated keys are cached (eq. 9–19), and the projections to keys and values
are absorbed into those of queries and outputs (§2.1.2): all heads attend to the latents, which are
one key-value head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.attention import observed_attention
from layers.cache import KVCache
from layers.config import EXECUTION, check, check_choice, check_types
from layers.context import Context
from layers.context_parallel import sharded_attention
from layers.hooks import Tap
from layers.linear import Linear, fan_in_normal
from layers.norm import Norm
from layers.paged_cache import PagedCache
from layers.rotary import RotaryConfig
from layers.sharding import reshard
from layers.state import CONTIGUOUS, CacheConfig
from layers.weights import einsum
from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.mask import Mask

LATENT = ("batch", "time", None)


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """The configuration of latent attention.

    ``rank``: of the latent of keys and values; ``query_rank``: of the latent of queries, None if
    queries are projections of the input. ``head_dim``: channels of a head's queries and keys
    without rotation, ``rotary_dim``: with rotation; ``value_dim``: channels of a head's values.
    ``bias``: of the projections to latents and to the output. ``scale``: of scores, default
    ``1 / sqrt(head_dim + rotary_dim)``. ``norm_eps``: of the latents' norms, default the model's.
    ``implementation``: of `pallas_kernels.flash_attention`; None chooses by platform.
    """

    num_heads: int
    rank: int
    head_dim: int
    rotary_dim: int
    value_dim: int
    query_rank: int | None = None
    bias: bool = False
    scale: float | None = None
    norm_eps: float | None = None
    implementation: str | None = dataclasses.field(default=None, metadata=EXECUTION)

    def __post_init__(self):
        check_types(self)
        for name in ("num_heads", "rank", "head_dim", "value_dim"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        for name in ("query_rank", "scale", "norm_eps"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be > 0 or None")
        even = self.rotary_dim > 0 and self.rotary_dim % 2 == 0
        check(even, "rotary_dim", self.rotary_dim, "must be even and > 0")
        if self.implementation is not None:
            check_choice("implementation", self.implementation, IMPLEMENTATIONS)


class LatentAttention(nnx.Module):
    """Latent attention as a sequence mixer; its position encoding is rotary."""

    def __init__(
        self,
        config: LatentConfig,
        width: int,
        *,
        rngs: nnx.Rngs,
        rotary_config: RotaryConfig,
        norm_eps: float = 1e-6,
        out_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        rotary_config.check_channels(config.rotary_dim)
        self.config, self.rotary_config, self.dtype = config, rotary_config, dtype
        h, r, q = config.num_heads, config.rank, config.query_rank
        c, p, v = config.head_dim, config.rotary_dim, config.value_dim
        dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)

        def down(size):
            return Linear(
                "btd,dr->btr", (width, size), ("embed", None), LATENT,
                rngs=rngs, bias=config.bias, **dtypes,
            )  # fmt: skip

        def heads(inputs, axis, channels):
            return Linear(
                "btr,rhc->bthc", (inputs, h, channels), (axis, "heads", "head_dim"),
                ("batch", "time", "heads", None), rngs=rngs, **dtypes,
            )  # fmt: skip

        def norm(size):
            eps = config.norm_eps or norm_eps
            return Norm("rmsnorm", size, eps=eps, param_dtype=param_dtype)

        self.query_down = None if q is None else down(q)
        self.query_norm = None if q is None else norm(q)
        self.query = heads(width, "embed", c + p) if q is None else None
        self.query_up = None if q is None else heads(q, None, c + p)
        self.latent_down, self.latent_norm = down(r), norm(r)
        self.rotary_key = down(p)
        self.key, self.value = heads(r, None, c), heads(r, None, v)
        self.out = Linear(
            "bthc,hcd->btd", (h, v, width), ("heads", "head_dim", "embed"), LATENT,
            rngs=rngs, bias=config.bias, init=fan_in_normal(out_scale, fan_in=h * v), **dtypes,
        )  # fmt: skip

    def init_state(
        self, batch: int, max_length: int, cache: CacheConfig = CONTIGUOUS
    ) -> KVCache | PagedCache:
        """An empty cache of latents and rotated keys: one key-value head without other values."""
        channels = self.config.rank + self.config.rotary_dim
        sizes = batch, max_length, 1, channels, cache.dtype_for(channels, self.dtype)
        if cache.kind == "paged":
            return PagedCache.empty(cache, *sizes, has_values=False)
        return KVCache.empty(*sizes, rolling=False, has_values=False)

    def __call__(self, x_btd: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """Mix tokens along time; with a state, these tokens follow those that it holds."""
        config, tap, mask, (b, t) = self.config, context.tap, context.mask, x_btd.shape[:2]
        c, p = config.head_dim, config.rotary_dim
        positions = context.rotary_positions(t)
        q = self._queries(x_btd)
        q_plain, q_rotated = q[..., :c], self.rotary_config(q[..., c:], positions)
        latent_btr = self.latent_norm(self.latent_down(x_btd))
        rotated_btkp = self.rotary_config(self.rotary_key(x_btd)[:, :, None], positions)
        scale = (c + p) ** -0.5 if config.scale is None else config.scale
        options: dict[str, Any] = dict(scale=scale, implementation=config.implementation, tap=tap)
        if context.state is None:
            keys = self.key(latent_btr)
            rotated = jnp.broadcast_to(rotated_btkp, (*keys.shape[:3], p))
            rotated = reshard(rotated, "batch", "time", "heads", None)
            k = jnp.concatenate((keys, rotated), axis=-1)
            q = tap("attention.query", jnp.concatenate((q_plain, q_rotated), axis=-1))
            k, v = tap("attention.key", k), tap("attention.value", self.value(latent_btr))
            y = _attend(q, k, v, mask, **options)
            return self.out(tap("attention.output", y)), context

        mask = mask.with_segments(b, t)
        cached_btkc = jnp.concatenate((latent_btr[:, :, None], rotated_btkp), axis=-1)
        state, keys = context.state.extend(
            cached_btkc, None, mask.q_positions_bt, mask.q_segments_bt
        )
        q_latent = self._absorbed("bthc,rhc->bthr", q_plain, self.key)
        q = tap("attention.query", jnp.concatenate((q_latent, q_rotated), axis=-1))
        observed = [tap.is_used(f"attention.{name}") for name in ("key", "value", "weights")]
        if isinstance(keys, PagedCache) and any(observed):
            keys = keys.gathered(self.dtype)
        if isinstance(keys, PagedCache):
            y = keys.attend(
                q,
                mask,
                scale=scale,
                value_channels=config.rank,
                implementation=config.implementation,
            )
        else:
            # values are the first channels of keys; products with the others cost less than a copy
            v = k = tap("attention.key", keys.k_bskc)
            if tap.is_used("attention.value"):
                v = tap("attention.value", k[..., : config.rank])
            mask = mask.with_keys(keys.positions_bs, keys.segments_bs)
            y = _attend(q, k, v, mask, **options)[..., : config.rank]
        y = self._absorbed("bthr,rhc->bthc", y, self.value)
        return self.out(tap("attention.output", y)), context.replace(state=state)

    def _queries(self, x_btd: jax.Array) -> jax.Array:
        if self.query is not None:
            return self.query(x_btd)
        down, norm, up = self.query_down, self.query_norm, self.query_up
        assert down is not None and norm is not None and up is not None
        return up(norm(down(x_btd)))

    def _absorbed(self, subscripts: str, x: jax.Array, linear: Linear) -> jax.Array:
        """The product of queries or outputs with the absorbed weight of ``linear``."""
        return einsum(
            subscripts,
            x,
            linear.weight,
            dtype=self.dtype,
            out_axes=("batch", "time", "heads", None),
        )


def _attend(q, k, v, mask: Mask, *, tap: Tap, implementation: str | None, scale: float):
    """Attention whose keys and values may have different numbers of channels."""
    k, v = (reshard(a, "batch", None, "kv_heads", None) for a in (k, v))
    channels = v.shape[-1]

    def pad(a):
        missing = max(k.shape[-1], channels) - a.shape[-1]
        return jnp.pad(a, ((0, 0),) * 3 + ((0, missing),)) if missing else a

    q, k, v = pad(q), pad(k), pad(v)
    if tap.is_used("attention.weights"):
        y = observed_attention(q, k, v, mask, tap, scale=scale)
    else:
        y = sharded_attention(q, k, v, mask, implementation=implementation, scale=scale)
    return y[..., :channels]
