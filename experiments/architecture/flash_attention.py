"""FlashAttention: exact attention without the square in memory (Dao 2022, arXiv:2205.14135).

The softmax is computed block by block with a running maximum and sum, and the backward pass
computes the scores again instead of storing them. Theorem 1: the result is exact, with O(N) memory
beyond inputs and output. Figure 3: up to 3 times faster than standard attention at common lengths,
and up to 20 times more memory-efficient. Figure 4: the trained model is the same.

Here the attention operation (forward and backward) is compared with float64. Its temporary memory
is read from the program compiled for this machine and, with libtpu, for a TPU v5p that need not be
attached. It is timed alternately with attention that stores its scores. Then a decoder is trained
with each.

    ablate run architecture/flash_attention --scale=smoke    # a few steps, no findings
    ablate run architecture/flash_attention                  # cpu: 2 cores; time in `ablate list`
    ablate run architecture/flash_attention --scale=gpu      # one accelerator
    ablate run architecture/flash_attention --scale=paper    # GPT-2 medium; 8 chips of TPU v5p
"""

from research.ablation import Arm, Claim, Unit, difference, mean, ratio
from research.ablation.attention_op import AttentionOp
from research.ablation.language_model import check_unit, evaluate_unit, language_model, train_unit
from research.ablation.measure import growth
from research.planning.topology import has_compiler

PAPER = "Dao 2022, FlashAttention: Fast and Memory-Efficient Exact Attention, arXiv:2205.14135"
CODE = ("layers/attention.py",)
MATCHED = "parameters, tokens, FLOPs of the model; inputs of the operation"
SEEDS = (0, 1, 2)
TOPOLOGY = "v5p:2x2x2"  # the slice of paper scale


def get_config(scale):
    config = language_model(scale)
    if scale == "paper":  # Table 2
        config.model.update(width=1024, num_layers=24, vocab_size=50_304)
        config.model.attention.update(num_heads=16, num_kv_heads=16, head_dim=64)
        config.model.mlp.update(width=4096, activation="gelu")
        config.data.update(sequence_length=1024, batch_size=512)
    small = scale == "smoke"
    config.op = dict(heads=8, head_dim=64, dtype="float32" if small else config.model.dtype)
    config.exact_length = 64 if small else 1024
    # a chip whose memory is large enough for the square at the longest length
    config.memory_lengths = (128, 256) if small else (2048, 4096, 8192, 16_384)
    config.topology = "v5p:2x2x1"
    config.timed = dict(short=64, long=128) if small else dict(short=1024, long=4096)
    config.rounds = 2 if small else 7
    return config


ARMS = (
    Arm("naive", {"model.attention.implementation": "reference"}),
    Arm("flash"),
)


def _exact(metric, what):
    return Claim(
        f"exact_{metric}",
        f"The {what} is at most twice as far from float64 as standard attention's",
        paper="Theorem 1: it returns softmax(QKᵀ)V",
        measure=ratio(metric, "flash", "naive"),
        comparison="<",
        margin=2.0,
    )


def _memory(where, metric):
    return (
        Claim(
            f"{metric}_linear",
            f"{where}, temporary memory grows with at most the 1.25th power of the length",
            paper="Theorem 1: O(N) memory beyond inputs and output",
            measure=mean(f"{metric}_growth", "flash"),
            comparison="<",
            margin=1.25,
            deterministic=True,
        ),
        Claim(
            f"{metric}_smaller",
            f"{where}, at the longest length, standard attention takes at least 20 times more",
            paper="Figure 3, right: up to 20 times more memory-efficient",
            measure=ratio(f"{metric}_bytes", "naive", "flash"),
            comparison=">",
            margin=20.0,
            deterministic=True,
        ),
    )


def _faster(name, length, times, paper):
    return Claim(
        f"faster_{name}",
        f"At {length} tokens ({name}), forward and backward are more than {times:g} times as fast",
        paper=paper,
        measure=mean(f"speedup_{name}", "flash"),
        comparison=">",
        margin=times,
    )


CLAIMS = (
    _exact("error", "result"),
    _exact("gradient_error", "gradient"),
    *_memory("Compiled for this machine", "memory"),
    *_memory("Compiled for a TPU v5p", "tpu_memory"),
    _faster("short", "1,024", 1.0, "Figure 3, left: up to 3 times, on a GPU"),
    _faster("long", "4,096", 2.0, "Figure 3, left: 2 to 4 times, on a GPU"),
    Claim(
        "same_model",
        "The decoder's held-out loss is within 0.005 nats of standard attention's",
        paper="Figure 4: the same validation perplexity throughout training",
        measure=difference("loss", "flash", "naive"),
        comparison="within",
        margin=0.005,
    ),
)


check = check_unit


def run(unit: Unit):
    config = unit.config
    metrics = evaluate_unit(unit, train_unit(unit).model)
    op = AttentionOp(**config.op, implementation=config.model.attention.implementation)
    metrics |= op.errors(config.exact_length, unit.seed)
    lengths = config.memory_lengths
    memory = {"memory": op.memory(lengths)}
    if has_compiler():
        memory["tpu_memory"] = op.tpu_memory(lengths, config.topology)
    for name, sizes in memory.items():
        metrics |= {f"{name}_bytes": sizes[-1], f"{name}_growth": growth(lengths, sizes)}
    if unit.arm == "flash":
        naive = AttentionOp(**config.op, implementation="reference")
        for name, length in config.timed.items():
            metrics[f"speedup_{name}"] = op.speedup(
                naive, length, rounds=config.rounds, seed=unit.seed
            )
    return metrics
