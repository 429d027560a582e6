"""Model FLOPs of a training token, and the share of the chip's peak they come to (MFU)."""

import math
from typing import Any

import jax

from layers.decoder import Decoder
from layers.mlp import Mlp
from research.parallel import chips


def train_flops_per_token(model: Decoder, sequence_length: int) -> float:
    """Forward and backward: ``6 N + 6 · layers · reach · 2 · h · c`` (PaLM, appendix B).

    ``N`` counts every weight that a token is multiplied by: all but tables that are only looked up
    and the experts it does not go to.
    ``reach`` is the mean number of keys a query sees: half the length, or what the window leaves.
    """
    return 3.0 * forward_flops_per_token(model, sequence_length)


def forward_flops_per_token(model: Decoder, sequence_length: int, *, cached: bool = False) -> float:
    """A third of `train_flops_per_token`; ``cached``: of the token after ``sequence_length``."""
    config = model.config
    weights = _multiplied(model, model)
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.width
    if config.position == "learned":
        weights -= (config.max_length or 0) * config.width
    return 2.0 * weights + 4.0 * _attended(model, sequence_length, cached)


def recomputed_flops_per_token(model: Decoder, sequence_length: int) -> float:
    """What ``remat`` computes again in the backward pass.

    Not the last product of a repeat, whose result the backward pass does not ask for.
    """
    weights, attended = _multiplied(model, model.blocks), _attended(model, sequence_length, False)
    if isinstance(last := model.blocks[-1].mlp, Mlp):
        weights -= math.prod(last.down.weight.shape)
    again = {
        "none": (0, 0), "dots": (0, 4), "full": (2, 4)
    }[model.config.remat]  # fmt: skip
    return float(again[0] * weights + again[1] * attended)


def _multiplied(model: Decoder, tree: Any) -> float:
    """Weights of ``tree``, all of ``model`` or its blocks, without experts not gone to."""
    weights = float(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)))
    for moe in model.mixtures:
        experts = jax.tree.leaves([moe.gate, moe.up, moe.down])
        held = sum(math.prod(leaf.shape) for leaf in experts)
        weights -= held * (1 - moe.config.experts_per_token / moe.config.num_experts)
    return weights


def _attended(model: Decoder, length: int, cached: bool) -> float:
    """Keys that a token sees, times heads and channels, over all layers."""
    config, attended = model.config, 0.0
    for kind in config.pattern:
        if kind not in ("attention", "sliding"):
            continue  # a recurrence's own work is small beside its projections
        window = config.part("attention").window if kind == "sliding" else None
        w = min(window or length, length)
        attended += w if cached else (w * (w + 1) / 2 + (length - w) * w) / length
    if not attended:
        return 0.0
    attention = config.part("attention")
    return attended * config.repeats * attention.num_heads * attention.channels(config.width)


def peak_flops() -> float | None:
    """Peak FLOP/s of one of this process's devices, or None if it is not in the table."""
    chip = chips.find(jax.devices()[0].device_kind)
    return None if chip is None else chip.flops
