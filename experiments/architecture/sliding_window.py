"""Sliding-window attention (Beltagy 2020, arXiv:2004.05150; Mistral, Jiang 2023, arXiv:2310.06825).

Each token attends to itself and the ``W`` − 1 tokens before it. Jiang 2023, §2: information moves
``W`` tokens per layer, so that ``L`` layers reach about ``W × L`` tokens; a rolling cache of ``W``
slots bounds the memory for every length (8 times less at 32k tokens). Beltagy 2020, §4.2: windows
reach the state of the art in character-level language modelling.

Here the decoder is trained on text with full attention and with windows of a quarter and a half of
the sequence. The reach is measured by a separate task that decides it: copying 24 symbols, each 24
tokens after its original, with a window of 16. One layer does not reach so far; two or four do.

    ablate run architecture/sliding_window --scale=smoke    # a few steps, no findings
    ablate run architecture/sliding_window                  # cpu: 2 cores; time in `ablate list`
    ablate run architecture/sliding_window --scale=gpu      # one accelerator
    ablate run architecture/sliding_window --scale=paper    # Mistral 7B; 64 chips of TPU v5p
"""

from research.ablation import Arm, Claim, Unit, difference, mean, ratio
from research.ablation.language_model import check_unit, evaluate_unit, language_model, train_unit
from research.ablation.measure import state_bytes

PAPER = "Jiang 2023, Mistral 7B, arXiv:2310.06825; Beltagy 2020, Longformer, arXiv:2004.05150"
CODE = ("layers/attention.py", "layers/cache.py")
MATCHED = "tokens, parameters; the copying arms differ in depth on purpose"
SEEDS = (0, 1, 2)
TOPOLOGY = "v5p:4x4x4"  # the slice of paper scale
SYMBOLS, WINDOW = 24, 16  # the copying task


def get_config(scale):
    config = language_model(scale)
    if scale == "paper":
        config.model.update(vocab_size=32_000, tie_embeddings=False)
        config.model.attention.update(num_kv_heads=8)
        config.model.mlp.width = 14_336
        config.data.update(sequence_length=8192, batch_size=256)
    config.cache_length = 8 * config.data.sequence_length
    config.copy_steps = {"smoke": 6, "cpu": 200}.get(scale, 1000)
    config.copy_batch = 64 if scale == "paper" else 32  # one row per chip
    return config


def _text(name, fraction):
    """An arm with a window of ``fraction`` of the sequence."""
    return Arm(
        name,
        {
            "model.pattern": ("sliding",),
            "model.attention.window": lambda config: int(config.data.sequence_length * fraction),
        },
    )


def _copy(name, layers, window):
    return Arm(
        name,
        {
            "data.source": "synthetic",
            "data.synthetic": dict(task="copy", vocab_size=32, parameters=dict(symbols=SYMBOLS)),
            "data.sequence_length": 2 * SYMBOLS,
            "data.batch_size": lambda config: config.copy_batch,
            "model.vocab_size": 32,
            "model.num_layers": layers,
            "model.pattern": ("sliding",) if window else ("attention",),
            "model.attention.window": window,
            "training.steps": lambda config: config.copy_steps,
            "training.optimizer.warmup_steps": lambda config: min(
                config.training.optimizer.warmup_steps, config.copy_steps // 2
            ),
        },
    )


ARMS = (
    Arm("full"),
    _text("window_half", 1 / 2),
    _text("window_quarter", 1 / 4),
    _copy("copy_full_1_layer", 1, None),
    _copy("copy_window_1_layer", 1, WINDOW),
    _copy("copy_window_2_layers", 2, WINDOW),
    _copy("copy_window_4_layers", 4, WINDOW),
)

CLAIMS = (
    Claim(
        "half_is_enough",
        "With a window of half the sequence, the held-out loss is less than 0.02 nats above full "
        "attention's",
        paper="Beltagy 2020, Table 2: state-of-the-art bits a character with windows",
        measure=difference("loss", "window_half", "full"),
        comparison="<",
        margin=0.02,
    ),
    Claim(
        "quarter_is_enough",
        "With a window of a quarter, it is less than 0.05 nats above",
        paper="Beltagy 2020, Table 2",
        measure=difference("loss", "window_quarter", "full"),
        comparison="<",
        margin=0.05,
    ),
    Claim(
        "cache_is_bounded",
        "The rolling cache is no larger at 8 times the sequence length than at the window",
        paper="Jiang 2023, §2: the cache size is fixed at W",
        measure=mean("cache_growth", "window_quarter"),
        comparison="<",
        margin=1.0,
        deterministic=True,
    ),
    Claim(
        "cache_is_smaller",
        "At 8 times the sequence length it is at most 1/8 of full attention's",
        paper="Jiang 2023, §2: 8 times less cache at 32k tokens",
        measure=ratio("cache_bytes", "window_quarter", "full"),
        comparison="<",
        margin=0.125,
        deterministic=True,
    ),
    Claim(
        "one_layer_is_blind",
        "One layer of window 16 copies at most 10% of symbols that lie 24 tokens back",
        paper="Jiang 2023, §2: one layer reaches W",
        measure=mean("accuracy", "copy_window_1_layer"),
        comparison="<",
        margin=0.1,
    ),
    Claim(
        "depth_reaches",
        "Four layers of window 16 copy at least 50 points more of them",
        paper="Jiang 2023, §2: L layers reach W × L",
        measure=difference("accuracy", "copy_window_4_layers", "copy_window_1_layer"),
        comparison=">",
        margin=0.5,
        gate=Claim(
            "learnable",
            "One layer of full attention copies at least 90%",
            paper="",
            measure=mean("accuracy", "copy_full_1_layer"),
            comparison=">",
            margin=0.9,
        ),
    ),
)


check = check_unit


def run(unit: Unit):
    config = unit.config
    model = train_unit(unit).model
    metrics = evaluate_unit(unit, model)
    metrics["cache_bytes"] = state_bytes(model, 1, config.cache_length)
    window = config.model.attention.window
    if window is not None:
        metrics["cache_growth"] = metrics["cache_bytes"] / state_bytes(model, 1, window)
    return metrics
