"""Multi-head, grouped-query and multi-query attention: the function and its layer.

Multi-head attention (Vaswani 2017, eq. 1) when ``k == h``; multi-query (Shazeer 2019) when
``k == 1``; grouped-query (Ainslie 2023, arXiv:2305.13245) between.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import alibi
from layers.cache import KVCache
from layers.config import EXECUTION, check, check_choice, check_types
from layers.context import Context
from layers.context_parallel import CONTEXTS, sharded_attention
from layers.hooks import Tap
from layers.linear import Linear, fan_in_normal
from layers.norm import Norm
from layers.paged_cache import PagedCache
from layers.rotary import RotaryConfig
from layers.sharding import per_device
from layers.state import CONTIGUOUS, CacheConfig
from layers.weights import read
from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.mask import CAUSAL, Mask


def attention(
    q_bthc: jax.Array, k_bskc: jax.Array, v_bskc: jax.Array, mask: Mask = CAUSAL, **options: Any
) -> jax.Array:
    """``softmax(q kᵀ / √c) v`` (Vaswani 2017, eq. 1) over the keys that ``mask`` lets a query see.

    This is the equation on one device, with all scores in memory. The layer calls its fused form,
    `pallas_kernels.flash_attention`. ``options`` are those of `attention_weights`.
    """
    weights_bhts = attention_weights(q_bthc, k_bskc, mask, **options)
    return weighted_sum(weights_bhts, v_bskc)


def attention_weights(
    q_bthc: jax.Array,
    k_bskc: jax.Array,
    mask: Mask = CAUSAL,
    *,
    scale: float | None = None,
    alibi_slopes_h: jax.Array | np.ndarray | None = None,
    soft_cap: float | None = None,
    sinks_h: jax.Array | None = None,
) -> jax.Array:
    """The softmax's weights ``[b, h, t, s]``, float32 (float64 if ``q`` is).

    ``scale``: of scores, default ``1 / √c``. ``alibi_slopes_h``: ``slope · distance`` is subtracted
    from scores (ALiBi). ``soft_cap``: scores are ``cap · tanh(score / cap)`` (Gemma 2).
    ``sinks_h``: one logit for each head, which is added to the denominator and has no value
    (gpt-oss). A query that sees no key has weights of 0.
    """
    (b, t, h, c), (s, k) = q_bthc.shape, k_bskc.shape[1:3]
    score_dtype = jnp.promote_types(jnp.float32, q_bthc.dtype)
    # scores: query heads are in k groups; each group shares one key head
    q_btkgc = q_bthc.reshape(b, t, k, h // k, c)
    scores = jnp.einsum("btkgc,bskc->bkgts", q_btkgc, k_bskc, preferred_element_type=score_dtype)
    scores_bhts = scores.reshape(b, h, t, s) * (c**-0.5 if scale is None else scale)
    if alibi_slopes_h is not None:
        scores_bhts -= jnp.asarray(alibi_slopes_h)[:, None, None] * mask.distance(t, s)[:, None]
    if soft_cap is not None:
        scores_bhts = soft_cap * jnp.tanh(scores_bhts / soft_cap)
    # mask
    visible = mask.visible(t, s)[:, None]
    scores_bhts = jnp.where(visible, scores_bhts, -jnp.inf)
    # softmax; the maximum is subtracted so that exp does not overflow
    sink = -jnp.inf if sinks_h is None else sinks_h.astype(score_dtype)[:, None, None]
    maximum = jnp.maximum(jnp.max(scores_bhts, axis=-1, keepdims=True), sink)
    maximum = jax.lax.stop_gradient(jnp.where(jnp.isfinite(maximum), maximum, 0))
    weights_bhts = jnp.exp(scores_bhts - maximum)
    total = jnp.sum(weights_bhts, axis=-1, keepdims=True) + jnp.exp(sink - maximum)
    return weights_bhts / jnp.where(total > 0, total, 1)


def weighted_sum(weights_bhts: jax.Array, v_bskc: jax.Array) -> jax.Array:
    """``Σ_s weights · v``: ``[b, t, h, c]`` in ``v``'s dtype; heads are grouped as in scores."""
    b, h, t, s = weights_bhts.shape
    k, c = v_bskc.shape[2:]
    weights_bkgts = weights_bhts.reshape(b, k, h // k, t, s)
    y_btkgc = jnp.einsum(
        "bkgts,bskc->btkgc", weights_bkgts, v_bskc, preferred_element_type=weights_bhts.dtype
    )
    return y_btkgc.reshape(b, t, h, c).astype(v_bskc.dtype)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The configuration of attention layers.

    ``num_kv_heads`` None: as many as ``num_heads``. ``head_dim`` None: width / num_heads.
    ``window``: the number of tokens that a query of a ``"sliding"`` layer sees, itself included.
    ``soft_cap``, ``sinks``, ``scale``: see `attention_weights`. ``scale_by_layer``: scores of layer
    ``i`` are also divided by ``i + 1`` (Mistral-GPT-2). ``alibi_largest``: see `alibi.slopes`.
    ``qk_norm``: RMSNorm of queries and keys over each head's channels (Henry 2020; Qwen3);
    ``qk_norm_across_heads``: over the channels of all heads together (OLMo 2);
    ``qk_layernorm``: LayerNorm instead (MPT). ``qkv_bias``, ``out_bias``: biases. ``clip``:
    queries, keys and values are clipped to ``[−clip, clip]``, before a norm (MPT).
    ``implementation``: of `pallas_kernels.flash_attention`; None chooses by platform. ``context``:
    the algorithm where time is sharded, one of `layers.context_parallel.CONTEXTS`.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    soft_cap: float | None = None
    qk_norm: bool = False
    qk_norm_across_heads: bool = False
    qk_layernorm: bool = False
    sinks: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    scale_by_layer: bool = False
    alibi_largest: float = 8.0
    clip: float | None = None
    implementation: str | None = dataclasses.field(default=None, metadata=EXECUTION)
    context: str = dataclasses.field(default="gather", metadata=EXECUTION)

    def __post_init__(self):
        check_types(self)
        check_choice("context", self.context, CONTEXTS)
        check(self.num_heads > 0, "num_heads", self.num_heads, "must be > 0")
        check(
            self.num_kv_heads is None
            or (self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0),
            "num_kv_heads",
            self.num_kv_heads,
            f"must divide num_heads={self.num_heads}",
        )
        for name in ("head_dim", "window", "soft_cap", "scale", "clip"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be > 0 or None")
        check(self.alibi_largest > 0, "alibi_largest", self.alibi_largest, "must be > 0")
        for name in ("qk_norm_across_heads", "qk_layernorm"):
            allowed = self.qk_norm or not getattr(self, name)
            check(allowed, name, getattr(self, name), "requires qk_norm=True")
        if self.implementation is not None:
            check_choice("implementation", self.implementation, IMPLEMENTATIONS)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def channels(self, width: int) -> int:
        """The channels of a head; raises `ConfigError` if ``num_heads`` does not divide width."""
        if self.head_dim is not None:
            return self.head_dim
        heads = self.num_heads
        check(width % heads == 0, "num_heads", heads, f"must divide width={width} without head_dim")
        return width // heads


class Attention(nnx.Module):
    """A sequence mixer: projections, position encoding, `attention`, output projection.

    ``sliding``: a query sees ``config.window`` tokens, and the cache is rolling. ``rotary_config``,
    ``use_alibi``: how positions are encoded. ``qk_norm``: the kind of norm of queries and keys, if
    ``config.qk_norm``; ``norm_bias``: whether it has a bias.
    """

    def __init__(
        self,
        config: AttentionConfig,
        width: int,
        *,
        rngs: nnx.Rngs,
        sliding: bool = False,
        rotary_config: RotaryConfig | None = None,
        use_alibi: bool = False,
        qk_norm: str = "rmsnorm",
        norm_bias: bool = False,
        norm_eps: float = 1e-6,
        out_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        h, k, c = config.num_heads, config.kv_heads, config.channels(width)
        if sliding:
            check(
                config.window is not None, "attention.window", None, "is required by sliding layers"
            )
        if rotary_config is not None:
            rotary_config.check_channels(c)
        self.config, self.rotary_config, self.use_alibi = config, rotary_config, use_alibi
        self.window = config.window if sliding else None
        self.head_dim, self.dtype = c, dtype

        def heads_in(heads: int, axis: str):
            return Linear(
                "btd,dhc->bthc",
                (width, heads, c),
                ("embed", axis, "head_dim"),
                ("batch", "time", axis, None),
                rngs=rngs,
                bias=config.qkv_bias,
                dtype=dtype,
                param_dtype=param_dtype,
            )

        self.query = heads_in(h, "heads")
        self.key = heads_in(k, "kv_heads")
        self.value = heads_in(k, "kv_heads")
        self.out = Linear(
            "bthc,hcd->btd",
            (h, c, width),
            ("heads", "head_dim", "embed"),
            ("batch", "time", None),
            rngs=rngs,
            bias=config.out_bias,
            init=fan_in_normal(out_scale, fan_in=h * c),
            dtype=dtype,
            param_dtype=param_dtype,
        )

        def norm(heads: int, axis: str):
            across = config.qk_norm_across_heads
            shape, axes = ((heads, c), (axis, "head_dim")) if across else ((c,), ("head_dim",))
            return Norm(
                qk_norm, shape, eps=norm_eps, bias=norm_bias, axes=axes, param_dtype=param_dtype
            )

        self.query_norm = norm(h, "heads") if config.qk_norm else None
        self.key_norm = norm(k, "kv_heads") if config.qk_norm else None
        zeros = jnp.zeros((h,), param_dtype)
        self.sinks = nnx.Param(zeros, axes=("heads",)) if config.sinks else None

    def init_state(
        self, batch: int, max_length: int, cache: CacheConfig = CONTIGUOUS
    ) -> KVCache | PagedCache:
        """An empty cache of ``max_length`` tokens.

        A contiguous cache has ``window`` slots if that is fewer. A paged one has pages of all
        tokens; those outside the window are not seen.
        """
        k, c = self.config.kv_heads, self.head_dim
        dtype = cache.dtype_for(c, self.dtype)
        if cache.kind == "paged":
            return PagedCache.empty(cache, batch, max_length, k, c, dtype)
        capacity = min(max_length, self.window or max_length)
        return KVCache.empty(batch, capacity, k, c, dtype, rolling=capacity < max_length)

    def __call__(self, x_btd: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """Mix tokens along time; with a state, these tokens follow those that it holds."""
        tap, state, (b, t) = context.tap, context.state, x_btd.shape[:2]
        q, k, v = self.query(x_btd), self.key(x_btd), self.value(x_btd)
        if (clip := self.config.clip) is not None:
            q, k, v = (jnp.clip(a, -clip, clip) for a in (q, k, v))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary_config is not None:
            positions = context.rotary_positions(t)
            q, k = (self.rotary_config(a, positions) for a in (q, k))
        q, k, v = tap("attention.query", q), tap("attention.key", k), tap("attention.value", v)

        mask, pages = dataclasses.replace(context.mask, window=self.window), None
        if state is not None:
            mask = mask.with_segments(b, t)
            state, keys = state.extend(k, v, mask.q_positions_bt, mask.q_segments_bt)
            if isinstance(keys, PagedCache) and tap.is_used("attention.weights"):
                keys = keys.gathered(self.dtype)
            if isinstance(keys, PagedCache):
                pages = keys
            else:
                mask = mask.with_keys(keys.positions_bs, keys.segments_bs)
                assert keys.v_bskc is not None
                k, v = keys.k_bskc, keys.v_bskc
        options: dict[str, Any] = dict(soft_cap=self.config.soft_cap, scale=self.config.scale)
        if self.use_alibi:
            config = self.config
            options["alibi_slopes_h"] = alibi.slopes(config.num_heads, config.alibi_largest)
        if self.config.scale_by_layer:
            q = (q.astype(jnp.float32) / (context.layer + 1)).astype(q.dtype)
        if self.sinks is not None:
            options["sinks_h"] = read(self.sinks, self.sinks.dtype, deferred=True)
        if tap.is_used("attention.weights"):
            y = observed_attention(q, k, v, mask, tap, **options)
        elif pages is not None:
            y = pages.attend(q, mask, implementation=self.config.implementation, **options)
        else:
            y = sharded_attention(
                q,
                k,
                v,
                mask,
                implementation=self.config.implementation,
                context=self.config.context if state is None else "gather",
                **options,
            )
        return self.out(tap("attention.output", y)), context.replace(state=state)


def observed_attention(
    q_bthc: jax.Array,
    k_bskc: jax.Array,
    v_bskc: jax.Array,
    mask: Mask,
    tap: Tap,
    *,
    alibi_slopes_h: np.ndarray | None = None,
    sinks_h: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """`attention` on the current mesh; its weights pass through ``tap``.

    Its memory grows with the square of the length, and keys are not sharded over time.
    """
    row, k_row = ("batch", "time"), ("batch", None)
    q_axes, k_axes = (*row, "heads", None), (*k_row, "kv_heads", None)
    weights_axes = ("batch", "heads", "time", None)
    slopes_h = None if alibi_slopes_h is None else jnp.asarray(alibi_slopes_h)
    mask = mask.whole(q_bthc.shape[0], q_bthc.shape[1], k_bskc.shape[1])

    def weights(q, k, mask, slopes, sinks):
        return attention_weights(q, k, mask, alibi_slopes_h=slopes, sinks_h=sinks, **options)

    weights_bhts = per_device(
        weights,
        (q_bthc, k_bskc, mask, slopes_h, sinks_h),
        (q_axes, k_axes, mask.sides(row, k_row), ("heads",), ("heads",)),
        weights_axes,
    )
    weights_bhts = tap("attention.weights", weights_bhts)
    return per_device(weighted_sum, (weights_bhts, v_bskc), (weights_axes, k_axes), q_axes)
