"""Model FLOPs per token, and the peak FLOP/s of the device, for model FLOPs utilisation (MFU)."""

import math
from typing import Any

import jax

from layers.attention import Attention
from layers.decoder import Decoder
from layers.latent_attention import LatentAttention
from layers.mlp import Mlp
from research.parallel import chips


def train_flops_per_token(model: Decoder, sequence_length: int) -> float:
    """FLOPs of both passes: ``6 N + 6 · layers · reach · 2 · h · c`` (PaLM, appendix B).

    ``N`` counts the weights that a token is multiplied by: all except tables that are only looked
    up and experts that the token is not routed to. ``reach`` is the mean number of keys that a
    query sees: half the length, or fewer with a window.
    """
    return 3.0 * forward_flops_per_token(model, sequence_length)


def forward_flops_per_token(model: Decoder, sequence_length: int, *, cached: bool = False) -> float:
    """FLOPs of the forward pass, a third of `train_flops_per_token`.

    ``cached``: those of one token after ``sequence_length`` cached ones.
    """
    config = model.config
    weights = _multiplied(model, model)
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.width
    if config.position == "learned":
        weights -= (config.max_length or 0) * config.width
    return 2.0 * weights + 4.0 * _attended(model, sequence_length, cached)


def recomputed_flops_per_token(model: Decoder, sequence_length: int) -> float:
    """FLOPs per token that ``remat`` computes again in the backward pass.

    The last product of a recomputed unit, a repeat or a layer, is not counted: the backward pass
    does not need its result.
    """
    remat, blocks = model.config.remat, list(model.blocks)
    if remat == "none":
        return 0.0
    attended = 4.0 * _attended(model, sequence_length, False)
    if remat in ("dots", "dots_offload"):
        return attended
    weights = _multiplied(model, model.blocks)
    size = len(model.config.pattern)
    for block in blocks if remat != "full" else blocks[size - 1 :: size]:
        weights -= _size(block.mlp.down) if isinstance(block.mlp, Mlp) else 0
    if remat == "narrow":
        weights -= sum(_size(_kept(block.mixer)) for block in blocks)
    return 2.0 * weights + attended


def _kept(mixer: Any) -> Any:
    """The parts of ``mixer`` whose products ``narrow`` keeps for the backward pass."""
    if isinstance(mixer, LatentAttention):
        return mixer
    if not isinstance(mixer, Attention):
        return mixer.out
    # normalised queries and keys are recomputed
    first = [] if mixer.query_norm is not None else [mixer.query, mixer.key]
    return [*first, mixer.value, mixer.out]


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _multiplied(model: Decoder, tree: Any) -> float:
    """Weights of ``tree`` (``model`` or its blocks) that a token is multiplied by.

    Of the experts, only those that a token is routed to are counted.
    """
    weights = float(_size(tree))
    for moe in model.mixtures:
        experts = _size([moe.gate, moe.up, moe.down])
        weights -= experts * (1 - moe.config.experts_per_token / moe.config.num_experts)
    return weights


def _attended(model: Decoder, length: int, cached: bool) -> float:
    """Keys that a token sees, times heads and channels, summed over all layers."""
    config, attended = model.config, 0.0
    for kind in config.pattern:
        if kind not in ("attention", "sliding"):
            continue  # a recurrence costs little compared with its projections
        window = config.part("attention").window if kind == "sliding" else None
        w = min(window or length, length)
        attended += w if cached else (w * (w + 1) / 2 + (length - w) * w) / length
    if not attended:
        return 0.0
    attention = config.part("attention")
    return attended * config.repeats * attention.num_heads * attention.channels(config.width)


def peak_flops() -> float | None:
    """Peak FLOP/s of one device of this process, or None if the device is not in the table."""
    chip = chips.find(jax.devices()[0].device_kind)
    return None if chip is None else chip.flops
