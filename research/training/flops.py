"""Model FLOPs of a training token, and the share of the chip's peak they come to (MFU)."""

import math

import jax

from layers.decoder import Decoder

# dense bf16 FLOP/s a device, from the makers' data sheets, by prefix of jax's device_kind
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def train_flops_per_token(model: Decoder, sequence_length: int) -> float:
    """Forward and backward: ``6 N + 6 · layers · reach · 2 · h · c`` (PaLM, appendix B).

    ``N`` counts every weight that a token is multiplied by: all but tables that are only looked up
    and the experts it does not go to.
    ``reach`` is the mean number of keys a query sees: half the length, or what the window leaves.
    """
    config = model.config
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.width
    if config.position == "learned":
        weights -= (config.max_length or 0) * config.width
    for moe in model.mixtures:
        experts = jax.tree.leaves([moe.gate, moe.up, moe.down])
        held = sum(math.prod(leaf.shape) for leaf in experts)
        weights -= held * (1 - moe.config.experts_per_token / moe.config.num_experts)
    attended = 0.0
    for kind in config.pattern:
        if kind not in ("attention", "sliding"):
            continue  # a recurrence's own work is small beside its projections
        window = config.part("attention").window if kind == "sliding" else None
        w = min(window or sequence_length, sequence_length)
        attended += (w * (w + 1) / 2 + (sequence_length - w) * w) / sequence_length
    attended *= config.repeats
    if attended:
        attention = config.part("attention")
        attended *= attention.num_heads * attention.channels(config.width)
    return 6.0 * weights + 12.0 * attended


def peak_flops() -> float | None:
    """Peak FLOP/s of one of this process's devices, or None if it is not in the table."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)), None)
