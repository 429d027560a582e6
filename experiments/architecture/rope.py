"""Rotary position embedding: RoFormer (Su 2021, arXiv:2104.09864).

The paper rotates queries and keys by their position, so that scores depend only on the relative
position (eq. 16) and decay with distance (§3.4.3). It reports faster pre-training than with BERT's
learned positions (Figure 3, left), 27.5 against 27.3 BLEU in translation (Table 1), and "the
flexibility of sequence length" (abstract).

Here one decoder is trained with rotary, learned, sinusoidal and no positions for equal steps, and
then tested at four times the training length.

    ablate run architecture/rope --scale=smoke    # a few steps, no findings
    ablate run architecture/rope                  # cpu: 2 cores; time in `ablate list`
    ablate run architecture/rope --scale=gpu      # one accelerator
    ablate run architecture/rope --scale=paper    # BERT-base's size; 4 chips of TPU v5p
"""

import jax.numpy as jnp
import numpy as np

from layers.rotary import rotary
from research.ablation import Arm, Claim, Unit, difference, mean
from research.ablation.language_model import (
    SINUSOIDAL,
    check_unit,
    evaluate_unit,
    language_model,
    train_unit,
)

PAPER = "Su 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864"
CODE = ("layers/rotary.py",)
MATCHED = "tokens, width, depth; learned positions have a table of parameters more"
SEEDS = (0, 1, 2)
TOPOLOGY = "v5p:2x2x1"  # the slice of paper scale
LONGER = 4  # multiple of the trained length


def get_config(scale):
    config = language_model(scale)
    if scale == "paper":
        config.model.update(width=768, num_layers=12)
        config.model.attention.update(num_heads=12, num_kv_heads=12, head_dim=64)
        config.model.mlp.update(width=3072, activation="gelu")
        config.data.update(sequence_length=512, batch_size=256)
    # the table has rows beyond the trained length, which are not trained
    config.model.max_length = LONGER * config.data.sequence_length
    config.evaluation_tokens = {"smoke": 512, "cpu": 65_536}.get(scale, 1_048_576)
    return config


ARMS = (
    Arm("rotary", {"model.position": "rotary"}),
    Arm("learned", {"model.position": "learned"}),
    Arm("sinusoidal", SINUSOIDAL),
    Arm("none", {"model.position": "none"}),
)


def _lower_loss(other, paper):
    return Claim(
        f"rotary_beats_{other}",
        f"At equal steps, rotary positions have a lower held-out loss than {other}",
        paper=paper,
        measure=difference("loss", "rotary", other),
        comparison="<",
        margin=0.0,
    )


CLAIMS = (
    _lower_loss("learned", "Figure 3, left: RoFormer's loss is below BERT's at equal steps"),
    _lower_loss("sinusoidal", "Table 1: BLEU 27.5 against 27.3"),
    _lower_loss("none", "not in the paper: the control without positions"),
    Claim(
        "relative",
        "Shifting a query and a key by 10,000 positions changes their score by less than 1% of the "
        "scores' spread, in float32",
        paper="Eq. 16: the score is a function of the relative position",
        measure=mean("shift_error", "rotary"),
        comparison="<",
        margin=0.01,
    ),
    Claim(
        "decay",
        "The bound on the score of a pair at distance 128 or more is less than half of that at 0",
        paper="§3.4.3, Figure 2: the bound decays with the relative distance",
        measure=mean("far_bound", "rotary"),
        comparison="<",
        margin=0.5,
        deterministic=True,
    ),
    Claim(
        "longer",
        "At 4 times the trained length, the held-out loss is less than 0.05 nats above that at the "
        "trained length",
        paper='Abstract: "the flexibility of sequence length"; not measured there',
        measure=difference("longer_loss", "rotary", "rotary", "loss"),
        comparison="<",
        margin=0.05,
    ),
)


def shift_error(seed: int, channels: int, shift: int = 10_000) -> float:
    """Largest change of 64 × 64 random scores under a shift, over their standard deviation."""
    normal = np.random.default_rng(seed).standard_normal
    queries, keys = normal((2, 1, 64, 1, channels), np.float32)

    def scores(offset):
        positions = offset + np.arange(64)[None]
        q, k = (np.asarray(rotary(jnp.asarray(x), positions)) for x in (queries, keys))
        return np.einsum("bthc,bshc->bts", q, k)

    return float(np.abs(scores(shift) - scores(0)).max() / scores(0).std())


def far_bound(channels: int, far: int = 128) -> float:
    """Mean over distances ``far … 2·far`` of Σᵢ|Sᵢ| (eq. 37), divided by its value at 0."""
    theta = 10_000.0 ** (-np.arange(0, channels, 2) / channels)
    distances = np.arange(2 * far + 1)
    partial = np.cumsum(np.exp(1j * distances[:, None] * theta), axis=1)
    bound = np.abs(partial).mean(axis=1)
    return float(bound[far:].mean() / bound[0])


check = check_unit


def run(unit: Unit):
    config = unit.config
    model = train_unit(unit).model
    metrics = evaluate_unit(unit, model, tokens=config.evaluation_tokens)
    length = LONGER * config.data.sequence_length
    longer = evaluate_unit(unit, model, tokens=config.evaluation_tokens, length=length)
    metrics["longer_loss"] = longer["loss"]
    if config.model.position == "rotary":
        channels = config.model.attention.head_dim
        metrics["shift_error"] = shift_error(unit.seed, channels)
        metrics["far_bound"] = far_bound(channels)
    return metrics
