"""Routers of mixtures of experts: the experts of each token, and the weights of their outputs.

Tokens choose experts (`choose_experts`) or experts choose tokens (`choose_tokens`). `balance_loss`
keeps the loads of experts even, and `z_loss` keeps logits small. All is computed in float32.

With a capacity, an expert takes only so many tokens of a group, in order of time
(`within_capacity`, `assign`). So the content of a token does not change the experts of earlier
tokens; only the number of tokens in the group does, by the capacity. GShard (2006.16668,
Algorithm 1) gives all first choices before any second, so that later tokens take the slots of
earlier ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.config import TRAINING, check, check_choice, check_types
from layers.mlp import ACTIVATIONS

ROUTERS = ("softmax", "choice_softmax", "noisy", "expert_choice", "sigmoid")
CAPACITY_GROUPS = ("segment", "row")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """The configuration of a mixture of ``num_experts`` MLPs of hidden size ``width``.

    ``top_k``: the number of experts for each token. ``router``: ``softmax``: softmax over all
    experts, then the choice; weights are normalised to sum to 1 if ``normalize`` (Switch,
    2101.03961, is ``top_k=1, normalize=False``). ``choice_softmax``: softmax over the chosen only
    (Mixtral, 2401.04088, §2.1). ``noisy``: the same of logits with learned noise in training
    (1701.06538, eq. 3–5). ``expert_choice``: experts choose tokens (2202.09368, §3.2); they see all
    of the sequence, so generation is not supported. ``sigmoid``: a sigmoid for each expert, with a
    bias that balances loads without a loss (DeepSeek-V3, 2412.19437, eq. 12–16); ``bias_rate``:
    its change in each step.
    ``groups``: of experts; only experts of the best ``top_groups`` groups are chosen. ``scale``
    multiplies the weights. ``capacity_factor``: an expert takes at most that times its even share
    of the tokens of each group, and other tokens are dropped; None: no token is dropped. In
    generation none is. ``capacity_group``: ``segment``: a packed document has the experts that it
    has alone. ``row``: all segments of a row share a capacity, as in GShard (2006.16668, §3.1), so
    that an expert's slots have a static number: sharded experts then receive fewer rows. Earlier
    documents of the row change which tokens of a later one are dropped. ``expert_choice`` requires
    it. ``shared_experts``: the number of further experts, which take every token.
    ``balance_weight``, ``z_weight``: of the losses. ``jitter``: in training, router inputs are
    multiplied by uniform numbers in 1 ± jitter.
    """

    num_experts: int
    width: int
    top_k: int = 2
    activation: str = "swiglu"
    router: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    capacity_factor: float | None = None
    capacity_group: str = "segment"
    shared_experts: int = 0
    balance_weight: float = dataclasses.field(default=0.0, metadata=TRAINING)
    z_weight: float = dataclasses.field(default=0.0, metadata=TRAINING)
    bias_rate: float = dataclasses.field(default=0.0, metadata=TRAINING)
    jitter: float = dataclasses.field(default=0.0, metadata=TRAINING)

    def __post_init__(self):
        check_types(self)
        for name in ("num_experts", "width", "groups", "scale"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        for name in ("shared_experts", "balance_weight", "z_weight", "bias_rate"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "must be ≥ 0")
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("router", self.router, ROUTERS)
        e, groups = self.num_experts, self.groups
        check(0 < self.top_k <= e, "top_k", self.top_k, f"must be in 1 … num_experts={e}")
        check(e % groups == 0, "groups", groups, f"must divide num_experts={e}")
        in_range = 0 < self.top_groups <= groups
        check(in_range, "top_groups", self.top_groups, f"must be in 1 … groups={groups}")
        most = self.top_groups * (e // groups)
        check(
            self.top_k <= most, "top_k", self.top_k, f"must be at most {most}, those in top_groups"
        )
        sigmoid = self.router == "sigmoid"
        check(groups == 1 or sigmoid, "groups", groups, "requires router='sigmoid'")
        check(
            groups == 1 or e // groups > 1, "groups", groups, "must have two experts or more each"
        )
        check(
            not self.bias_rate or sigmoid, "bias_rate", self.bias_rate, "requires router='sigmoid'"
        )
        check(0 <= self.jitter < 1, "jitter", self.jitter, "must be in [0, 1)")
        factor = self.capacity_factor
        check(factor is None or factor > 0, "capacity_factor", factor, "must be > 0 or None")
        group = self.capacity_group
        check_choice("capacity_group", group, CAPACITY_GROUPS)
        by_row = group == "row"
        check(not by_row or factor is not None, "capacity_group", group, "requires capacity_factor")
        if self.router == "expert_choice":
            required = "by router='expert_choice'"
            check(factor is not None, "capacity_factor", factor, f"is required {required}")
            check(by_row, "capacity_group", group, f"must be 'row', required {required}")
            balance = self.balance_weight
            check(balance == 0, "balance_weight", balance, "must be 0 with router='expert_choice'")

    @property
    def experts_per_token(self) -> float:
        """The number of experts for each token; with ``expert_choice``, its mean."""
        if self.router == "expert_choice":
            assert self.capacity_factor is not None
            return self.capacity_factor * self.top_k
        return self.top_k

    def capacity(self, tokens: int | np.ndarray) -> Any:
        """How many of a group of ``tokens`` an expert takes: at least 1, at most all."""
        assert self.capacity_factor is not None
        even = self.capacity_factor * np.asarray(tokens) * self.top_k / self.num_experts
        return np.minimum(np.maximum(1, np.ceil(even)), tokens).astype(np.int32)


def scores(config: MoeConfig, logits_bte: jax.Array) -> jax.Array:
    """The scores by which experts are chosen: softmax over all experts, or a sigmoid for each."""
    if config.router == "sigmoid":
        return jax.nn.sigmoid(logits_bte)
    return jax.nn.softmax(logits_bte, axis=-1)


def choose_experts(
    config: MoeConfig, scores_bte: jax.Array, bias_e: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """``(weights_btk, experts_btk)``, best first; ``bias_e`` changes the choice, not the weights.

    The softmax over the chosen experts is the softmax over all, divided by its sum over the chosen.
    """
    choice_bte = jax.lax.stop_gradient(scores_bte)
    if bias_e is not None:
        choice_bte = choice_bte + bias_e
    if config.groups > 1:
        grouped = choice_bte.reshape(*choice_bte.shape[:-1], config.groups, -1)
        best = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        _, chosen_groups = jax.lax.top_k(best, config.top_groups)
        mask = jnp.any(chosen_groups[..., None] == jnp.arange(config.groups), axis=-2)
        choice_bte = jnp.where(mask[..., None], grouped, -jnp.inf).reshape(choice_bte.shape)
    _, experts_btk = jax.lax.top_k(choice_bte, config.top_k)
    weights_btk = jnp.take_along_axis(scores_bte, experts_btk, axis=-1)
    if config.normalize or config.router in ("choice_softmax", "noisy"):
        weights_btk = weights_btk / (jnp.sum(weights_btk, axis=-1, keepdims=True) + 1e-20)
    return weights_btk * config.scale, experts_btk


def capacities(config: MoeConfig, time: int, tokens: jax.Array) -> jax.Array:
    """The capacity of groups of ``tokens`` (any shape, each in 0 … ``time``)."""
    return jnp.asarray(config.capacity(np.arange(time + 1)))[tokens]


def _chosen(config: MoeConfig, experts_btk: jax.Array, valid_bt: jax.Array):
    """``(hot_btke, chosen_bte, earlier_bte)``: each choice, all of a token, and of earlier tokens.

    ``earlier_bte`` counts those tokens of the row before each token that chose the expert.
    """
    hot_btke = experts_btk[..., None] == jnp.arange(config.num_experts)
    hot_btke &= valid_bt[..., None, None]
    chosen_bte = jnp.any(hot_btke, axis=2)
    return hot_btke, chosen_bte, jnp.cumsum(chosen_bte, axis=1, dtype=jnp.int32) - chosen_bte


def within_capacity(
    config: MoeConfig, experts_btk: jax.Array, valid_bt: jax.Array, segments_bt: jax.Array | None
) -> jax.Array:
    """``[b, t, k]``: whether the expert takes the token, being among the first of its segment.

    A segment's tokens are consecutive, but for padding between them.
    """
    t = valid_bt.shape[1]
    hot_btke, _, earlier_bte = _chosen(config, experts_btk, valid_bt)
    count_bt = jnp.cumsum(valid_bt, axis=1, dtype=jnp.int32) - valid_bt
    total_b1 = jnp.sum(valid_bt, axis=1, dtype=jnp.int32)[:, None]
    if segments_bt is None:
        rank_bte, size_bt = earlier_bte, total_b1
    else:
        last_bt = jax.lax.cummax(jnp.where(valid_bt, jnp.arange(t), -1), axis=1)
        last_bt = jnp.pad(last_bt, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]  # before t
        last_segment_bt = jnp.take_along_axis(segments_bt, jnp.maximum(last_bt, 0), axis=1)
        first_bt = valid_bt & ((last_bt < 0) | (segments_bt != last_segment_bt))
        # counts never decrease along time: their value at a segment's first token is a maximum
        begin_bt = jax.lax.cummax(jnp.where(first_bt, count_bt, 0), axis=1)
        end_bt = jax.lax.cummin(jnp.where(first_bt, count_bt, total_b1), axis=1, reverse=True)
        size_bt = jnp.concatenate((end_bt[:, 1:], total_b1), axis=1) - begin_bt
        at_begin = jnp.where(first_bt[..., None], earlier_bte, 0)
        rank_bte = earlier_bte - jax.lax.cummax(at_begin, axis=1)
    fits_bte = rank_bte < capacities(config, t, size_bt)[..., None]
    return jnp.any(hot_btke & fits_bte[:, :, None], axis=-1)


def assign(
    config: MoeConfig, weights_btk: jax.Array, experts_btk: jax.Array, valid_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``(dispatch_btec, combine_btec)``: a slot of each chosen expert, while the row has any."""
    t = valid_bt.shape[1]
    hot_btke, chosen_bte, slot_bte = _chosen(config, experts_btk, valid_bt)
    capacity_b = capacities(config, t, jnp.sum(valid_bt, axis=1))
    taken_bte = chosen_bte & (slot_bte < capacity_b[:, None, None])
    slots = jnp.arange(int(config.capacity(t)))
    dispatch_btec = taken_bte[..., None] & (slot_bte[..., None] == slots)
    weights_bte = jnp.sum(hot_btke * weights_btk[..., None], axis=2)
    return dispatch_btec, dispatch_btec * weights_bte[..., None]


def choose_tokens(
    config: MoeConfig, scores_bte: jax.Array, valid_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``(dispatch_btec, combine_btec)``: each expert takes the tokens of a row it scores best.

    Whether it takes a token depends on all others of the row, later ones too (2202.09368, §3.2).
    """
    t = scores_bte.shape[1]
    capacity = int(config.capacity(t))
    capacity_b = capacities(config, t, jnp.sum(valid_bt, axis=1))
    choice_bet = jnp.swapaxes(jnp.where(valid_bt[..., None], scores_bte, -1.0), 1, 2)
    _, tokens_bec = jax.lax.top_k(jax.lax.stop_gradient(choice_bet), capacity)
    chosen_btec = tokens_bec[:, None] == jnp.arange(t)[:, None, None]
    taken = jnp.arange(capacity) < capacity_b[:, None]
    dispatch = chosen_btec & valid_bt[..., None, None] & taken[:, None, None]
    return dispatch, dispatch * scores_bte[..., None] * config.scale


def balance_loss(
    scores_bte: jax.Array, counts_e: jax.Array, valid_bt: jax.Array, top_k: int
) -> jax.Array:
    """``e · Σ f_e P_e`` (Switch, eq. 4–6): 1 if loads are even. ``f``: shares of all choices.

    ``P``: the mean scores; those of sigmoids are normalised to sum to 1 (DeepSeek-V3, eq. 18).
    """
    share = scores_bte / (jnp.sum(scores_bte, axis=-1, keepdims=True) + 1e-20)
    tokens = jnp.maximum(jnp.sum(valid_bt), 1)
    mean_e = jnp.sum(share * valid_bt[..., None], axis=(0, 1)) / tokens
    return scores_bte.shape[-1] * jnp.sum(counts_e / (tokens * top_k) * mean_e)


def z_loss(logits_bte: jax.Array, valid_bt: jax.Array) -> jax.Array:
    """Mean over tokens of ``(log Σ exp logits)²`` (ST-MoE, 2202.08906, eq. 5)."""
    square_bt = jnp.square(jax.nn.logsumexp(logits_bte, axis=-1))
    return jnp.sum(square_bt * valid_bt) / jnp.maximum(jnp.sum(valid_bt), 1)
