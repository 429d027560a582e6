"""Optimisers and learning-rate schedules by name, built from optax."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from layers.config import check, check_choice, check_types
from layers.sharding import axes_of, spec
from layers.weights import map_declared
from research.training.factored import scale_by_factored_rms
from research.training.moments import with_8bit_moments
from research.training.offload import with_moments_on_host

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
MOMENTS = ("full", "8bit")
SCHEDULES = ("cosine", "wsd", "linear", "constant")
# optimiser or schedule → the fields that it does not read
_UNREAD = {
    "adafactor": ("b1", "b2", "eps"),
    "lion": ("eps",),
    "sgd": ("b2", "eps"),
    "cosine": ("decay_fraction",),
    "linear": ("decay_fraction",),
    "constant": ("final_fraction", "decay_fraction"),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser, learning-rate schedule, weight decay and clipping.

    ``schedule``: linear warm-up over ``warmup_steps``, then ``cosine`` or ``linear`` decay to
    ``final_fraction`` of the peak, ``constant``, or ``wsd`` (Hu 2024, arXiv:2404.06395): constant,
    then linear decay over the last ``decay_fraction`` of the steps. ``b1``, ``b2``: decay of the
    first (or only) and second moment. ``weight_decay`` is decoupled, and applied to matrices,
    embeddings and the head (`layers.roles`), not to biases, norms and rates. ``clip_norm``: largest
    global norm of a gradient, or None. ``master``: parameters that are stored in fewer bits than
    float32 have a float32 copy, which is what is updated. Without it, updates below their precision
    are lost. ``moments``: ``full`` (float32), or ``8bit`` (Dettmers 2021,
    `research.training.moments`).
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    master: bool = True
    moments: str = "full"

    def __post_init__(self):
        check_types(self)
        check_choice("name", self.name, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("moments", self.moments, MOMENTS)
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be > 0")
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must be ≥ 0")
        for name in ("final_fraction", "decay_fraction"):
            value = getattr(self, name)
            check(0 <= value <= 1, name, value, "must be in [0, 1]")
        for name in ("b1", "b2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be in [0, 1)")
        check(self.eps > 0, "eps", self.eps, "must be > 0")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be ≥ 0")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for choice in ("name", "schedule"):
            chosen = getattr(self, choice)
            for name in _UNREAD.get(chosen, ()):
                unread = f"changes nothing: {choice}={chosen!r} does not read it"
                check(getattr(self, name) == defaults[name], name, getattr(self, name), unread)
        clip = self.clip_norm
        check(clip is None or clip > 0, "clip_norm", clip, "must be > 0 or None")
        if self.moments != "full":
            no_moments = self.name == "sgd" and self.b1 == 0
            check(
                not no_moments,
                "moments",
                self.moments,
                "changes nothing: sgd with b1=0 has no moments",
            )
            is_adafactor = self.name == "adafactor"
            check(
                not is_adafactor,
                "moments",
                self.moments,
                "must be 'full': adafactor does not support it",
            )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each of ``steps`` steps.

    Raises:
      ConfigError: the warm-up (for ``wsd``: plus the decay) has more than ``steps`` steps.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = round(config.decay_fraction * steps) if config.schedule == "wsd" else 0
    check(
        warmup + decay <= steps,
        "optimizer.warmup_steps",
        warmup,
        f"with a decay of {decay} must be at most steps={steps}",
    )
    final, remaining = peak * config.final_fraction, max(1, steps - warmup)
    after_warmup = {
        "cosine": optax.cosine_decay_schedule(peak, remaining, config.final_fraction),
        "linear": optax.linear_schedule(peak, final, remaining),
        "constant": optax.constant_schedule(peak),
        "wsd": optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, max(1, decay))],
            [remaining - decay],
        ),
    }[config.schedule]
    if not warmup:
        return after_warmup
    # begins at peak / warmup: a rate of 0 would waste the first step
    warm_up = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([warm_up, after_warmup], [warmup])


def make_optimizer(
    config: OptimizerConfig, steps: int, *, offload: bool = False
) -> optax.GradientTransformation:
    """Clipping, then the optimiser ``config.name`` with its schedule over ``steps``.

    Gradients are converted to float32, in which they are clipped; moments and updates are float32.
    ``offload``: moments are stored in the host's memory (`research.training.offload`).
    """
    rate = make_schedule(config, steps)
    decay: dict[str, Any] = dict(weight_decay=config.weight_decay)

    def descent(direction: optax.GradientTransformation) -> optax.GradientTransformation:
        decayed_weights = optax.add_decayed_weights(config.weight_decay, decayed)
        return optax.chain(direction, decayed_weights, optax.scale_by_learning_rate(rate))

    match config.name:
        case "adamw":
            optimizer = optax.adamw(rate, config.b1, config.b2, config.eps, **decay, mask=decayed)
        case "lion":
            optimizer = optax.lion(rate, config.b1, config.b2, **decay, mask=decayed)
        case "adafactor":  # Shazeer 2018, with an absolute step size (no parameter scale)
            optimizer = descent(scale_by_factored_rms())
        case "muon":
            optimizer = descent(muon_direction(config))
        case _:
            optimizer = descent(optax.trace(config.b1) if config.b1 else optax.identity())
    if config.moments == "8bit":
        optimizer = with_8bit_moments(optimizer)
    optimizer = in_float32(optimizer, master=config.master)
    if offload:
        optimizer = with_moments_on_host(optimizer)
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optax.GradientTransformation(
        optimizer.init,
        lambda updates, state, params=None: optimizer.update(wide(updates), state, params),
    )


def muon_direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon's direction for matrices, Adam's for other parameters, without decay and rate."""
    muon = optax.contrib.muon(
        -1.0,  # optax negates the rate
        beta=config.b1,
        eps=config.eps,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=-1.0,
        muon_weight_dimension_numbers=muon_dimensions,
        # as large as Adam's (Liu 2025, arXiv:2502.16982, §2.2), so both use one rate
        consistent_rms=0.2,
    )

    def update(updates, state, params=None):
        if spec() is None:
            return muon.update(updates, state, params)
        # explicit sharding does not support x xᵀ of a sharded x: XLA chooses the shardings
        stored = jax.tree.map(axes_of, (updates, state))
        run: Any = jax.sharding.auto_axes(muon.update, out_sharding=stored)
        return run(updates, state, params)

    return optax.GradientTransformation(muon.init, update)


class MasterState(NamedTuple):
    """The float32 copy, None for float32 parameters, and the state of the optimiser."""

    master: Any
    inner: Any


def in_float32(
    optimizer: optax.GradientTransformation, *, master: bool
) -> optax.GradientTransformation:
    """``optimizer`` with float32 moments, for parameters of any dtype; gradients are float32.

    ``master``: parameters of fewer bits are a float32 copy, rounded, and ``optimizer`` updates the
    copy. Updates that are too small for their precision add up in it (Micikevicius 2018,
    1710.03740, §3.1). Nothing changes for float32 parameters.
    """

    def init(params):
        inner = optimizer.init(wide(params))
        if not master or not any(map(_is_narrow, jax.tree.leaves(params))):
            return inner
        copies = jax.tree.map(lambda a: wide(a) if _is_narrow(a) else None, params)
        return MasterState(copies, inner)

    def update(updates, state, params=None):
        if not isinstance(state, MasterState):
            return optimizer.update(updates, state, wide(params))
        # None in the place of an array: float32 parameters have no copy
        copied = jax.tree.map(lambda a, copy: a if copy is None else copy, params, state.master)
        updates, inner = optimizer.update(updates, state.inner, copied)
        copies = jax.tree.map(
            lambda _, copy, u: None if copy is None else copy + u, params, state.master, updates
        )
        # the parameters plus this difference, in float32, are the rounded copy
        differences = jax.tree.map(
            lambda a, copy, u: u if copy is None else wide(copy.astype(a.dtype)) - wide(a),
            params,
            copies,
            updates,
        )
        return differences, MasterState(copies, inner)

    return optax.GradientTransformation(init, update)


def _is_narrow(a: jax.Array) -> bool:
    return a.dtype.itemsize < 4


def wide(tree: Any) -> Any:
    """The arrays of ``tree`` in float32."""
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def decayed(params: Any) -> Any:
    """The tree of ``params`` with True where weight decay applies: to parameters with a role.

    These are matrices, embeddings and the head; not norms, biases, convolutions and rates.
    """
    return map_declared(lambda _, declared: declared.role is not None, params)


def muon_dimensions(params: Any) -> Any:
    """For Muon (Jordan 2024): the input and output dimensions of every matrix, see `layers.roles`.

    The heads of a projection form one side of one matrix. None for embeddings, heads and
    parameters without a role, which Adam updates.
    """

    def dimensions(array, declared):
        role = declared.role
        if role is None or role.name != "matrix":
            return None
        return optax.contrib.MuonDimensionNumbers(*role.sides(array, declared.axes))

    return map_declared(dimensions, params)
