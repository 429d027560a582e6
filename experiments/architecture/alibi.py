"""Attention with linear biases: ALiBi (Press 2022, arXiv:2108.12409).

Instead of position embeddings, the paper adds to each score a penalty proportional to the distance.
Models are trained on short sequences and tested on long ones. Figure 1 (WikiText-103): a model
trained on 512 or 1,024 tokens keeps its perplexity on longer sequences. With sinusoidal positions
the perplexity grows at once, with rotary ones soon after. Abstract: a 1.3B model trained on 1,024
tokens extrapolates to 2,048 with the perplexity of a sinusoidal model trained on 2,048.

Here one decoder is trained with ALiBi, rotary, sinusoidal and learned positions at one length, and
with sinusoidal positions at twice that length (same tokens per step). All are tested at 1, 2, 4 and
8 times the length.

    ablate run architecture/alibi --scale=smoke    # a few steps, no findings
    ablate run architecture/alibi                  # cpu: 2 cores; time in `ablate list`
    ablate run architecture/alibi --scale=gpu      # one accelerator
    ablate run architecture/alibi --scale=paper    # the WikiText-103 model; 8 chips of TPU v5p
"""

from research.ablation import Arm, Claim, Unit, difference
from research.ablation.language_model import (
    SINUSOIDAL,
    check_unit,
    evaluate_unit,
    language_model,
    train_unit,
)

PAPER = "Press 2022, Train Short, Test Long: Attention with Linear Biases, arXiv:2108.12409"
CODE = ("layers/alibi.py", "layers/attention.py")
MATCHED = "tokens, width, depth; learned positions have a table of parameters more"
SEEDS = (0, 1, 2)
TOPOLOGY = "v5p:2x2x2"  # the slice of paper scale
FACTORS = (1, 2, 4, 8)  # multiples of the trained length


def get_config(scale):
    config = language_model(scale)
    if scale == "paper":  # Baevski & Auli's model (§2.2)
        config.model.update(width=1024, num_layers=16)
        config.model.attention.update(num_heads=8, num_kv_heads=8, head_dim=128)
        config.model.mlp.update(width=4096, activation="relu")
        config.data.update(sequence_length=512, batch_size=144)
    config.trained_length = config.data.sequence_length
    # learned positions beyond the trained length exist but are not trained
    config.model.max_length = FACTORS[-1] * config.trained_length
    config.evaluation_tokens = {"smoke": 512, "cpu": 32_768}.get(scale, 1_048_576)
    return config


ARMS = (
    Arm("alibi", {"model.position": "alibi"}),
    Arm("rotary", {"model.position": "rotary"}),
    Arm("sinusoidal", SINUSOIDAL),
    Arm("learned", {"model.position": "learned"}),
    Arm(
        "sinusoidal_2x",
        {
            **SINUSOIDAL,
            "data.sequence_length": lambda config: 2 * config.trained_length,
            "data.batch_size": lambda config: config.data.batch_size // 2,
        },
    ),
)


def _breaks_down(position, paper):
    return Claim(
        f"{position}_breaks_down",
        f"At 4 times the trained length, {position} positions lose more than 0.1 nats",
        paper=paper,
        measure=difference("loss_4x", position, position, "loss_1x"),
        comparison=">",
        margin=0.1,
    )


def _extrapolates(factor):
    return Claim(
        f"extrapolates_{factor}x",
        f"At {factor} times the trained length, ALiBi's loss is less than 0.02 nats above its "
        "loss at that length",
        paper="Figure 1: perplexity does not rise beyond the trained length",
        measure=difference(f"loss_{factor}x", "alibi", "alibi", "loss_1x"),
        comparison="<",
        margin=0.02,
    )


CLAIMS = (
    _extrapolates(2),
    _extrapolates(4),
    _extrapolates(8),
    _breaks_down("sinusoidal", "Figure 1: perplexity explodes just past the trained length"),
    _breaks_down("rotary", "Figure 1: better than sinusoidal, degrades past some hundred tokens"),
    _breaks_down("learned", "not in the paper: untrained rows of the table are used"),
    Claim(
        "trains_short",
        "Tested at twice the length it was trained at, ALiBi is less than 0.02 nats above "
        "sinusoidal positions trained at that length on equal tokens",
        paper="Abstract: the perplexity of a sinusoidal model trained on 2,048 tokens, from 1,024",
        measure=difference("loss_2x", "alibi", "sinusoidal_2x"),
        comparison="<",
        margin=0.02,
    ),
    Claim(
        "no_cost_at_length",
        "At the trained length, ALiBi's loss is below that of sinusoidal positions",
        paper="Figure 1, Table 2: ALiBi is ahead at equal lengths too",
        measure=difference("loss_1x", "alibi", "sinusoidal"),
        comparison="<",
        margin=0.0,
    ),
)


check = check_unit


def run(unit: Unit):
    config = unit.config
    model = train_unit(unit).model
    metrics = {}
    for factor in FACTORS:
        length = factor * config.trained_length
        tested = evaluate_unit(unit, model, tokens=config.evaluation_tokens, length=length)
        metrics[f"loss_{factor}x"] = tested["loss"]
    return metrics
