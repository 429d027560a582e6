"""Mamba: a selective state space model as sequence mixer (Gu & Dao 2023, arXiv:2312.00752).

Figure 3: the input has two projections. One passes through a short causal convolution and the
selective scan (`pallas_kernels.selective_scan`); the other is the gate of its result.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.config import EXECUTION, TRAINING, check, check_choice, check_types
from layers.context import Context
from layers.linear import Linear, fan_in_normal
from layers.recurrent import RecurrentState, Tail, Tokens, after, before, carried
from layers.sharding import per_device, reshard
from layers.state import CONTIGUOUS, CacheConfig
from layers.weights import read
from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.selective_scan import selective_scan

SELECTIVE = ("delta", "b", "c")
CHANNELS = ("batch", None, "channels")
# a step size (before softplus, which gives 0) that does not change the state
STILL = -1e9


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """The configuration of Mamba-1 (`Mamba`) and Mamba-2 (`layers.mamba2`) layers.

    ``state``: size of the state of each channel (Mamba-1: 16; Mamba-2: 128). ``expand``: inner
    width / model width. ``convolution``: tokens that the convolution sees, the current one
    included. ``bias``: of the input and output projections; ``convolution_bias``: of the
    convolution. ``delta_min``, ``delta_max``: range of the initial step sizes.
    Mamba-1 only: ``delta_rank``: of the projection to step sizes, default ``width / 16``;
    ``selective``: which of `SELECTIVE` depend on the token; the others are parameters, as in S4
    (§3.1 and Table 7).
    Mamba-2 only: ``head_dim``; ``groups``: of heads that share ``b`` and ``c``;
    ``delta_least``, ``delta_most``: steps are clipped to this range after softplus.
    ``implementation``: of the scan; None chooses by platform.
    """

    state: int = 16
    expand: int = 2
    convolution: int = 4
    bias: bool = False
    convolution_bias: bool = True
    delta_min: float = dataclasses.field(default=0.001, metadata=TRAINING)
    delta_max: float = dataclasses.field(default=0.1, metadata=TRAINING)
    delta_rank: int | None = None
    selective: tuple[str, ...] = SELECTIVE
    head_dim: int = 64
    groups: int = 1
    delta_least: float = 0.0
    delta_most: float | None = None
    implementation: str | None = dataclasses.field(default=None, metadata=EXECUTION)

    def __post_init__(self):
        check_types(self)
        for name in ("state", "expand", "convolution", "delta_min", "head_dim", "groups"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        low = self.delta_min
        check(low < self.delta_max, "delta_max", self.delta_max, f"must be > delta_min={low}")
        least, most = self.delta_least, self.delta_most
        check(least >= 0, "delta_least", least, "must be ≥ 0")
        fits = most is None or most > least
        check(fits, "delta_most", most, f"must be None or > delta_least={least}")
        rank = self.delta_rank
        check(rank is None or rank > 0, "delta_rank", rank, "must be > 0 or None")
        for i, name in enumerate(self.selective):
            check_choice(f"selective[{i}]", name, SELECTIVE)
        if self.implementation is not None:
            check_choice("implementation", self.implementation, IMPLEMENTATIONS)

    def rank(self, width: int) -> int:
        """The rank of Mamba-1's projection to step sizes in a model of ``width``."""
        return self.delta_rank or math.ceil(width / 16)

    def heads(self, width: int) -> int:
        """Mamba-2's number of heads; raises `ConfigError` if sizes are not divisible."""
        inner = self.expand * width
        fits = inner % self.head_dim == 0
        check(fits, "head_dim", self.head_dim, f"must divide expand × width = {inner}")
        heads = inner // self.head_dim
        check(heads % self.groups == 0, "groups", self.groups, f"must divide the {heads} heads")
        return heads


def causal_convolution(
    x_btd: jax.Array, earlier: list[jax.Array], weight_nd: jax.Array, bias_d: jax.Array | None
) -> jax.Array:
    """``y_t = Σ_i weight_i · x_{t−n+1+i} + bias``, separately for each channel.

    ``earlier``: ``x`` delayed by ``n − 1, …, 1`` tokens (`layers.recurrent.before`).
    """
    y = x_btd * weight_nd[-1]
    for i, delayed in enumerate(earlier):
        y = y + delayed * weight_nd[i]
    return y if bias_d is None else y + bias_d


class Convolution(nnx.Module):
    """``silu(causal_convolution(x))`` over ``channels``."""

    def __init__(
        self,
        size: int,
        channels: int,
        axis: str | None,
        *,
        rngs: nnx.Rngs,
        bias: bool,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
    ):
        self.size, self.axis, self.dtype = size, axis, dtype
        # PyTorch's initialisation of a depthwise convolution, as in the released code
        bound = 1 / math.sqrt(size)

        def draw(shape, axes):
            value = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
            return nnx.Param(value.astype(param_dtype), axes=axes)

        self.weight = draw((size, channels), (None, axis))
        self.bias = draw((channels,), (axis,)) if bias else None

    def __call__(self, x_btd: jax.Array, tokens: Tokens, tail: Tail | None) -> jax.Array:
        earlier = before(x_btd, self.size - 1, tokens, tail, self.axis)
        bias = None if self.bias is None else read(self.bias, self.dtype)
        weight = read(self.weight, self.dtype)
        return jax.nn.silu(causal_convolution(x_btd, earlier, weight, bias))


def step_bias(key: jax.Array, shape: tuple[int, ...], config: MambaConfig) -> jax.Array:
    """A bias whose softplus is log-uniform over the range of step sizes."""
    low, high = math.log(config.delta_min), math.log(config.delta_max)
    delta = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
    return delta + jnp.log(-jnp.expm1(-delta))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaState(RecurrentState):
    """``tail``: the convolution's last inputs; ``scan_bdn``: the state of the scan, float32."""

    tail: Tail
    scan_bdn: jax.Array


class Mamba(nnx.Module):
    """Mamba-1's mixer: projections, convolution, selective scan, gate (§3.4)."""

    def __init__(
        self,
        config: MambaConfig,
        width: int,
        *,
        rngs: nnx.Rngs,
        out_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.config, self.dtype = config, dtype
        self.inner = inner = config.expand * width
        n = config.state
        rank = config.rank(width)
        dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)

        def linear(subscripts, shape, axes, out_axes, **options):
            return Linear(subscripts, shape, axes, out_axes, rngs=rngs, **options, **dtypes)

        def project():
            return linear(
                "btd,di->bti", (width, inner), ("embed", "channels"), CHANNELS, bias=config.bias
            )

        def low_rank(size):
            return linear(
                "bti,ir->btr", (inner, size), ("channels", None), ("batch", None, None)
            )  # fmt: skip

        def parameter(value, axes, stored=param_dtype):
            return nnx.Param(value.astype(stored), axes=axes)

        def select(name, make, make_fixed):
            return make() if name in config.selective else make_fixed()

        self.into, self.gate = project(), project()
        self.convolution = Convolution(
            config.convolution, inner, "channels", rngs=rngs, bias=config.convolution_bias, **dtypes
        )
        self.delta_down = select("delta", lambda: low_rank(rank), lambda: None)
        # as in the released code: uniform with variance 1 / (3 · rank)
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.delta_up = select(
            "delta",
            lambda: linear(
                "btr,ri->bti", (rank, inner), (None, "channels"), CHANNELS,
                init=uniform, out_dtype=jnp.float32,
            ),
            lambda: None,
        )  # fmt: skip
        self.delta_bias = parameter(step_bias(rngs.params(), (inner,), config), ("channels",))
        # b and c that do not depend on the token are parameters of each channel (S4D: b = 1)
        channel_axes = ("channels", None)
        self.b = select(
            "b", lambda: low_rank(n), lambda: parameter(jnp.ones((inner, n)), channel_axes)
        )
        self.c = select(
            "c",
            lambda: low_rank(n),
            lambda: parameter(jax.random.normal(rngs.params(), (inner, n)), channel_axes),
        )
        # S4D-Real (§3.6): A_n = −(n + 1)
        rates = jnp.broadcast_to(jnp.log(jnp.arange(1, n + 1)), (inner, n))
        # float32 for every param_dtype, as in the released code
        self.log_rate = parameter(rates, channel_axes, jnp.float32)
        self.skip = parameter(jnp.ones(inner), ("channels",), jnp.float32)
        self.out = linear(
            "bti,id->btd", (inner, width), ("channels", "embed"), ("batch", "time", None),
            init=fan_in_normal(out_scale), bias=config.bias,
        )  # fmt: skip

    def init_state(
        self, batch: int, max_length: int, cache: CacheConfig = CONTIGUOUS
    ) -> MambaState:
        """The empty state; ``max_length`` does not change its size."""
        del max_length, cache
        tail = Tail.empty(batch, self.config.convolution - 1, self.inner, self.dtype, "channels")
        scan = jnp.zeros((batch, self.inner, self.config.state), jnp.float32)
        return MambaState(tail, reshard(scan, "batch", "channels", None))

    def __call__(self, x_btd: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """Mix tokens along time; with a state, these tokens follow those that it holds."""
        state = context.state
        tail = None if state is None else state.tail
        tokens, x_btd = Tokens.of(reshard(x_btd, "batch", None, None), context.mask, tail)
        inputs_bti, z_bti = self.into(x_btd), self.gate(x_btd)
        x_bti = self.convolution(inputs_bti, tokens, tail)
        if self.delta_down is not None and self.delta_up is not None:
            delta_bti = self.delta_up(self.delta_down(x_bti))
        else:
            delta_bti = jnp.zeros_like(x_bti, jnp.float32)
        initial = None
        if state is not None:
            initial = carried(state.scan_bdn, tokens.continues(state.tail))
            assert tokens.valid_bt is not None
            delta_bti = jnp.where(tokens.valid_bt[..., None], delta_bti, STILL)
        b, c = (
            (part(x_bti), ("batch", None, None))
            if isinstance(part, Linear)
            else (read(part, jnp.float32, deferred=True), part.axes)
            for part in (self.b, self.c)
        )

        def run(x, delta, log_rate, b, c, skip, z, bias, segments, initial):
            options: dict[str, Any] = dict(
                delta_bias_d=bias,
                delta_softplus=True,
                segment_ids_bt=segments,
                initial_state_bdn=initial,
                implementation=self.config.implementation,
            )
            scan = selective_scan if b.ndim == c.ndim == 3 else _scan_by_channel
            return scan(x, delta, -jnp.exp(log_rate), b, c, skip, z, **options)

        rate_axes = ("channels", None)
        state_axes = ("batch", "channels", None)
        rate, skip, bias = (
            read(parameter, jnp.float32, deferred=True)
            for parameter in (self.log_rate, self.skip, self.delta_bias)
        )
        y_bti, scan_bdn = per_device(
            run,
            (x_bti, delta_bti, rate, b[0], c[0], skip, z_bti, bias, tokens.segments_bt, initial),
            (
                CHANNELS, CHANNELS, rate_axes, b[1], c[1], ("channels",), CHANNELS, ("channels",),
                ("batch", None), state_axes,
            ),
            [CHANNELS, state_axes],
        )  # fmt: skip
        if state is not None:
            state = MambaState(after(inputs_bti, tokens, state.tail, "channels"), scan_bdn)
        y_bti = context.tap("mixer.hidden", tokens.as_called(y_bti))
        return self.out(y_bti), context.replace(state=state)


def _scan_by_channel(x, delta, a, b, c, skip, z, *, delta_bias_d, initial_state_bdn, **options):
    """`selective_scan` where ``b``, ``c`` or both are ``[d, n]``: parameters of each channel.

    In `selective_scan` all channels share ``b`` and ``c``. So each of the ``n`` numbers in a
    channel's state becomes a channel with a state of size 1. This requires ``n`` times the memory
    of `selective_scan`: it is for ablations.
    """
    (batch, t, d), n = x.shape, a.shape[1]

    def expanded(array):  # [b, t, n] or [d, n] as [b, t, d, n]
        return jnp.broadcast_to(array[:, :, None] if array.ndim == 3 else array, (batch, t, d, n))

    inputs = (x.astype(jnp.float32)[..., None] * expanded(b)).reshape(batch, t, d * n)
    ones = jnp.ones((batch, t, 1), jnp.float32)
    initial = None if initial_state_bdn is None else initial_state_bdn.reshape(batch, d * n, 1)
    y, end = selective_scan(
        inputs,
        jnp.repeat(delta, n, axis=-1),
        a.reshape(d * n, 1),
        ones,
        ones,
        delta_bias_d=jnp.repeat(delta_bias_d, n),
        initial_state_bdn=initial,
        **options,
    )
    y = jnp.sum(y.reshape(batch, t, d, n) * expanded(c), axis=-1) + skip * x
    y = y * jax.nn.silu(z.astype(jnp.float32))
    return y.astype(x.dtype), end.reshape(batch, d, n)
