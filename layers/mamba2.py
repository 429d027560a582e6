"""Mamba-2: state-space duality; each head has a scalar decay (Dao & Gu 2024, arXiv:2405.21060).

The gate ``z``, the input ``x``, ``b``, ``c`` and the heads' step sizes are all projections of the
token (§7.1, the parallel block). ``x``, ``b`` and ``c`` pass through the short convolution of
`layers.mamba`, then through `pallas_kernels.ssd`. The gated result is normalised over the heads of
each group before the output projection (Figure 6, right).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.config import check
from layers.context import Context
from layers.linear import Linear, fan_in_normal
from layers.mamba import CHANNELS, SELECTIVE, Convolution, MambaConfig, step_bias
from layers.recurrent import RecurrentState, Tail, Tokens, after, carried
from layers.sharding import mesh_axis, per_device, reshard
from layers.state import CONTIGUOUS, CacheConfig
from layers.weights import read
from pallas_kernels.ssd import ssd

# the projections that pass through the convolution
CONVOLVED = ("into", "b", "c")


def gated_norm(
    y_bti: jax.Array,
    z_bti: jax.Array,
    scale_i: jax.Array,
    groups: int,
    *,
    eps: float,
    axis: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """RMSNorm of ``y · silu(z)`` over each of ``groups``; float32.

    ``axis``: the mesh axis that one group is sharded over.
    """
    y = y_bti.astype(jnp.float32) * jax.nn.silu(z_bti.astype(jnp.float32))
    grouped = y.reshape(*y.shape[:2], groups, -1)
    square = jnp.mean(jnp.square(grouped), axis=-1, keepdims=True)
    if axis is not None:
        square = jax.lax.pmean(square, axis)
    return (grouped * jax.lax.rsqrt(square + eps)).reshape(y.shape) * scale_i.astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba2State(RecurrentState):
    """``tails``: of the convolutions, in the order of `CONVOLVED`; ``scan_bhpn``: of heads."""

    tails: tuple[Tail, Tail, Tail]
    scan_bhpn: jax.Array  # float32


class Mamba2(nnx.Module):
    """Mamba-2's mixer: projection, convolution, state-space duality, gated norm (§7.1)."""

    def __init__(
        self,
        config: MambaConfig,
        width: int,
        *,
        rngs: nnx.Rngs,
        norm_eps: float = 1e-6,
        out_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        chosen = config.selective
        complete = set(chosen) == set(SELECTIVE)
        check(complete, "mamba.selective", chosen, "must be all of delta, b, c for mamba2 layers")
        self.config, self.norm_eps, self.dtype = config, norm_eps, dtype
        self.inner, heads = config.expand * width, config.heads(width)
        # one group is replicated; several are sharded as their heads are
        shared = None if config.groups == 1 else "channels"
        self.shared = ("batch", None, shared)
        dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)

        def into(size, axis, **options):
            return Linear(
                "btd,di->bti", (width, size), ("embed", axis), ("batch", None, axis),
                rngs=rngs, bias=config.bias, **options, **dtypes,
            )  # fmt: skip

        def parameter(value, axis="heads", stored=param_dtype):
            return nnx.Param(value.astype(stored), axes=(axis,))

        state = config.groups * config.state
        self.gate, self.into = (into(self.inner, "channels") for _ in range(2))
        self.b, self.c = into(state, shared), into(state, shared)
        self.delta = into(heads, "heads", out_dtype=jnp.float32)
        sizes = {"into": (self.inner, "channels"), "b": (state, shared), "c": (state, shared)}
        self.convolutions = nnx.Dict(
            {
                name: Convolution(
                    config.convolution, *sizes[name], rngs=rngs, bias=config.convolution_bias,
                    **dtypes,
                )
                for name in CONVOLVED
            }
        )  # fmt: skip
        self.delta_bias = parameter(step_bias(rngs.params(), (heads,), config))
        # as in the released code: rates are uniform between 1 and 16
        rates = jax.random.uniform(rngs.params(), (heads,), minval=1, maxval=16)
        # float32 for every param_dtype, as in the released code
        self.log_rate = parameter(jnp.log(rates), stored=jnp.float32)
        self.skip = parameter(jnp.ones(heads), stored=jnp.float32)
        self.norm_scale = parameter(jnp.ones(self.inner), "channels")
        self.out = Linear(
            "bti,id->btd", (self.inner, width), ("channels", "embed"), ("batch", "time", None),
            rngs=rngs, init=fan_in_normal(out_scale), bias=config.bias, **dtypes,
        )  # fmt: skip

    def init_state(
        self, batch: int, max_length: int, cache: CacheConfig = CONTIGUOUS
    ) -> Mamba2State:
        """The empty state; ``max_length`` does not change its size."""
        del max_length, cache
        n, p = self.config.state, self.config.head_dim
        tail_length, group = self.config.convolution - 1, self.config.groups * n
        into, b, c = (
            Tail.empty(batch, tail_length, size, self.dtype, axis)
            for size, axis in zip((self.inner, group, group), self._axes(), strict=True)
        )
        scan = jnp.zeros((batch, self.inner // p, p, n), jnp.float32)
        return Mamba2State((into, b, c), reshard(scan, "batch", "heads", None, None))

    def _axes(self) -> list[str | None]:
        """The logical names of the channels of `CONVOLVED`."""
        return [self.convolutions[name].axis for name in CONVOLVED]

    def __call__(self, x_btd: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """Mix tokens along time; with a state, these tokens follow those that it holds."""
        state = context.state
        tails = (None,) * len(CONVOLVED) if state is None else state.tails
        tokens, x_btd = Tokens.of(reshard(x_btd, "batch", None, None), context.mask, tails[0])
        inputs = self.into(x_btd), self.b(x_btd), self.c(x_btd)
        x_bti, b_btm, c_btm = (
            self.convolutions[name](array, tokens, tail)
            for name, array, tail in zip(CONVOLVED, inputs, tails, strict=True)
        )
        z_bti, delta_bth = self.gate(x_btd), self.delta(x_btd)
        initial = valid_bt = None
        if state is not None:
            initial = carried(state.scan_bhpn, tokens.continues(state.tails[0]))
            valid_bt = tokens.valid_bt
        config = self.config

        def run(x, delta, log_rate, b, c, skip, bias, z, scale, segments, valid, initial):
            def split(array, channels):
                return array.reshape(*array.shape[:2], -1, channels)

            b, c = split(b, config.state), split(c, config.state)
            steps = jax.nn.softplus(delta + bias)
            if config.delta_least or config.delta_most is not None:
                steps = jnp.clip(steps, config.delta_least, config.delta_most)
            if valid is not None:
                steps = jnp.where(valid[..., None], steps, 0)  # padding does not change the state
            y, end = ssd(
                split(x, config.head_dim), steps, -jnp.exp(log_rate), b, c, skip,
                segment_ids_bt=segments,
                initial_state_bhpn=initial,
                implementation=config.implementation,
            )  # fmt: skip
            # one group spans the heads of all devices
            axis = mesh_axis("channels") if config.groups == 1 else None
            y = gated_norm(y.reshape(x.shape), z, scale, b.shape[2], eps=self.norm_eps, axis=axis)
            return y.astype(x.dtype), end

        def of_heads(parameter):
            return read(parameter, jnp.float32)

        heads, state_axes = ("heads",), ("batch", "heads", None, None)
        y_bti, scan_bhpn = per_device(
            run,
            (
                x_bti, delta_bth, of_heads(self.log_rate), b_btm, c_btm, of_heads(self.skip),
                of_heads(self.delta_bias), z_bti, of_heads(self.norm_scale), tokens.segments_bt,
                valid_bt, initial,
            ),
            (
                CHANNELS, ("batch", None, "heads"), heads, self.shared, self.shared, heads, heads,
                CHANNELS, ("channels",), ("batch", None), ("batch", None), state_axes,
            ),
            [CHANNELS, state_axes],
        )  # fmt: skip
        if state is not None:
            into, b, c = (
                after(array, tokens, tail, axis)
                for array, tail, axis in zip(inputs, state.tails, self._axes(), strict=True)
            )
            state = Mamba2State((into, b, c), scan_bhpn)
        y_bti = context.tap("mixer.hidden", tokens.as_called(y_bti))
        return self.out(y_bti), context.replace(state=state)
