"""Mixtures of experts: a router (`layers.routing`) and the experts' products.

Tokens are sent to experts in one of two ways. With a capacity of each row: by one-hot products into
``[e, capacity]`` slots (GShard, 2006.16668). Else: they are sorted by expert and multiplied by
`grouped_matmul` (MegaBlocks, 2211.15841); those beyond the capacity of a segment, if there is one,
are of no expert. Where experts are sharded, tokens are exchanged by all-to-all.

A capacity counts the tokens of a whole row or segment. Generation does not know the later ones, so
in a call with a state no token is dropped.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.config import check
from layers.context import Context
from layers.linear import Linear, fan_in_normal
from layers.mlp import ACTIVATIONS, Mlp, MlpConfig
from layers.roles import Role
from layers.routing import (
    MoeConfig,
    assign,
    balance_loss,
    choose_experts,
    choose_tokens,
    scores,
    within_capacity,
    z_loss,
)
from layers.sharding import mesh_axis, per_device, reshard, spec
from layers.state import CONTIGUOUS, CacheConfig, LayerState
from layers.weights import read
from pallas_kernels.grouped_matmul import grouped_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """The report of one mixture; those of a decoder are stacked, with layers first.

    ``loss``: the weighted sum of ``balance`` and ``z``. ``counts_e``: how often each expert is
    chosen, before any token is dropped (with expert choice: the tokens that it takes). ``asked``:
    the number of choices (with expert choice: of tokens). ``dropped``: those that no expert takes.
    """

    loss: jax.Array
    balance: jax.Array
    z: jax.Array
    counts_e: jax.Array
    asked: jax.Array
    dropped: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeState(LayerState):
    """The state of a mixture, which stores nothing: with it, no token is dropped."""

    @property
    def can_rewind(self) -> bool:
        return True

    def rewind(self, count_b: jax.Array) -> "MoeState":
        """This state."""
        return self

    def cleared(self) -> "MoeState":
        """This state."""
        return self


class RouterBias(nnx.Variable):
    """The bias of a sigmoid router. It has no gradient; `rebalance` changes it after each step."""


class Moe(nnx.Module):
    """``Σ_k weight_k · expert_k(x) + shared(x)``."""

    def __init__(
        self,
        config: MoeConfig,
        width: int,
        *,
        rngs: nnx.Rngs,
        out_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.config, self.dtype = config, dtype
        e, f = config.num_experts, config.width
        axes = ("batch", "time", None)

        def to_experts(**options):
            return Linear(
                "btd,de->bte",
                (width, e),
                ("embed", None),
                axes,
                rngs=rngs,
                # float32 for every param_dtype: a rounded score may choose another expert
                param_dtype=jnp.float32,
                **options,
            )

        def expert(shape, axes, scale=1.0):
            init = fan_in_normal(scale, fan_in=shape[1])
            role = Role("matrix", inputs=(1,), outputs=(2,))
            return nnx.Param(init(rngs.params(), shape, param_dtype), axes=axes, role=role)

        up_axes = ("experts", "embed", "mlp")
        self.router = to_experts()
        zeros = nnx.initializers.zeros
        self.noise = to_experts(init=zeros) if config.router == "noisy" else None
        sigmoid = config.router == "sigmoid"
        self.bias = RouterBias(jnp.zeros(e, jnp.float32), axes=(None,)) if sigmoid else None
        gated = ACTIVATIONS[config.activation][1]
        self.gate = expert((e, width, f), up_axes) if gated else None
        self.up = expert((e, width, f), up_axes)
        self.down = expert((e, f, width), ("experts", "mlp", "embed"), out_scale)
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        shared = MlpConfig(max(1, config.shared_experts) * f, config.activation)
        self.shared = (
            Mlp(shared, width, rngs=rngs, out_scale=out_scale, **types)
            if config.shared_experts
            else None
        )

    def init_state(self, batch: int, max_length: int, cache: CacheConfig = CONTIGUOUS) -> MoeState:
        """The state of a call that drops no token."""
        return MoeState()

    def __call__(self, x_btd: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """The layer's output, and the context with a `RouterStats`; padding has no experts."""
        config, tap, positions = self.config, context.tap, context.mask.q_positions_bt
        valid_bt = jnp.asarray(True) if positions is None else positions >= 0
        valid_bt = reshard(jnp.broadcast_to(valid_bt, x_btd.shape[:2]), "batch", "time")
        logits_bte = tap("router.logits", self._logits(x_btd, context.key))
        scores_bte = scores(config, logits_bte)
        dropless = config.capacity_factor is None or context.state is not None
        by_slots = not dropless and config.capacity_group == "row"
        segments_bt = None if dropless or by_slots else context.mask.q_segments_bt
        if segments_bt is not None:
            segments_bt = jnp.broadcast_to(segments_bt, x_btd.shape[:2])
        # a capacity is counted over all tokens of a row
        row = ("batch", "time" if dropless else None, None)
        expert_tap = tap if tap.is_used("experts.hidden") else None
        on_mesh = expert_tap is not None and spec() is not None
        check(not on_mesh, "hooks", "experts.hidden", "is not supported on a mesh")

        def run_shards(x_btd, scores_bte, valid_bt, segments_bt, bias_e, *weights):
            if config.router == "expert_choice":
                dispatch, combine = choose_tokens(config, scores_bte, valid_bt)
                chosen_bte = jnp.any(dispatch, axis=-1)
                lost_bt = valid_bt & ~jnp.any(chosen_bte, axis=-1)
            else:
                weights_btk, experts_btk = choose_experts(config, scores_bte, bias_e)
                hot = experts_btk[..., None] == jnp.arange(config.num_experts)
                chosen_bte = jnp.any(hot, axis=2) & valid_bt[..., None]
                if not by_slots:
                    kept_btk = jnp.broadcast_to(valid_bt[..., None], experts_btk.shape)
                    if not dropless:
                        kept_btk = within_capacity(config, experts_btk, valid_bt, segments_bt)
                    y = self._sorted(x_btd, weights_btk, experts_btk, kept_btk, weights, expert_tap)
                    lost_btk = valid_bt[..., None] & ~kept_btk
                    return y, chosen_bte, jnp.sum(lost_btk, axis=-1, dtype=jnp.int32)
                dispatch, combine = assign(config, weights_btk, experts_btk, valid_bt)
                lost_bt = jnp.sum(chosen_bte, axis=-1) - jnp.sum(dispatch, axis=(2, 3))
            y = self._by_slots(x_btd, dispatch, combine, weights, expert_tap)
            return y, chosen_bte, lost_bt.astype(jnp.int32)

        weights = [
            None if weight is None else read(weight, self.dtype, deferred=True)
            for weight in (self.gate, self.up, self.down)
        ]
        bias = None if self.bias is None else self.bias[...]
        hidden = ("experts", None, "mlp")
        y_btd, chosen_bte, lost_bt = per_device(
            run_shards,
            (x_btd.astype(self.dtype), scores_bte, valid_bt, segments_bt, bias, *weights),
            (row, row, row[:2], row[:2], (None,), hidden, hidden, ("experts", "mlp", None)),
            [row, row, row[:2]],
        )
        y_btd = reshard(y_btd, "batch", "time", None)
        if self.shared is not None:
            y_btd = y_btd + self.shared(x_btd, context)[0]
        counts_e = jnp.sum(chosen_bte, axis=(0, 1)).astype(jnp.float32)
        balance = balance_loss(scores_bte, counts_e, valid_bt, config.top_k)
        z = z_loss(logits_bte, valid_bt)
        loss = config.balance_weight * balance + config.z_weight * z
        choices = 1 if config.router == "expert_choice" else config.top_k
        asked, dropped = (
            jnp.sum(n, dtype=jnp.float32) for n in (choices * valid_bt.astype(jnp.int32), lost_bt)
        )
        report = RouterStats(loss, balance, z, counts_e, asked, dropped)
        return y_btd, context.replace(report=report)

    def _logits(self, x_btd: jax.Array, key: jax.Array | None) -> jax.Array:
        config = self.config
        x_btd = x_btd.astype(jnp.float32)
        if key is None:
            return self.router(x_btd)
        uniform_key, normal_key = jax.random.split(key)
        if config.jitter:
            low, high = 1 - config.jitter, 1 + config.jitter
            drawn = jax.random.uniform(uniform_key, x_btd.shape, jnp.float32, low, high)
            x_btd = x_btd * reshard(drawn, "batch", "time", None)
        logits_bte = self.router(x_btd)
        if self.noise is not None:
            drawn = reshard(jax.random.normal(normal_key, logits_bte.shape), "batch", "time", None)
            logits_bte = logits_bte + drawn * jax.nn.softplus(self.noise(x_btd))
        return logits_bte

    def _by_slots(self, x_btd, dispatch_btec, combine_btec, weights, tap):
        """The experts' outputs by slots: dense products over experts with equal loads."""
        gate, up, down = weights
        activation, _ = ACTIVATIONS[self.config.activation]
        axis = mesh_axis("experts")
        x_becd = jnp.einsum("btec,btd->becd", dispatch_btec.astype(self.dtype), x_btd)
        if axis is not None:
            x_becd = jax.lax.all_to_all(x_becd, axis, split_axis=1, concat_axis=0, tiled=True)
        h = jnp.einsum("becd,edf->becf", x_becd, up)
        if gate is None:
            h = activation(h)
        else:
            h = activation(jnp.einsum("becd,edf->becf", x_becd, gate)) * h
        if tap is not None:
            h = tap("experts.hidden", h)
        y_becd = jnp.einsum("becf,efd->becd", h, down)
        if axis is not None:
            y_becd = jax.lax.all_to_all(y_becd, axis, split_axis=0, concat_axis=1, tiled=True)
        y_btd = jnp.einsum("btec,becd->btd", combine_btec, y_becd.astype(jnp.float32))
        return _sum_hidden(y_btd).astype(self.dtype)

    def _sorted(self, x_btd, weights_btk, experts_btk, kept_btk, weights, tap):
        """The experts' outputs with tokens sorted by expert: each expert has consecutive rows."""
        b, t, k = experts_btk.shape
        x_md = jnp.repeat(x_btd.reshape(b * t, -1), k, axis=0)
        # what is not kept has the index after the last expert, which is in no group
        experts_m = jnp.where(kept_btk, experts_btk, self.config.num_experts).reshape(-1)
        axis = mesh_axis("experts")

        def observe(h_mf):  # as [b, t, k, f] and back
            return tap("experts.hidden", h_mf.reshape(b, t, k, -1)).reshape(h_mf.shape)

        if axis is None:
            y_md = _grouped(x_md, experts_m, weights, self.config, observe if tap else None)
        else:
            y_md = _exchanged(x_md, experts_m, weights, self.config, axis)
        y_btkd = y_md.reshape(b, t, k, -1).astype(jnp.float32)
        weights_btk = weights_btk * kept_btk
        return _sum_hidden(jnp.einsum("btk,btkd->btd", weights_btk, y_btkd)).astype(self.dtype)


def _sum_hidden(y: jax.Array) -> jax.Array:
    """The sum over the mesh axis that the experts' hidden units are sharded over."""
    axis = mesh_axis("mlp")
    return y if axis is None else jax.lax.psum(y, axis)


def _grouped(x_md, experts_m, weights, config, observe=None):
    """The output of each row's expert, from the experts in ``weights``; 0 for rows of no expert.

    ``observe`` maps the rows' hidden units, in the order of ``x_md``, to those that replace them.
    """
    gate, up, down = weights
    activation, _ = ACTIVATIONS[config.activation]
    order = jnp.argsort(experts_m, stable=True)
    sizes = jnp.sum(experts_m[:, None] == jnp.arange(up.shape[0]), axis=0, dtype=jnp.int32)
    x_md = x_md[order]
    h = grouped_matmul(x_md, up, sizes)
    h = activation(h) if gate is None else activation(grouped_matmul(x_md, gate, sizes)) * h
    if observe is not None:
        h = observe(h[jnp.argsort(order)])[order]
    y_md = grouped_matmul(h, down, sizes)
    return y_md[jnp.argsort(order)]


def _exchanged(x_md, experts_m, weights, config, axis):
    """`_grouped` with experts sharded over ``axis``: all-to-alls send rows and return results.

    All rows may belong to one device, and message sizes are static. So each message has space for
    all rows, or tokens would be dropped.
    """
    ways = jax.lax.axis_size(axis)
    local_experts = config.num_experts // ways
    m = experts_m.shape[0]
    device_m = experts_m // local_experts
    # row i of every message is row i of this device, or 0
    is_sent = device_m[None] == jnp.arange(ways)[:, None]
    sent = jnp.where(is_sent[..., None], x_md[None], 0)
    expert_ids = jnp.where(is_sent, experts_m[None] % local_experts, local_experts)
    received = jax.lax.all_to_all(sent, axis, 0, 0, tiled=True).reshape(ways * m, -1)
    expert_ids = jax.lax.all_to_all(expert_ids, axis, 0, 0, tiled=True).reshape(-1)
    y = _grouped(received, expert_ids, weights, config)
    y = jax.lax.all_to_all(y.reshape(ways, m, -1), axis, 0, 0, tiled=True)
    return jnp.sum(jnp.where(is_sent[..., None], y, 0), axis=0)


def rebalance(moe: Moe, counts_e: jax.Array) -> None:
    """Change the biases of a sigmoid router towards even loads (DeepSeek-V3, §2.1.2), in place.

    The bias of an expert with more tokens than the mean decreases by ``bias_rate``; with fewer it
    increases. ``moe`` may be stacked layers; ``counts_e`` is then stacked too.
    """
    if moe.bias is None or not moe.config.bias_rate:
        return
    deficit = jnp.mean(counts_e, axis=-1, keepdims=True) - counts_e
    moe.bias[...] += moe.config.bias_rate * jnp.sign(deficit)


def load_entropy(counts_le: jax.Array) -> jax.Array:
    """The entropy of the experts' shares / its maximum (1: even loads), mean over layers."""
    share = counts_le / jnp.maximum(jnp.sum(counts_le, axis=-1, keepdims=True), 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)
    return jnp.mean(entropy) / max(math.log(counts_le.shape[-1]), 1e-9)
