"""Routers of mixtures of experts: which experts a token goes to, and what their outputs weigh.

Tokens choose experts (`choose_experts`) or experts choose tokens (`choose_tokens`); the losses that
keep the experts busy and the logits small are `balance_loss` and `z_loss`. All of it is float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.config import TRAINING, check, check_choice
from layers.mlp import ACTIVATIONS

ROUTERS = ("softmax", "choice_softmax", "noisy", "expert_choice", "sigmoid")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A mixture of ``num_experts`` MLPs of hidden size ``width``, ``top_k`` of them a token.

    ``router``: ``softmax`` over all experts, then the choice, its weights made to sum to 1 if
    ``normalize`` (Switch, 2101.03961, is ``top_k=1, normalize=False``); ``choice_softmax``, softmax
    over the chosen alone (Mixtral, 2401.04088, §2.1); ``noisy``, the same of logits with learned
    noise in training (1701.06538, eq. 3–5); ``expert_choice``, experts take tokens (2202.09368,
    §3.2), which sees the whole sequence, so that it cannot generate; ``sigmoid``, each expert by
    itself, with a bias that balances without a loss (DeepSeek-V3, 2412.19437, eq. 12–16), of which
    ``bias_rate`` is the change a step.
    ``groups``: experts are split so, and only the best ``top_groups`` of them are chosen from.
    ``scale`` multiplies the weights. ``capacity_factor``: an expert takes at most that times its
    even share of each sequence, the rest is dropped; None drops nothing.
    ``shared_experts``: as many more, which every token goes to. ``balance_weight``, ``z_weight``:
    of the losses. ``jitter``: router inputs are multiplied by 1 ± jitter, uniformly, in training.
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
    shared_experts: int = 0
    balance_weight: float = dataclasses.field(default=0.0, metadata=TRAINING)
    z_weight: float = dataclasses.field(default=0.0, metadata=TRAINING)
    bias_rate: float = dataclasses.field(default=0.0, metadata=TRAINING)
    jitter: float = dataclasses.field(default=0.0, metadata=TRAINING)

    def __post_init__(self):
        for name in ("num_experts", "width", "groups", "scale"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        for name in ("shared_experts", "balance_weight", "z_weight", "bias_rate"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "must be ≥ 0")
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("router", self.router, ROUTERS)
        e, groups = self.num_experts, self.groups
        check(0 < self.top_k <= e, "top_k", self.top_k, f"must be in 1 … num_experts={e}")
        check(e % groups == 0, "groups", groups, f"must divide num_experts={e}")
        ok = 0 < self.top_groups <= groups
        check(ok, "top_groups", self.top_groups, f"must be in 1 … groups={groups}")
        reach = self.top_groups * (e // groups)
        check(self.top_k <= reach, "top_k", self.top_k, f"only {reach} experts are in top_groups")
        sigmoid = self.router == "sigmoid"
        check(groups == 1 or sigmoid, "groups", groups, "only the sigmoid router has them")
        check(groups == 1 or e // groups > 1, "groups", groups, "must hold two experts or more")
        check(not self.bias_rate or sigmoid, "bias_rate", self.bias_rate, "only of router=sigmoid")
        check(0 <= self.jitter < 1, "jitter", self.jitter, "must be in [0, 1)")
        factor = self.capacity_factor
        check(factor is None or factor > 0, "capacity_factor", factor, "must be > 0 or None")
        if self.router == "expert_choice":
            check(factor is not None, "capacity_factor", factor, "expert_choice needs one")
            balance = self.balance_weight
            check(balance == 0, "balance_weight", balance, "expert_choice is balanced by itself")

    @property
    def experts_per_token(self) -> float:
        """How many experts a token goes to; of `expert_choice`, in the mean."""
        if self.router == "expert_choice":
            assert self.capacity_factor is not None
            return self.capacity_factor * self.top_k
        return self.top_k

    def capacity(self, tokens: int | np.ndarray) -> Any:
        """Tokens an expert takes of a sequence of ``tokens``, at least 1 and at most all."""
        assert self.capacity_factor is not None
        even = self.capacity_factor * np.asarray(tokens) * self.top_k / self.num_experts
        return np.minimum(np.maximum(1, np.ceil(even)), tokens).astype(np.int32)


def scores(config: MoeConfig, logits_bte: jax.Array) -> jax.Array:
    """What experts are chosen by: softmax over all of them, or each one's sigmoid."""
    if config.router == "sigmoid":
        return jax.nn.sigmoid(logits_bte)
    return jax.nn.softmax(logits_bte, axis=-1)


def choose_experts(
    config: MoeConfig, scores_bte: jax.Array, bias_e: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """``(weights_btk, experts_btk)``, best first; ``bias_e`` moves the choice and not the weights.

    The softmax over the chosen is the softmax over all, divided by its sum over the chosen.
    """
    choice_bte = jax.lax.stop_gradient(scores_bte)
    if bias_e is not None:
        choice_bte = choice_bte + bias_e
    if config.groups > 1:
        grouped = choice_bte.reshape(*choice_bte.shape[:-1], config.groups, -1)
        best = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        _, kept = jax.lax.top_k(best, config.top_groups)
        mask = jnp.any(kept[..., None] == jnp.arange(config.groups), axis=-2)
        choice_bte = jnp.where(mask[..., None], grouped, -jnp.inf).reshape(choice_bte.shape)
    _, experts_btk = jax.lax.top_k(choice_bte, config.top_k)
    weights_btk = jnp.take_along_axis(scores_bte, experts_btk, axis=-1)
    if config.normalize or config.router in ("choice_softmax", "noisy"):
        weights_btk = weights_btk / (jnp.sum(weights_btk, axis=-1, keepdims=True) + 1e-20)
    return weights_btk * config.scale, experts_btk


def capacities(config: MoeConfig, valid_bt: jax.Array) -> tuple[int, jax.Array]:
    """The most tokens that an expert takes of any row, and of each ``[b]``: padding takes none."""
    t = valid_bt.shape[1]
    of_count = jnp.asarray(config.capacity(np.arange(t + 1)))
    return int(config.capacity(t)), of_count[jnp.sum(valid_bt, axis=1)]


def assign(
    config: MoeConfig, weights_btk: jax.Array, experts_btk: jax.Array, valid_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``(dispatch_btec, combine_btec)``: a place of an expert for each token that finds one.

    All first choices come before any second one, and among these earlier tokens before later.
    """
    (b, t, k), e = experts_btk.shape, config.num_experts
    capacity, capacity_b = capacities(config, valid_bt)
    hot_btke = (experts_btk[..., None] == jnp.arange(e)) & valid_bt[..., None, None]
    order = jnp.moveaxis(hot_btke, 2, 1).reshape(b, k * t, e).astype(jnp.int32)
    place = jnp.moveaxis((jnp.cumsum(order, axis=1) - 1).reshape(b, k, t, e), 1, 2)
    hot_btke &= place < capacity_b[:, None, None, None]
    at_btkec = hot_btke[..., None] & (place[..., None] == jnp.arange(capacity))
    combine = jnp.sum(at_btkec * weights_btk[..., None, None], axis=2)
    return jnp.any(at_btkec, axis=2), combine


def choose_tokens(
    config: MoeConfig, scores_bte: jax.Array, valid_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``(dispatch_btec, combine_btec)``: each expert takes its best tokens of a row."""
    t = scores_bte.shape[1]
    capacity, capacity_b = capacities(config, valid_bt)
    choice_bet = jnp.swapaxes(jnp.where(valid_bt[..., None], scores_bte, -1.0), 1, 2)
    _, tokens_bec = jax.lax.top_k(jax.lax.stop_gradient(choice_bet), capacity)
    hot_btec = tokens_bec[:, None] == jnp.arange(t)[:, None, None]
    taken = jnp.arange(capacity) < capacity_b[:, None]
    dispatch = hot_btec & valid_bt[..., None, None] & taken[:, None, None]
    return dispatch, dispatch * scores_bte[..., None] * config.scale


def balance_loss(
    scores_bte: jax.Array, counts_e: jax.Array, valid_bt: jax.Array, top_k: int
) -> jax.Array:
    """``e · Σ f_e P_e`` (Switch, eq. 4–6): 1 if even. ``f``: share of the ``top_k`` choices.

    ``P`` is the mean of the scores, which for sigmoids are made to sum to 1 (DeepSeek-V3, eq. 18).
    """
    share = scores_bte / (jnp.sum(scores_bte, axis=-1, keepdims=True) + 1e-20)
    tokens = jnp.maximum(jnp.sum(valid_bt), 1)
    mean_e = jnp.sum(share * valid_bt[..., None], axis=(0, 1)) / tokens
    return scores_bte.shape[-1] * jnp.sum(counts_e / (tokens * top_k) * mean_e)


def z_loss(logits_bte: jax.Array, valid_bt: jax.Array) -> jax.Array:
    """Mean over tokens of ``(log Σ exp logits)²`` (ST-MoE, 2202.08906, eq. 5)."""
    square_bt = jnp.square(jax.nn.logsumexp(logits_bte, axis=-1))
    return jnp.sum(square_bt * valid_bt) / jnp.maximum(jnp.sum(valid_bt), 1)
