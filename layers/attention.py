"""Attention: multi-head, grouped-query and multi-query in one function, and the layer around it.

Multi-head attention (Vaswani 2017, eq. 1) when ``k == h``; multi-query (Shazeer 2019) when
``k == 1``; grouped-query (Ainslie 2023, arXiv:2305.13245) between. Keys and values are never
repeated in memory. The equation itself is `pallas_kernels.flash_attention.reference`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import alibi
from layers.config import check, check_choice
from layers.context import CONTEXTS, Keys, ring_attention, ulysses_attention
from layers.hooks import Tap
from layers.linear import Linear, fan_in_normal
from layers.norm import Norm
from layers.rotary import RotaryConfig, rotated_channels
from layers.sharding import gather, island, mesh_axis, spec
from layers.state import KVCache
from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.flash_attention import attention_weights, flash_attention
from pallas_kernels.flash_attention.reference import mix


def attention(
    q_bthc: jax.Array,
    k_bskc: jax.Array,
    v_bskc: jax.Array,
    *,
    q_positions_bt: jax.Array | None = None,
    k_positions_bs: jax.Array | None = None,
    q_segments_bt: jax.Array | None = None,
    k_segments_bs: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    alibi_slopes_h: jax.Array | np.ndarray | None = None,
    soft_cap: float | None = None,
    sinks_h: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    context: str = "gather",
    tap: Tap | None = None,
) -> jax.Array:
    """`pallas_kernels.flash_attention` on whatever mesh is in force; see there for the arguments.

    Rows of the batch, heads and queries may lie on different devices; ``context`` says how queries
    meet keys along a split time (`layers.context`). A ``tap`` that wants ``attention.weights`` gets
    them, which takes the square of the length in memory, gathers keys, and leaves
    ``implementation`` without a say.
    """
    names = (
        "q_positions_bt", "k_positions_bs", "q_segments_bt", "k_segments_bs",
        "alibi_slopes_h", "sinks_h",
    )  # fmt: skip
    options = dict(causal=causal, window=window, soft_cap=soft_cap, scale=scale)
    b, t, s = *q_bthc.shape[:2], k_bskc.shape[1]
    if spec() is not None:
        # each device has its own share of the queries and must be told where they stand
        q_positions_bt = _rows(jnp.arange(t) if q_positions_bt is None else q_positions_bt, b)
        k_positions_bs = _rows(jnp.arange(s) if k_positions_bs is None else k_positions_bs, b)
    slopes_h = None if alibi_slopes_h is None else jnp.asarray(alibi_slopes_h)
    biases = (q_positions_bt, k_positions_bs, q_segments_bt, k_segments_bs, slopes_h, sinks_h)
    axis = mesh_axis("time")
    split = None if context == "gather" or axis is None or _wants_weights(tap) else "time"
    q_axes, k_axes = ("batch", "time", "heads", None), ("batch", split, "kv_heads", None)
    q_row, k_row = ("batch", "time"), ("batch", split)
    bias_axes = (q_row, k_row, q_row, k_row, ("heads",), ("heads",))

    if tap is not None and _wants_weights(tap):

        def see(q, k, *biases):
            return attention_weights(q, k, **options, **dict(zip(names, biases, strict=True)))

        weight_axes = ("batch", "heads", "time", None)
        weights_bhts = island(
            see, (q_bthc, k_bskc, *biases), (q_axes, k_axes, *bias_axes), weight_axes
        )
        weights_bhts = tap("attention.weights", weights_bhts)
        return island(mix, (weights_bhts, v_bskc), (weight_axes, k_axes), q_axes)

    def attend(q, k, v, *biases):
        if split:
            q_at, k_at, q_segments, k_segments, slopes, sinks = biases
            keys = Keys(k, v, k_at, k_segments)
            own: dict[str, Any] = dict(axis=axis, implementation=implementation, **options)
            if context == "ulysses":
                return ulysses_attention(q, keys, q_at, q_segments, slopes, sinks, **own)
            own["contiguous"] = context == "ring"
            return ring_attention(q, keys, q_at, q_segments, slopes, sinks, **own)
        named = dict(zip(names, biases, strict=True))
        return flash_attention(q, k, v, **options, **named, implementation=implementation)

    return island(
        attend, (q_bthc, k_bskc, v_bskc, *biases), (q_axes, k_axes, k_axes, *bias_axes), q_axes
    )


def _wants_weights(tap: Tap | None) -> bool:
    return tap is not None and tap.wants("attention.weights")


def _rows(a: jax.Array, batch: int) -> jax.Array:
    """One row, or one for each of the batch, as one for each."""
    return jnp.broadcast_to(a, (batch, a.shape[-1]))


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One attention layer.

    ``num_kv_heads`` None: as many as ``num_heads``. ``head_dim`` None: width / num_heads.
    ``window``: reach of the pattern's ``"sliding"`` layers, in tokens, the query's own included.
    ``soft_cap``, ``sinks``, ``scale``: see `attention`. ``qk_norm``: RMSNorm of queries and keys
    over each head's channels (Henry 2020; Qwen3), ``qk_norm_across_heads``: over those of all heads
    together (OLMo 2). ``qkv_bias``, ``out_bias``: biases.
    ``implementation``: of `pallas_kernels.flash_attention`; None chooses by platform. ``context``:
    how queries meet keys on a mesh that splits time, one of `layers.context.CONTEXTS`.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    soft_cap: float | None = None
    qk_norm: bool = False
    qk_norm_across_heads: bool = False
    sinks: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    implementation: str | None = None
    context: str = "gather"

    def __post_init__(self):
        check_choice("context", self.context, CONTEXTS)
        check(self.num_heads > 0, "num_heads", self.num_heads, "must be > 0")
        check(
            self.num_kv_heads is None
            or (self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0),
            "num_kv_heads",
            self.num_kv_heads,
            f"must divide num_heads={self.num_heads}",
        )
        for name in ("head_dim", "window", "soft_cap", "scale"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be > 0 or None")
        check(
            self.qk_norm or not self.qk_norm_across_heads,
            "qk_norm_across_heads",
            self.qk_norm_across_heads,
            "qk_norm is off",
        )
        if self.implementation is not None:
            check_choice("implementation", self.implementation, IMPLEMENTATIONS)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def channels(self, width: int) -> int:
        """Channels of a head in a model of ``width``; raises `ConfigError` if they don't divide."""
        if self.head_dim is not None:
            return self.head_dim
        heads = self.num_heads
        check(width % heads == 0, "num_heads", heads, f"must divide width={width}, or set head_dim")
        return width // heads


class Attention(nnx.Module):
    """Projections, positions, `attention`, output projection: one sequence mixer.

    ``sliding`` limits the reach to ``config.window`` and makes the cache roll; ``rotary_config``
    and ``use_alibi`` say how positions enter, if they do; ``qk_norm`` which RMSNorm queries and
    keys have, if any.
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
        norm_eps: float = 1e-6,
        out_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        h, k, c = config.num_heads, config.kv_heads, config.channels(width)
        if sliding:
            check(config.window is not None, "attention.window", None, "a sliding layer needs it")
        if rotary_config is not None:
            rotated_channels(c, rotary_config.fraction)
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
            return Norm(qk_norm, shape, eps=norm_eps, axes=axes, param_dtype=param_dtype)

        self.query_norm = norm(h, "heads") if config.qk_norm else None
        self.key_norm = norm(k, "kv_heads") if config.qk_norm else None
        zeros = jnp.zeros((h,), param_dtype)
        self.sinks = nnx.Param(zeros, axes=("heads",)) if config.sinks else None

    def init_state(self, batch: int, max_length: int, dtype=None) -> KVCache:
        """An empty cache of ``max_length`` tokens, or of ``window`` if that is fewer."""
        capacity = min(max_length, self.window or max_length)
        return KVCache.empty(
            batch,
            capacity,
            self.config.kv_heads,
            self.head_dim,
            dtype or self.dtype,
            rolling=capacity < max_length,
        )

    def __call__(
        self,
        x_btd: jax.Array,
        positions_bt: jax.Array,
        segment_ids_bt: jax.Array | None = None,
        state: KVCache | None = None,
        tap: Tap | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Mix along time; with ``state``, after the tokens it holds. Returns ``(y_btd, state)``."""
        tap = tap or Tap()
        q, k, v = self.query(x_btd), self.key(x_btd), self.value(x_btd)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary_config is not None:
            q, k = (self.rotary_config(a, positions_bt) for a in (q, k))
        q, k, v = tap("attention.query", q), tap("attention.key", k), tap("attention.value", v)

        segments_bt = segment_ids_bt
        k_positions, k_segments = positions_bt, segment_ids_bt
        if state is not None:
            positions_bt = jnp.broadcast_to(positions_bt, x_btd.shape[:2])
            if segments_bt is None:
                segments_bt = jnp.zeros_like(positions_bt)
            seen_before = state
            state = state.write(k, v, positions_bt, segments_bt)
            held = state
            if state.rolling and x_btd.shape[1] > 1:
                # Writing many tokens overwrites keys the first of them still see, so look at what
                # was there before and at the new ones. One token overwrites only what left the
                # window.
                held = dataclasses.replace(
                    seen_before,
                    keys_bskc=_append(seen_before.keys_bskc, k),
                    values_bskc=_append(seen_before.values_bskc, v),
                    positions_bs=_append(seen_before.positions_bs, positions_bt),
                    segments_bs=_append(seen_before.segments_bs, segments_bt),
                )
            k, v = held.keys_bskc.astype(self.dtype), held.values_bskc.astype(self.dtype)
            k_positions, k_segments = held.positions_bs, held.segments_bs
        k_positions = jnp.broadcast_to(k_positions, k.shape[:2])
        slopes_h = alibi.slopes(self.config.num_heads) if self.use_alibi else None
        sinks_h = self.sinks
        if sinks_h is not None:
            sinks_h = gather(sinks_h[...], sinks_h.axes, rows=("batch", "time"))
        y = attention(
            q,
            k,
            v,
            q_positions_bt=positions_bt,
            k_positions_bs=k_positions,
            q_segments_bt=segments_bt,
            k_segments_bs=k_segments,
            window=self.window,
            alibi_slopes_h=slopes_h,
            soft_cap=self.config.soft_cap,
            sinks_h=sinks_h,
            scale=self.config.scale,
            implementation=self.config.implementation,
            context=self.config.context if state is None else "gather",
            tap=tap,
        )
        return self.out(tap("attention.output", y)), state


def _append(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.concatenate((old, new.astype(old.dtype)), axis=1)
